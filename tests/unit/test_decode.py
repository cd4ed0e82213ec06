"""Decoding: every picture once and in order, sound without drift, and nothing that the units contain raises."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway_shim.localnet.numbered import luma_of, picture, read_number
from gateway_shim.media.clock import Clock
from gateway_shim.media.colour import Colour
from gateway_shim.media.decode import Decoder, DecoderSettings
from gateway_shim.media.timeline import Timeline
from gateway_shim.media.ts import AccessUnit, Track
from tests.fakes.media_clips import audio, bursts, clip, decoded, numbers, pictures, sounds, steps, units_of
from tests.fakes.ts_edit import damaged_pts, shifted

WRAP = 1 << 33
AAC = Track(0x101, "aac", "audio")


def encoded(
    pixel_format: str, *, colour: Colour | None = None, width: int = 320, frames: int = 4
) -> list[AccessUnit]:
    """Units of numbered pictures in a pixel format that the numbered clips do not have."""
    track = Track(0x100, "h264", "video")
    context = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = width, 240, pixel_format
    context.time_base = Fraction(1, 90_000)
    context.framerate = Fraction(30)
    context.options = {"preset": "ultrafast", "tune": "zerolatency", "crf": "16"}
    if colour is not None:
        context.colorspace, context.color_range = colour.matrix_tag, colour.range_tag
    units = []
    for number in range(frames):
        frame = picture(number, width & ~1, 240).reformat(width, 240, pixel_format, threads=1)
        frame.pts, frame.time_base = number * 3000, Fraction(1, 90_000)
        units += [
            AccessUnit(track, packet.pts, packet.dts, bytes(packet), packet.is_keyframe, False)
            for packet in context.encode(frame)
        ]
    return units


def test_picture_is_out_with_its_unit() -> None:
    decoder = Decoder()
    for index, unit in enumerate(units_of(clip(30))):
        [shown] = pictures(decoder.feed([unit]))
        assert (read_number(luma_of(shown.frame)), shown.pts) == (index, unit.pts)
    assert decoder.flush() == []


@pytest.mark.parametrize("b_frames", [1, 2, 4])
def test_b_frames_come_in_the_order_of_their_stamps(b_frames: int) -> None:
    units = units_of(clip(45, b_frames=b_frames))
    decoder = Decoder()
    items = decoder.feed(units)
    assert 45 - len(items) <= 2  # x264's pyramid reorders by two; no more is held back
    items += decoder.flush()
    assert numbers(items) == list(range(45))
    stamps = [shown.pts for shown in pictures(items)]
    assert stamps == sorted(unit.pts for unit in units if unit.pts is not None)


@pytest.mark.parametrize(
    ("pixel_format", "given_colour", "expected"),
    [
        ("yuv420p", None, Colour("bt601", full_range=False)),
        ("yuv420p", Colour("bt709"), Colour("bt709", full_range=False)),
        ("yuvj420p", None, Colour("bt601", full_range=True)),
        ("yuvj420p", Colour("bt709", full_range=True), Colour("bt709", full_range=True)),
        ("yuv422p", Colour("bt709"), Colour("bt709")),
        ("yuv444p", None, Colour("bt601")),
        ("yuv420p10le", Colour("bt709"), Colour("bt709")),
        ("yuv422p10le", None, Colour("bt601")),
    ],
)
def test_formats_become_yuv420p_of_the_same_numbers(
    pixel_format: str, given_colour: Colour | None, expected: Colour
) -> None:
    shown = pictures(decoded(encoded(pixel_format, colour=given_colour)))
    assert [read_number(luma_of(item.frame)) for item in shown] == [0, 1, 2, 3]
    assert {item.frame.format.name for item in shown} == {"yuv420p"}
    assert {item.colour for item in shown} == {expected}
    # The source's luma at the same range, so a change of range would move the whole picture.
    reference = picture(0, 320, 240).reformat(format=pixel_format, threads=1).to_ndarray(format="gray")
    if not expected.full_range:
        reference = luma_of(picture(0, 320, 240))
        assert abs(luma_of(shown[0].frame).astype(int) - reference).mean() < 2
    else:
        assert luma_of(shown[0].frame).max() >= 250


def test_odd_size_becomes_even() -> None:
    shown = pictures(decoded(encoded("yuv444p", width=321)))
    assert {(item.width, item.height, item.frame.width) for item in shown} == {(320, 240, 320)}


def test_size_may_change_at_a_key_frame() -> None:
    units = units_of(clip(10)) + units_of(clip(10, width=640, height=360, first_number=10))
    items = decoded(units)
    assert numbers(items) == list(range(20))
    assert [(shown.width, shown.height) for shown in pictures(items)] == [(320, 240)] * 10 + [(640, 360)] * 10


def test_after_a_loss_pictures_wait_for_a_key_frame() -> None:
    units = units_of(clip(60, b_frames=2))
    units[20] = replace(units[20], discontinuity=True)
    decoder = Decoder()
    items = decoded(units, decoder)
    shown = numbers(items)
    assert shown[:18] == list(range(18))  # what was held back for reordering still comes
    assert shown[-30:] == list(range(30, 60))
    assert decoder.counters.skipped_units == 10
    assert shown == sorted(shown)  # type: ignore[type-var]


def test_source_without_key_frames_is_decoded_after_a_while() -> None:
    units = [replace(unit, keyframe=False) for unit in units_of(clip(360, width=64, height=64))]
    decoder = Decoder()
    assert len(pictures(decoded(units, decoder))) >= 30
    assert decoder.counters.skipped_units == 300


def test_unit_that_does_not_decode_is_counted_and_skipped() -> None:
    units = units_of(clip(90))
    units[10] = replace(units[10], data=b"\x00\x00\x00\x01\x65" + bytes(range(256)) * 4)
    units[45] = replace(units[45], data=b"")
    decoder = Decoder()
    shown = numbers(decoded(units, decoder))
    assert shown[:10] == list(range(10))
    assert shown[-30:] == list(range(60, 90))
    assert None not in shown[-60:]
    assert decoder.counters.video_errors >= 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5000), st.integers(1, 255)), max_size=20), st.booleans())
def test_flipped_bits_raise_nothing(flips: list[tuple[int, int, int]], with_aac: bool) -> None:
    units = list(units_of(clip(10, audio="aac" if with_aac else "opus")))
    for index, position, mask in flips:
        unit = units[index % len(units)]
        data = bytearray(unit.data)
        data[position % len(data)] ^= mask
        units[index % len(units)] = replace(unit, data=bytes(data))
    decoder = Decoder()
    decoder.feed(units)
    decoder.flush()
    # It goes on with good data: a key frame, and sound at once.
    good = units_of(clip(10, audio="opus"))
    items = decoder.feed(good) + decoder.flush()
    assert numbers(items)[-10:] == list(range(10))


def test_oversized_picture_is_refused() -> None:
    decoder = Decoder(DecoderSettings(max_pixels=320 * 200))
    assert decoder.feed(units_of(clip(10))) == []
    assert decoder.counters.video_errors >= 1


def test_pictures_without_stamps_go_on_at_their_rate() -> None:
    units = [
        unit if index < 5 else replace(unit, pts=None, dts=None) for index, unit in enumerate(units_of(clip(10)))
    ]
    assert steps(shown.pts for shown in pictures(decoded(units))) == {3000}


@pytest.mark.parametrize("codec", ["aac", "opus"])
def test_sound_is_48_khz_stereo_without_holes(codec: str) -> None:
    units = units_of(clip(60, audio=codec))
    blocks = sounds(decoded(units))
    assert blocks[0].pts == audio(units)[0].pts
    for before, after in itertools.pairwise(blocks):
        assert after.pts - before.pts == before.frame.samples * 15 // 8
    for block in blocks:
        frame = block.frame
        assert (frame.format.name, frame.layout.name, frame.sample_rate) == ("s16", "stereo", 48_000)
    decoder = Decoder()
    decoded(units, decoder)
    assert decoder.counters.sounds == len(blocks)


def tone(codec: str, rate: int, layout: str, seconds: float) -> list[AccessUnit]:
    """A 440 Hz tone through a muxer of libavformat's; stamps as the container rounds them."""
    output = io.BytesIO()
    with av.open(output, "w", format="mpegts") as container:
        track = container.add_stream(codec, rate=rate)
        context = track.codec_context
        context.layout = layout  # type: ignore[union-attr]
        size, at = 0, 0
        while at < seconds * rate:
            size = context.frame_size or 1152  # type: ignore[union-attr]
            wave = 0.5 * np.sin(2 * np.pi * 440 * (at + np.arange(size)) / rate)
            channels = 2 if layout == "stereo" else 1
            form = context.format.name  # type: ignore[union-attr]
            if form == "fltp":
                samples = np.tile(wave.astype(np.float32), (channels, 1))
            else:
                samples = np.repeat((wave * 32767).astype(np.int16), channels)[None]
            frame = av.AudioFrame.from_ndarray(samples, form, layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
            container.mux(track.encode(frame))  # type: ignore[union-attr, arg-type]
            at += size
        container.mux(track.encode(None))  # type: ignore[union-attr]
    return units_of(output.getvalue())


@pytest.mark.parametrize(
    ("codec", "rate", "layout"),
    [("aac", 44_100, "stereo"), ("aac", 22_050, "mono"), ("mp2", 44_100, "stereo"), ("mp2", 48_000, "stereo")],
)
def test_other_rates_are_resampled_without_drift(codec: str, rate: int, layout: str) -> None:
    units = tone(codec, rate, layout, 20)
    decoder = Decoder()
    blocks = sounds(decoded(units, decoder))
    assert decoder.counters.audio_errors == 0
    end = blocks[0].pts
    for block in blocks:
        assert abs(block.pts - end) <= 1
        end = block.pts + round(block.frame.samples * 15 / 8)
    assert units[0].pts is not None
    assert units[-1].pts is not None
    assert blocks[0].pts == units[0].pts
    assert abs(end - blocks[0].pts - 20 * 90_000) <= 3 * 1152 * 90_000 / rate  # encoders pad
    wave = np.concatenate([block.frame.to_ndarray().reshape(-1, 2)[:, 0] for block in blocks[20:60]]).astype(float)
    crossings = np.flatnonzero(np.diff(np.signbit(wave)))
    assert math.isclose(len(crossings) / 2 / (len(wave) / 48_000), 440, rel_tol=0.01)


def test_gap_in_sound_is_kept() -> None:
    units = audio(units_of(clip(60, audio="aac")))
    blocks = sounds(decoded(units[:40] + units[60:]))
    assert steps(block.pts for block in blocks) == {1920, 21 * 1920}


def test_sound_without_a_stamp_after_a_loss_goes_on_where_it_was() -> None:
    units = audio(units_of(clip(60, audio="opus")))
    units[20:] = [
        replace(unit, pts=None, dts=None, discontinuity=index == 0) for index, unit in enumerate(units[20:])
    ]
    assert steps(block.pts for block in sounds(decoded(units))) == {1800}


def test_noise_in_stamps_is_evened_out() -> None:
    units = audio(units_of(clip(60, audio="opus")))
    noisy = [
        replace(unit, pts=unit.pts + (90 if index % 2 else -90))
        for index, unit in enumerate(units)
        if unit.pts is not None
    ]
    assert steps(block.pts for block in sounds(decoded(noisy))) == {1800}


def test_slow_drift_of_stamps_is_followed() -> None:
    """A source whose sound card is 0.5 % off: the stamps are right, the count of samples is not."""
    units = audio(units_of(clip(300, width=64, height=64, audio="opus")))
    first = units[0].pts
    assert first is not None
    drifting = [
        replace(unit, pts=first + round((unit.pts - first) * 1.005)) for unit in units if unit.pts is not None
    ]
    blocks = sounds(decoded(drifting))
    for unit, block in zip(drifting, blocks, strict=True):
        assert unit.pts is not None
        assert abs(block.pts - unit.pts) < 900


def test_damaged_sound_is_counted_and_the_rest_keeps_its_time() -> None:
    units = audio(units_of(clip(60, audio="aac")))
    stamps = {unit.pts for unit in units}
    units[20] = replace(units[20], data=units[20].data[:7] + b"\xff" * (len(units[20].data) - 7))
    decoder = Decoder()
    blocks = sounds(decoded(units, decoder))
    assert decoder.counters.audio_errors == 1
    assert {block.pts for block in blocks} <= stamps


def test_source_that_starts_again_goes_on_on_our_time_line() -> None:
    """protocol.md 2.3: a clock that begins again at 0 breaks playback."""
    before = units_of(clip(60, audio="aac"))
    after = units_of(clip(60, audio="aac", first_number=60))
    decoder = Decoder()
    moved = [
        replace(unit, pts=unit.pts + 900_000, dts=unit.dts + 900_000)
        for unit in before
        if unit.pts is not None and unit.dts is not None
    ]
    items = decoded(moved + after, decoder)
    assert numbers(items) == list(range(120))
    stamps = [shown.pts for shown in pictures(items)]
    assert stamps == sorted(set(stamps))
    assert stamps[60] - stamps[59] < 18_000  # the sound was a little ahead
    assert decoder.counters.clock_jumps == 1
    # Picture and sound have moved alike.
    begun = [at * 90_000 for at in bursts(items)]
    assert min(abs(at - stamps[30]) for at in begun) < 100
    assert min(abs(at - stamps[90]) for at in begun) < 100


@pytest.mark.parametrize("step", [1500, 3600])
@pytest.mark.parametrize("sound_first", [True, False])
def test_clock_that_begins_again_costs_no_sample_at_any_frame_rate(step: int, sound_first: bool) -> None:
    """Both tracks go on in their own steps: a guess of 30 fps cost a 25 fps stream 320 samples at each restart."""
    tracks = {"video": (Track(0x100, "h264", "video"), step), "audio": (AAC, 1920)}
    stamps = [(at, kind) for kind, (_, each) in tracks.items() for at in range(900_000, 1_080_000, each)]
    stamps.sort(key=lambda pair: (pair[0], (pair[1] == "video") == sound_first))
    line = Timeline()
    placed: list[AccessUnit] = []
    for at, kind in stamps:
        moved = at - 800_000 if at >= 990_000 else at
        placed += line.place(AccessUnit(tracks[kind][0], moved, moved, b"", True, False))
    assert line.jumps == 1
    for track, each in tracks.values():
        assert steps(unit.pts for unit in placed if unit.track == track and unit.pts is not None) == {each}


def test_jump_forward_is_kept() -> None:
    units = units_of(clip(60, audio="opus"))
    leap = 90_000 * 3600
    moved = [
        replace(unit, pts=unit.pts + leap, dts=unit.dts + leap)
        for unit in units[len(units) // 2 :]
        if unit.pts is not None and unit.dts is not None
    ]
    decoder = Decoder()
    items = decoded(units[: len(units) // 2] + moved, decoder)
    assert numbers(items) == list(range(60))
    assert max(steps(shown.pts for shown in pictures(items))) == leap + 3000
    assert decoder.counters.clock_jumps == 0


def test_one_damaged_stamp_moves_nothing() -> None:
    units = units_of(clip(30))
    units[10] = replace(units[10], pts=1 << 32, dts=1 << 32)
    decoder = Decoder()
    items = decoded(units, decoder)
    assert numbers(items) == list(range(30))
    assert steps(shown.pts for shown in pictures(items)) == {3000}
    assert decoder.counters.clock_jumps == 0


@pytest.mark.parametrize("hours", [1, -1])
def test_damaged_pts_beside_a_sound_dts_moves_no_picture(hours: int) -> None:
    units = units_of(clip(30, b_frames=2))
    stamps = [shown.pts for shown in pictures(decoded(units))]
    for index, unit in enumerate(units):
        assert unit.pts is not None
        damaged = replace(unit, pts=unit.pts + hours * 3600 * 90_000)
        items = decoded([*units[:index], damaged, *units[index + 1 :]])
        assert [shown.pts for shown in pictures(items)] == stamps
        assert numbers(items) == list(range(30))


@pytest.mark.parametrize("before_wrap_s", [0, 1, 1800], ids=["behind", "over", "before"])
def test_damaged_pts_is_seen_around_the_wrap(before_wrap_s: int) -> None:
    data = shifted(clip(60, b_frames=2), WRAP - before_wrap_s * 90_000)
    damaged = damaged_pts(data, 20, 3600 * 90_000)
    assert damaged != data
    items = decoded(units_of(damaged))
    assert numbers(items) == list(range(60))
    assert steps(shown.pts for shown in pictures(items)) == {3000}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([3000] * 8 + [0, -3000, -200_000, 2_000_000, -3_000_000, None])),
        max_size=60,
    )
)
@example([(False, 2_000_000), (True, 3000), (True, -200_000), (True, 3000), (False, -3_000_000)])
# Sound falls, then picture leaps ahead, then picture falls to where sound is: to follow it would be a fall of 22 s.
@example([(False, 3000), (True, 3000), (False, -3_000_000), (False, 2_000_000), (True, 2_000_000),
          (False, 3000), (True, 3000), (True, -3_000_000), (True, 3000)])  # fmt: skip
def test_a_time_line_keeps_every_unit_in_order_and_never_falls_far(moves: list[tuple[bool, int | None]]) -> None:
    tracks = {True: Track(0x100, "h264", "video"), False: AAC}
    at = {True: 0, False: 0}
    line = Timeline()
    given_in: dict[bool, list[bytes]] = {True: [], False: []}
    placed: list[AccessUnit] = []
    for index, (is_video, move) in enumerate(moves):
        stamp = None if move is None else at[is_video] + move
        at[is_video] = at[is_video] if stamp is None else stamp
        unit = AccessUnit(tracks[is_video], stamp, stamp, b"%d" % index, True, False)
        given_in[is_video].append(unit.data)
        placed += line.place(unit)
    placed += line.flush()
    for is_video, track in tracks.items():
        mine = [unit for unit in placed if unit.track == track]
        assert [unit.data for unit in mine] == given_in[is_video]
        stamps = [unit.pts for unit in mine if unit.pts is not None]
        assert all(after - before >= -22_500 for before, after in itertools.pairwise(stamps))


@pytest.mark.parametrize(
    ("source", "offset", "overlap", "first", "expected"),
    [
        (900_000, 0, 0, 990_000, 990_000),  # a pause is a pause
        (900_000, 5_000, 0, 990_000, 995_000),  # an offset of before holds
        (900_000, 0, 5_400_000, 720_000, 720_000),  # the segment from its start: nothing is moved
        (900_000, 0, 0, 0, 903_000),  # the source was restarted: the clock goes on
        (9_000_000, 70, 5_400_000, 0, 9_003_070),  # beyond any segment
    ],
)
def test_time_line_that_is_taken_up_again(source: int, offset: int, overlap: int, first: int, expected: int) -> None:
    timeline = Timeline()
    timeline.resume(source, offset, overlap)
    for track in (Track(0x100, "h264", "video"), AAC):
        (placed,) = timeline.place(AccessUnit(track, first, first, b"", True, False))
        assert placed.pts == expected
        (placed,) = timeline.place(AccessUnit(track, first + 3000, first + 3000, b"", True, False))
        assert placed.pts == expected + 3000


def test_clock_that_is_taken_up_again_counts_its_wraps() -> None:
    clock = Clock()
    clock.resume(3 * WRAP - 90_000)
    assert clock.unwrap(45_000) == 3 * WRAP + 45_000
