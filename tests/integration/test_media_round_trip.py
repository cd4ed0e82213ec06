"""Numbered clips through reader, decoder, encoder and back: every picture, in order, with its own stamp."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction

import pytest

from gateway_shim.media.decode import Decoder, Picture, Sound
from gateway_shim.media.encode import Chunk, Encoder
from gateway_shim.media.planes import frame_of, planes_of
from gateway_shim.media.settings import EncoderSettings
from gateway_shim.media.ts import AccessUnit, TsReader
from tests.fakes.media_clips import bursts, clip, decoded, numbers, pictures, sounds, units_of, video


@dataclass
class Chain:
    """What the shim does with a stream, without network and engine. Bytes arrive in pieces."""

    width: int = 320
    height: int = 240
    sound: bool = True
    reader: TsReader = field(default_factory=TsReader)
    decoder: Decoder = field(default_factory=Decoder)
    taken: list[Picture | Sound] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.encoder = Encoder(EncoderSettings(self.width, self.height, Fraction(30), audio=self.sound))

    def segment(self, data: bytes, *, complete: bool = True) -> None:
        for at in range(0, len(data), 1400):
            self._units(self.reader.feed(data[at : at + 1400]))
        if complete:
            self._units(self.reader.end_segment())
        else:
            self.reader.gap()

    def _units(self, units: list[AccessUnit]) -> None:
        self._items(self.decoder.feed(units))

    def _items(self, items: list[Picture | Sound]) -> None:
        self.taken += items
        for item in items:
            if isinstance(item, Sound):
                self.chunks += self.encoder.audio(item.frame, item.pts)
            elif (item.width, item.height) == (self.width, self.height):
                # As over the engine: bytes there, bytes back.
                self.chunks += self.encoder.video(frame_of(planes_of(item.frame), item.width, item.height), item.pts)
            else:
                self.chunks += self.encoder.video(item.frame, item.pts)

    def finish(self) -> list[Picture | Sound]:
        """What a viewer of the output sees."""
        self._items(self.decoder.flush())
        self.chunks += self.encoder.flush()
        return decoded(units_of(b"".join(chunk.data for chunk in self.chunks)))


@pytest.mark.parametrize("sound", [None, "aac", "opus"])
@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("size", [(320, 240), (854, 480)])
def test_every_picture_comes_through(sound: str | None, b_frames: int, size: tuple[int, int]) -> None:
    width, height = size
    data = clip(75, audio=sound, b_frames=b_frames, width=width, height=height)
    chain = Chain(width, height, sound=sound is not None)
    chain.segment(data)
    seen = chain.finish()
    assert numbers(seen) == list(range(75))
    assert [item.pts for item in pictures(seen)] == sorted(
        unit.pts for unit in video(units_of(data)) if unit.pts is not None
    )
    assert [item.pts for item in pictures(seen)] == [item.pts for item in pictures(chain.taken)]
    if sound is None:
        assert sounds(seen) == []
        return
    shown = pictures(seen)
    begun = bursts(seen)
    assert len(begun) >= 2
    for frame in (30, 60):
        assert min(abs(at - shown[frame].pts / 90_000) for at in begun) < 0.005


def test_segments_of_fresh_muxers_are_one_stream() -> None:
    chain = Chain()
    for index in range(3):
        units = units_of(clip(30, audio="opus", first_number=30 * index))
        shifted = [
            replace(unit, pts=unit.pts + 90_000 * index, dts=unit.dts + 90_000 * index)
            for unit in units
            if unit.pts is not None and unit.dts is not None
        ]
        chain._units(shifted)
    assert numbers(chain.finish()) == list(range(90))
    assert chain.reader.counters.continuity_errors == 0


def test_size_change_mid_stream_keeps_the_output_size() -> None:
    chain = Chain(320, 240, sound=False)
    for index, (width, height) in enumerate([(320, 240), (640, 360), (360, 640), (320, 240)]):
        units = units_of(clip(15, width=width, height=height, first_number=15 * index))
        chain._units(
            [replace(unit, pts=unit.pts + 45_000 * index, dts=None) for unit in units if unit.pts is not None]
        )
    seen = chain.finish()
    assert len(pictures(seen)) == 60
    assert {(item.width, item.height) for item in pictures(seen)} == {(320, 240)}
    shown = numbers(seen)
    # Cut to the middle, the wide and the tall picture lose parts of the bar; those of the output's shape keep it.
    assert shown[:15] == list(range(15))
    assert shown[45:] == list(range(45, 60))


def test_sound_that_comes_later_in_the_program() -> None:
    chain = Chain()
    chain.segment(clip(30))
    later = units_of(clip(60, audio="aac", first_number=30), chain.reader)
    chain._units(
        [
            replace(unit, pts=unit.pts + 90_000, dts=unit.dts + 90_000)
            for unit in later
            if unit.pts is not None and unit.dts is not None
        ]
    )
    seen = chain.finish()
    assert numbers(seen) == list(range(90))
    shown = pictures(seen)
    begun = bursts(seen)
    assert min(abs(at - shown[60].pts / 90_000) for at in begun) < 0.005
    assert sounds(seen)[0].pts > 80_000


def test_restarted_source_goes_on_increasing() -> None:
    chain = Chain()
    chain.segment(clip(60, audio="aac"))
    chain.segment(clip(60, audio="aac", first_number=60))
    seen = chain.finish()
    assert numbers(seen) == list(range(120))
    stamps = [item.pts for item in pictures(seen)]
    assert stamps == sorted(set(stamps))
    assert chain.encoder.counters.dropped_pictures == 0
    shown = pictures(seen)
    begun = bursts(seen)
    for frame in (30, 90):
        assert min(abs(at - shown[frame].pts / 90_000) for at in begun) < 0.005


@pytest.mark.parametrize("first", [(1 << 33) - 90_000, 5_000_000_000, 0])
def test_any_first_stamp_and_the_wrap(first: int) -> None:
    """The source is our own encoder, whose stamps are cut to 33 bits like everyone's."""
    source = Chain(sound=False)
    source._units(
        [replace(unit, pts=unit.pts + first, dts=None) for unit in units_of(clip(75)) if unit.pts is not None]
    )
    source.finish()
    chain = Chain(sound=False)
    chain.segment(b"".join(chunk.data for chunk in source.chunks))
    seen = chain.finish()
    assert numbers(seen) == list(range(75))
    assert [item.pts for item in pictures(seen)] == [first + 3000 * number for number in range(75)]


def test_abandoned_segment_costs_no_more_than_itself() -> None:
    data = clip(180, audio="aac", gop=60)
    # Segments as a segmenter cuts them, at the packets that say "random access" on the picture track.
    begins = [at for at in range(0, len(data), 188) if data[at + 1 : at + 3] == b"\x41\x00" and data[at + 5] & 0x40]
    assert len(begins) == 3
    chain = Chain()
    chain.segment(data[: begins[1]])
    chain.segment(data[begins[1] : (begins[1] + begins[2]) // 2], complete=False)
    chain.segment(data[begins[2] :])
    shown = numbers(chain.finish())
    assert shown[:60] == list(range(60))
    assert shown[-60:] == list(range(120, 180))
    middle = shown[60:-60]
    assert middle == list(range(60, 60 + len(middle)))
    assert len(middle) > 20
    assert chain.reader.counters.continuity_errors == 0
