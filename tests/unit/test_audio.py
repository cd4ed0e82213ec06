"""Sound into buffers, and a graph's sound into samples: no sample twice, none lost, pts that hold."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.audio import AudioFormat, AudioQueue, Sound, SoundFeed, buffer_samples
from engine.graph.sound import NotSound, to_samples, to_waveform

FORMAT = AudioFormat(48_000, 2)
MONO = AudioFormat(48_000, 1)


def ramp(first: int, count: int) -> bytes:
    """Samples that say which they are."""
    return (np.arange(first, first + count) % 30_000).astype(np.int16).tobytes()


def numbers(sound: Sound) -> list[int]:
    return np.frombuffer(sound.samples, np.int16).tolist()


def queue(patience_s: float | None = None, clock: object = None) -> AudioQueue:
    return AudioQueue(MONO, patience_s, clock or (lambda: 0.0))  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.integers(1, 5000), st.booleans())
def test_every_sample_once_in_order_with_its_pts(blocks: list[int], size: int, all_complete: bool) -> None:
    audio, at = queue(), 0
    sounds = []
    for count in blocks:
        audio.put([(7 + round(at * MONO.ticks(1)), ramp(at, count))])
        at += count
        while (sound := audio.take(size, all_complete=all_complete)) is not None:
            assert len(sound.samples) % (size * 2) == 0
            sounds.append(sound)
    assert not audio.ready(size)
    audio.ended = True
    if (rest := audio.take(size)) is not None:
        sounds.append(rest)
    assert audio.take(size) is None
    taken = [number for sound in sounds for number in numbers(sound)]
    assert taken == [number % 30_000 for number in range(at)]
    begin = 0
    for sound in sounds:
        assert sound.pts == round(7 + MONO.ticks(begin))
        begin += len(sound.samples) // 2


def test_gap_ends_a_buffer_early_and_rounding_is_no_gap() -> None:
    audio = queue()
    audio.put([(0, ramp(0, 700)), (1313, ramp(700, 100))])  # 700 samples are 1312.5 ticks
    audio.put([(9_000, ramp(1000, 1000))])
    first, second = audio.take(1000), audio.take(1000)
    assert first is not None
    assert second is not None
    assert (first.pts, len(first.samples) // 2) == (0, 800)
    assert (second.pts, numbers(second)[0]) == (9_000, 1000)


def test_sound_that_waited_too_long_is_not_run() -> None:
    now = 0.0
    audio = queue(1.0, lambda: now)
    audio.put([(0, ramp(0, 480)), (900, ramp(480, 480))])
    now = 0.9
    audio.put([(1800, ramp(960, 480))])
    now = 1.5
    sound = audio.take(480)
    assert sound is not None
    assert sound.pts == 1800
    assert audio.dropped_samples == 960


def test_what_waits_is_bounded_and_the_oldest_goes() -> None:
    audio = queue()
    for second in range(40):
        audio.put([(second * 90_000, bytes(96_000))])
    sound = audio.take(480)
    assert sound is not None
    assert sound.pts == 10 * 90_000
    assert audio.dropped_samples == 10 * 48_000


@pytest.mark.parametrize(
    ("wanted", "samples"),
    [
        (500.0, 24_000),
        (20, 960),
        (0, 480),
        (1e9, 480_000),
        (float("nan"), 24_000),
        (["3", 0], 24_000),
        (True, 24_000),
    ],
)
def test_buffer_size(wanted: object, samples: int) -> None:
    prompt = {"1": {"class_type": "LoadAudioTensor", "inputs": {"buffer_size": wanted}}}
    assert buffer_samples(prompt, 48_000) == samples


def node(class_type: str, **inputs: object) -> dict[str, object]:
    return {"class_type": class_type, "inputs": inputs}


@pytest.mark.parametrize(
    ("classes", "has_video", "is_pace"),
    [
        (["LoadAudioTensor", "SaveAudioTensor"], True, True),
        (["LoadAudioTensor", "SaveTextTensor"], True, True),
        (["LoadAudioTensor", "SaveTensor"], True, False),
        (["LoadTensor", "LoadAudioTensor", "SaveAudioTensor"], True, False),
        (["LoadTensor", "SaveTensor"], True, False),
        (["LoadAudioTensor", "SaveTextTensor"], False, True),
    ],
)
def test_who_paces_the_runs(classes: list[str], has_video: bool, is_pace: bool) -> None:
    feed = SoundFeed(FORMAT, has_video=has_video)
    feed.follow({str(index): node(name) for index, name in enumerate(classes)})  # type: ignore[misc]
    feed.put([(0, bytes(4 * 24_000))])
    assert feed.is_pace == is_pace
    assert feed.ready() == is_pace
    assert (feed.take() is not None) == ("LoadAudioTensor" in classes)


def test_waveform_there_and_back() -> None:
    samples = np.array([[0, 1], [32767, -32768], [-5, 7]], np.int16)
    waveform = to_waveform(samples.tobytes(), 2)
    assert waveform.shape == (2, 3)
    assert float(waveform.min()) == -1.0
    assert to_samples(waveform, 48_000, count=3, channels=2, rate=48_000) == samples.tobytes()


def back(waveform: torch.Tensor, sample_rate: int = 48_000, count: int = 4) -> list[list[int]]:
    samples = to_samples(waveform, sample_rate, count=count, channels=2, rate=48_000)
    return np.frombuffer(samples, np.int16).reshape(-1, 2).tolist()


def test_graphs_sound_is_fitted_clipped_and_spread() -> None:
    assert back(torch.tensor([[2.0, -2.0, float("nan"), 0.5]])) == [
        [32767, 32767], [-32768, -32768], [0, 0], [16384, 16384],
    ]  # fmt: skip
    assert back(torch.zeros(6, 4, dtype=torch.float64)) == [[0, 0]] * 4
    assert back(torch.full((2, 2), 0.5), 24_000) == [[16384, 16384]] * 4, "another rate"
    tone = torch.sin(torch.arange(0, 441) * 2 * torch.pi * 100 / 44_100)[None]
    there = np.array(back(tone, 44_100, 480))[:, 0] / 32768
    assert np.abs(there - np.sin(np.arange(480) * 2 * np.pi * 100 / 48_000)).max() < 0.02


@pytest.mark.parametrize(
    "waveform", [torch.zeros(4), torch.zeros(1, 2, 4), torch.zeros(0, 4), torch.zeros(2, 8), torch.zeros(2, 0), [0.0]]
)
def test_what_is_no_sound_says_so(waveform: object) -> None:
    with pytest.raises(NotSound, match="the graph gave"):
        to_samples(waveform, 48_000, count=4, channels=2, rate=48_000)


def test_ticks_are_exact() -> None:
    assert AudioFormat(44_100, 2).ticks(1) == Fraction(100, 49)
