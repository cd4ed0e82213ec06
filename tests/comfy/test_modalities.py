"""Sound, text and graphs without a live picture on the real ComfyUI: what a session's graph gives for each run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.audio import AudioFormat, Sound
from engine.backend import FrameIn, RunResult
from engine.comfy_backend import ComfyBackend, ComfyGraph
from engine.graph.comfy import ComfyHost
from engine.graph.workflow import Prompt, parse
from engine.wire import VideoFormat
from tests.fakes import nodes as fakes
from tests.fakes.engine_client import settings_for

VIDEO = VideoFormat(16, 8)
FORMAT = AudioFormat()
BLOCK = 480


def graph_of(host: ComfyHost, **nodes: tuple[str, dict[str, Any]]) -> tuple[ComfyGraph, Prompt]:
    fakes.runs.clear()
    prompt = parse({name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}).prompt
    return ComfyGraph(host.new_runner(), prompt, VIDEO), prompt


def warm(host: ComfyHost, prompt: Prompt) -> ComfyGraph:
    """As sessions get it."""
    backend = ComfyBackend(settings_for(Path()))
    backend._host = host
    built = []

    def build() -> Iterator[Any]:
        built.append((yield from backend.build(prompt, VIDEO, lambda stage: None)))

    for _ in build():
        pass
    (graph,) = built
    assert isinstance(graph, ComfyGraph)
    return graph


def frame(number: int, level: int = 128) -> FrameIn:
    return FrameIn(number, number * 3000, bytes([level]) * VIDEO.frame_bytes)


def sound(number: int, level: int = 1000) -> Sound:
    samples = np.full((BLOCK, 2), level, np.int16)
    samples[:, 1] = -level
    return Sound(number * 900, samples.tobytes(), FORMAT)


def levels(result: RunResult) -> set[tuple[int, int]]:
    assert result.sound is not None
    return {tuple(pair) for pair in np.frombuffer(result.sound.samples, np.int16).reshape(-1, 2).tolist()}


IN = ("LoadAudioTensor", {"buffer_size": 10.0})


def test_graph_that_runs_on_sound_alone(host: ComfyHost) -> None:
    gain = ("Gain", {"audio": ["in", 0], "gain": 2.0})
    graph, prompt = graph_of(host, **{"in": IN, "gain": gain, "out": ("SaveAudioTensor", {"audio": ["gain", 0]})})
    for number in range(3):
        result = graph.run(prompt, [], sound(number, 1000 + number))
        assert result.sound is not None
        assert result.sound.pts == number * 900
        assert len(result.sound.samples) == BLOCK * 4
        assert levels(result) == {(2000 + 2 * number, -2000 - 2 * number)}
    graph.close()


def test_sound_beside_pictures_runs_once_for_each_buffer(host: ComfyHost) -> None:
    graph, prompt = graph_of(
        host,
        picture=("LoadTensor", {}),
        show=("SaveTensor", {"images": ["picture", 0]}),
        **{"in": IN},
        gain=("Gain", {"audio": ["in", 0], "gain": 0.5}),
        out=("SaveAudioTensor", {"audio": ["gain", 0]}),
        meter=("Loudness", {"audio": ["in", 0]}),
        words=("SaveTextTensor", {"data": ["meter", 0]}),
    )
    before = graph.run(prompt, [frame(0)])
    assert before.sound is None, "silence before the first buffer is not sent"
    with_sound = graph.run(prompt, [frame(1)], sound(1))
    between = [graph.run(prompt, [frame(number)]) for number in (2, 3)]
    again = graph.run(prompt, [frame(4)], sound(4))
    assert levels(with_sound) == levels(again) == {(500, -500)}
    assert [result.sound for result in between] == [None, None]
    assert [result.texts for result in (before, with_sound, *between, again)] == [
        [("words", "0.00")], [("words", "0.03")], [], [], [("words", "0.03")],
    ]  # fmt: skip
    assert fakes.runs["Gain"] == 3, "nothing behind the sound runs between two buffers"
    assert all(len(result.pictures) == 1 and result.pictures[0] for result in between)
    # A changed knob runs the node again on a buffer that is out already: it must not be heard twice.
    louder = {**prompt, "gain": {**prompt["gain"], "inputs": {"audio": ["in", 0], "gain": 1.0}}}
    assert graph.run(louder, [frame(5)]).sound is None
    assert fakes.runs["Gain"] == 4
    assert levels(graph.run(louder, [frame(6)], sound(6))) == {(1000, -1000)}
    graph.close()


@pytest.mark.parametrize(("left_out", "is_heard"), [(20, True), (100, False)])
def test_sound_of_another_length(host: ComfyHost, left_out: int, is_heard: bool) -> None:
    graph, prompt = graph_of(
        host,
        **{"in": IN},
        cut=("Shorten", {"audio": ["in", 0], "samples": left_out}),
        out=("SaveAudioTensor", {"audio": ["cut", 0]}),
    )
    result = graph.run(prompt, [], sound(0))
    if is_heard:
        assert result.sound is not None
        assert len(result.sound.samples) == BLOCK * 4, "fitted into the time of its input"
        assert levels(result) == {(1000, -1000)}
    else:
        assert result.sound is None
        assert f"{BLOCK - left_out} samples" in result.sound_problem
    graph.close()


def test_picture_that_depends_on_nothing_live_comes_with_every_frame(host: ComfyHost) -> None:
    graph, prompt = graph_of(
        host,
        colour=("EmptyImage", {"width": 32, "height": 16, "batch_size": 1, "color": 0xFFFFFF}),
        once=("Counting", {"image": ["colour", 0]}),
        show=("SaveImage", {"images": ["once", 0], "filename_prefix": "x"}),
    )
    runs = [graph.run(prompt, [frame(number)]) for number in range(3)]
    assert [[(picture.width, picture.height) for picture in result.pictures if picture] for result in runs] == [
        [(32, 16)]
    ] * 3
    assert graph.picture_size == (32, 16)
    batch = graph.run(prompt, [frame(3), frame(4)])
    assert batch.pictures[0] is not None
    assert batch.pictures[0] == batch.pictures[1], "it stands for every frame of the run"
    graph.close()


def test_text_that_depends_on_nothing_live_is_sent_after_the_warm_up_and_again(host: ComfyHost) -> None:
    graph, prompt = graph_of(
        host,
        words=("PrimitiveString", {"value": "hello"}),
        say=("SaveTextTensor", {"data": ["words", 0]}),
        picture=("LoadTensor", {}),
        show=("SaveTensor", {"images": ["picture", 0]}),
    )
    graph.close()
    graph = warm(host, prompt)
    now = 0.0
    graph._texts._clock = lambda: now
    sent = []
    for number in range(1, 61):
        now = number / 30
        sent.append(graph.run(prompt, [frame(number)]).texts)
    assert sent[0] == [("say", "hello")]
    assert sum(map(len, sent)) == 2, "once a second"
    graph.close()


def test_size_is_known_after_the_warm_up(host: ComfyHost) -> None:
    scale = {"image": ["picture", 0], "upscale_method": "bilinear", "width": 32, "height": 16, "crop": "disabled"}
    graph, prompt = graph_of(
        host,
        picture=("LoadTensor", {}),
        scale=("ImageScale", scale),
        show=("SaveTensor", {"images": ["scale", 0]}),
    )
    assert graph.picture_size == (0, 0)
    graph.close()
    graph = warm(host, prompt)
    assert graph.picture_size == (32, 16)
    graph.close()
