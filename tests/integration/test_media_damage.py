"""Damaged transport streams through the whole chain: it goes on, nothing raises, nothing wrong is shown."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from gateway_shim.media.decode import Decoder, Sound
from gateway_shim.media.encode import Chunk, Encoder
from gateway_shim.media.settings import EncoderSettings
from gateway_shim.media.ts import TsReader
from tests.fakes.media_clips import clip, decoded, numbers, pictures, sounds, units_of

FRAMES = 150


def through(data: bytes) -> tuple[list[int | None], list[int], list[int], TsReader, Decoder]:
    """Numbers, stamps of pictures, stamps of sound in the output; reader and decoder for their counters."""
    reader, decoder = TsReader(), Decoder()
    encoder = Encoder(EncoderSettings(320, 240, Fraction(30)))
    items = decoder.feed(units_of(data, reader)) + decoder.flush()
    chunks: list[Chunk] = []
    for item in items:
        if isinstance(item, Sound):
            chunks += encoder.audio(item.frame, item.pts)
        else:
            chunks += encoder.video(item.frame, item.pts)
    chunks += encoder.flush()
    seen = decoded(units_of(b"".join(chunk.data for chunk in chunks)))
    return (
        numbers(seen),
        [item.pts for item in pictures(seen)],
        [item.pts for item in sounds(seen)],
        reader,
        decoder,
    )


def check_order(shown: list[int | None], stamps: list[int], sound: list[int]) -> None:
    readable = [number for number in shown if number is not None]
    assert readable == sorted(set(readable))
    assert stamps == sorted(set(stamps))
    assert sound == sorted(set(sound))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("b_frames", [0, 2])
def test_dropped_packets(seed: int, b_frames: int) -> None:
    data = clip(FRAMES, audio="aac", b_frames=b_frames)
    chance = random.Random(seed)
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    lost = set(chance.sample(range(400, len(packets) - 400), 4))
    shown, stamps, sound, reader, decoder = through(
        b"".join(raw for index, raw in enumerate(packets) if index not in lost)
    )
    check_order(shown, stamps, sound)
    assert None not in shown  # a damaged picture is left out, and all that refer to it
    assert reader.counters.continuity_errors >= 1
    assert shown[0] == 0
    assert shown[-1] == FRAMES - 1
    # A loss costs at most the rest of its group of 30.
    assert len(shown) >= FRAMES - 4 * 32
    assert len(shown) + decoder.counters.skipped_units + reader.counters.dropped_units >= FRAMES - 4


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits(seed: int) -> None:
    data = bytearray(clip(FRAMES, audio="opus"))
    chance = random.Random(seed)
    for _ in range(20):
        data[chance.randrange(188 * 100, len(data) * 3 // 5)] ^= 1 << chance.randrange(8)
    shown, stamps, sound, _, _ = through(bytes(data))
    # What libavcodec makes of a wrong bit within a picture is shown, so numbers may be misread there.
    check_order([], stamps, sound)
    assert shown[-30:] == list(range(FRAMES - 30, FRAMES))


@pytest.mark.parametrize("seed", range(4))
def test_lost_and_inserted_bytes(seed: int) -> None:
    data = bytearray(clip(FRAMES, audio="aac"))
    chance = random.Random(seed)
    for _ in range(3):
        at = chance.randrange(188 * 100, len(data) * 3 // 5)
        if chance.random() < 0.5:
            del data[at : at + chance.randrange(1, 3000)]
        else:
            data[at:at] = chance.randbytes(chance.randrange(1, 3000))
    shown, stamps, sound, reader, _ = through(bytes(data))
    check_order(shown, stamps, sound)
    assert reader.counters.sync_losses >= 1
    assert shown.count(None) <= 3  # a unit whose last packet is hit is out before the rhythm is seen to be lost
    assert shown[-30:] == list(range(FRAMES - 30, FRAMES))


@pytest.mark.parametrize("part", [0.03, 0.5, 0.999])
def test_truncated(part: float) -> None:
    data = clip(FRAMES, audio="aac")
    shown, stamps, sound, reader, _ = through(data[: int(len(data) * part) | 1])
    check_order(shown, stamps, sound)
    assert shown == list(range(len(shown)))
    assert len(shown) >= int(FRAMES * part * 0.6) - 2
    assert reader.counters.sync_losses == 0


def test_begun_in_the_middle() -> None:
    """A subscriber that joins within a segment finds no tables at first and no key frame."""
    data = clip(FRAMES, audio="aac")
    shown, stamps, sound, _, _ = through(data[len(data) // 3 + 77 :])
    check_order(shown, stamps, sound)
    assert None not in shown
    assert shown[-30:] == list(range(FRAMES - 30, FRAMES))


def test_nothing_but_noise() -> None:
    shown, _, sound, reader, _ = through(random.Random(1).randbytes(300_000))
    assert (shown, sound) == ([], [])
    assert reader.tracks == ()
