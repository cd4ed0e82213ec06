"""The shipped workflows with sound, on the real nodes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.audio import AudioFormat, Sound
from engine.backend import FrameIn, RunResult
from engine.comfy_backend import ComfyGraph
from engine.graph.comfy import ComfyHost
from engine.graph.sound_nodes import AudioLevel
from engine.graph.workflow import Prompt, parse
from engine.wire import VideoFormat

DIRECTORY = Path(__file__).parents[2] / "examples" / "workflows" / "sound"
VIDEO = VideoFormat(64, 48)
SAMPLES = 4800


def sound(level: int) -> Sound:
    tone = level * np.sin(np.arange(SAMPLES) * 2 * np.pi / 48)
    return Sound(0, np.repeat(tone.astype(np.int16), 2).tobytes(), AudioFormat())


def frame(number: int) -> FrameIn:
    return FrameIn(number, number * 3000, bytes([60]) * (64 * 48) + bytes([128]) * (64 * 24))


def brightness(result: RunResult) -> float:
    (picture,) = result.pictures
    assert picture is not None
    return float(np.frombuffer(picture.planes, np.uint8)[: 64 * 48].mean())


def loaded(host: ComfyHost, name: str) -> tuple[ComfyGraph, Prompt]:
    prompt = parse((DIRECTORY / f"{name}.json").read_text()).prompt
    assert host.validate(prompt) == []
    return ComfyGraph(host.new_runner(), prompt, VIDEO), prompt


def test_page_has_every_example() -> None:
    names = sorted(path.stem for path in DIRECTORY.glob("*.json"))
    assert re.findall(r"^\| \[([a-z]+)\]\(\1\.json\)", (DIRECTORY / "README.md").read_text(), re.MULTILINE) == names


def test_meter_glows_and_says_how_loud_it_is(host: ComfyHost) -> None:
    graph, prompt = loaded(host, "meter")
    runs = [graph.run(prompt, [frame(number)], sound(level)) for number, level in enumerate((0, 330, 33_000 // 2))]
    looks = [brightness(result) for result in runs]
    assert looks[0] == pytest.approx(60, abs=1)
    assert looks[0] + 10 < looks[1] < looks[2] - 10
    assert [result.texts for result in runs] == [[("7", "-60.0 dB")], [("7", "-43.0 dB")], [("7", "-9.0 dB")]]
    graph.close()


def test_volume_turns_the_sound_down_by_its_knob(host: ComfyHost) -> None:
    graph, prompt = loaded(host, "volume")

    def loudest(prompt: Prompt) -> int:
        result = graph.run(prompt, [frame(0)], sound(10_000))
        assert result.sound is not None
        assert brightness(result) == pytest.approx(60, abs=1)
        return int(np.abs(np.frombuffer(result.sound.samples, np.int16)).max())

    assert loudest(prompt) == pytest.approx(1000, abs=2)
    up = {**prompt, "4": {**prompt["4"], "inputs": {"audio": ["3", 0], "volume": 6}}}
    assert loudest(up) == pytest.approx(19_953, abs=2)
    graph.close()


@pytest.mark.parametrize(
    ("waveform", "level", "text"),
    [
        (torch.ones(1, 2, 100), 1.0, "0.0 dB"),
        (torch.full((1, 1, 100), 10.0), 1.0, "20.0 dB"),
        (torch.full((1, 1, 100), 0.1), 2 / 3, "-20.0 dB"),
        (torch.zeros(1, 2, 100), 0.0, "-60.0 dB"),
        (torch.zeros(1, 2, 0), 0.0, "-60.0 dB"),
    ],
)
def test_level(waveform: torch.Tensor, level: float, text: str) -> None:
    given = AudioLevel().measure({"waveform": waveform, "sample_rate": 48_000})
    assert given[0] == pytest.approx(level, abs=1e-3)
    assert given[1] == text
