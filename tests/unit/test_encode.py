"""Encoding: the output contract of protocol.md 2.3, byte by byte and through libavformat."""

from __future__ import annotations

import io
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest

from gateway_shim import keys
from gateway_shim.localnet.numbered import luma_of, picture, read_number
from gateway_shim.localnet.numbered import sound as sound_samples
from gateway_shim.media.bit_rate import default_bit_rate
from gateway_shim.media.colour import Colour
from gateway_shim.media.encode import Chunk, Encoder
from gateway_shim.media.fit import Fitter, cover
from gateway_shim.media.planes import frame_of, plane_views, planes_of
from gateway_shim.media.settings import MAX_SIDE, MIN_SIDE, EncoderSettings
from gateway_shim.media.ts import TsReader
from tests.fakes.media_clips import audio, bursts, decoded, numbers, pictures, sounds, steps, units_of, video

WIDTH, HEIGHT = 320, 240


def encoder(*, sound: bool = False, **settings: object) -> Encoder:
    return Encoder(EncoderSettings(WIDTH, HEIGHT, Fraction(30), audio=sound, **settings))  # type: ignore[arg-type]


def block(first_sample: int, samples: int = 960) -> av.AudioFrame:
    """Stereo sound with a burst at each second."""
    mono = sound_samples(first_sample, samples, Fraction(30))
    frame = av.AudioFrame.from_ndarray(np.repeat(mono, 2)[None], "s16", "stereo")
    frame.sample_rate = 48_000
    return frame


def joined(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.data for chunk in chunks)


def segments_of(chunks: list[Chunk]) -> list[bytes]:
    segments: list[bytes] = []
    for chunk in chunks:
        if chunk.starts_segment:
            segments.append(b"")
        segments[-1] += chunk.data
    return segments


def clip(frames: int = 150, *, sound: bool = True, first: int = 0) -> list[Chunk]:
    """Numbered pictures from pts ``first`` on, with sound in blocks of 20 ms."""
    encode = encoder(sound=sound)
    chunks = []
    written = 0
    for number in range(frames):
        chunks += encode.video(picture(number, WIDTH, HEIGHT), first + number * 3000)
        while sound and written * 30 < (number + 1) * 48_000:
            chunks += encode.audio(block(written), first + written * 15 // 8)
            written += 960
    return chunks + encode.flush()


def test_every_picture_has_its_stamp_and_its_place() -> None:
    units = units_of(joined(clip()))
    assert [(unit.pts, unit.dts) for unit in video(units)] == [
        (number * 3000, number * 3000) for number in range(150)
    ]
    assert numbers(decoded(units)) == list(range(150))


def test_decoder_s_own_frames_are_encoded_however_long_they_wait() -> None:
    # As many as wait for the graph at most; the decoder goes on meanwhile and keeps them as references.
    waiting = pictures(decoded(units_of(joined(clip(60, sound=False)))))
    again = encoder()
    chunks = [chunk for shown in waiting for chunk in again.video(shown.frame, shown.pts)]
    units = units_of(joined(chunks + again.flush()))
    assert [unit.pts for unit in units] == [number * 3000 for number in range(60)]
    assert numbers(decoded(units)) == list(range(60))
    assert [read_number(luma_of(shown.frame)) for shown in waiting] == list(range(60)), "written to"


def test_one_frame_may_be_shown_again_and_again() -> None:
    encode, repeated = encoder(segment_s=1.0), frame_of(planes_of(picture(7, WIDTH, HEIGHT)), WIDTH, HEIGHT)
    chunks = []
    for number in range(40):
        chunks += encode.video(repeated if number % 2 else picture(number, WIDTH, HEIGHT), number * 3000)
    units = units_of(joined(chunks + encode.flush()))
    assert [unit.pts for unit in units] == [number * 3000 for number in range(40)]
    assert numbers(decoded(units)) == [7 if number % 2 else number for number in range(40)]


def test_bytes_of_a_unit_come_in_its_call() -> None:
    encode, reader = encoder(sound=True), TsReader()
    for number in range(70):
        [chunk] = encode.video(picture(number, WIDTH, HEIGHT), number * 3000)
        units = reader.feed(chunk.data)
        assert [unit.pts for unit in units] == [number * 3000]  # with sound declared that has not come yet
        assert chunk.starts_segment == (number in (0, 60))
        assert len(chunk.data) % 188 == 0
    [chunk] = encode.audio(block(0), 70 * 3000)
    [unit] = reader.feed(chunk.data)
    assert (unit.track.codec, unit.track.channels) == ("opus", 2)


def test_each_segment_begins_with_tables_and_idr() -> None:
    segments = segments_of(clip())
    assert len(segments) == 3
    for index, segment in enumerate(segments):
        pids = [(segment[at + 1] & 0x1F) << 8 | segment[at + 2] for at in (0, 188, 376)]
        assert pids == [0, 0x1000, 0x100]
        # A reader that knows nothing can begin at any segment.
        units = units_of(segment)
        first = units[0]
        assert (first.track.kind, first.keyframe, first.pts) == ("video", True, index * 180_000)
        assert numbers(decoded(units)) == list(range(index * 60, min(index * 60 + 60, 150)))


def test_pictures_are_marked_for_other_readers() -> None:
    segments = segments_of(clip(70, sound=False))
    for segment in segments:
        assert segment[376 + 3] & 0x20
        assert segment[376 + 5] == 0x50  # random access, program clock
        clock = int.from_bytes(segment[376 + 6 : 376 + 12]) >> 15
        [first, *rest] = units_of(segment)
        assert first.pts is not None
        assert clock == max(first.pts - 9000, 0)
        assert all(unit.data.startswith(b"\x00\x00\x00\x01\x09") for unit in [first, *rest])  # access unit delimiter


def test_tables_repeat_within_a_segment() -> None:
    segment = segments_of(clip())[0]
    at_packet = [
        at // 188 for at in range(0, len(segment), 188) if segment[at + 1 : at + 3] in (b"\x40\x00", b"\x50\x00")
    ]
    assert len(at_packet) == 8  # both, every half second
    middle = segment[at_packet[2] * 188 :]
    reader = TsReader()
    units_of(middle, reader)
    assert [track.codec for track in reader.tracks] == ["h264", "opus"]


def test_continuity_counters_go_on_in_and_over_segments() -> None:
    data = joined(clip())
    following: dict[int, int] = {}
    for at in range(0, len(data), 188):
        assert data[at] == 0x47
        pid = (data[at + 1] & 0x1F) << 8 | data[at + 2]
        counter = data[at + 3] & 15
        assert following.setdefault(pid, counter) == counter
        following[pid] = (counter + 1) & 15
    assert set(following) == {0, 0x1000, 0x100, 0x101}
    reader = TsReader()
    reader.feed(data)
    assert (reader.counters.continuity_errors, reader.counters.dropped_units) == (0, 0)


def test_libavformat_reads_the_segments_as_one_stream_without_a_word() -> None:
    data = joined(clip())
    av.logging.set_level(av.logging.VERBOSE)
    try:
        with av.logging.Capture() as messages, av.open(io.BytesIO(data), format="mpegts") as container:
            shown = [frame for frame in container.decode() if isinstance(frame, av.VideoFrame)]
            codecs = [stream.codec_context.name for stream in container.streams]
    finally:
        av.logging.set_level(None)
    assert [read_number(luma_of(frame)) for frame in shown] == list(range(150))
    assert [frame.pts for frame in shown] == [number * 3000 for number in range(150)]
    assert codecs == ["h264", "opus"]
    assert [message for message in messages if message[0] <= av.logging.WARNING] == []


def test_no_b_frames_and_no_other_reference_than_the_past() -> None:
    data = joined(clip(sound=False))
    with av.open(io.BytesIO(data), format="mpegts") as container:
        kinds = [frame.pict_type for frame in container.decode(video=0)]
    assert set(kinds) == {1, 2}  # I, P


def test_sound_stays_with_its_picture() -> None:
    items = decoded(units_of(joined(clip(first=777))))
    begun = bursts(items)
    shown = pictures(items)
    assert len(begun) >= 5
    for index, at in enumerate(begun[:5]):
        late = at - shown[index * 30].pts / 90_000
        assert (
            abs(late - (0.0065 if index == 0 else 0)) < 0.001
        )  # the first packet's delay is cut off the first burst
    assert steps(item.pts for item in sounds(items)) == {1800}


def test_pictures_behind_the_last_are_dropped() -> None:
    encode = encoder()
    assert encode.video(picture(0, WIDTH, HEIGHT), 5000)
    assert encode.video(picture(1, WIDTH, HEIGHT), 5000) == []
    assert encode.video(picture(2, WIDTH, HEIGHT), 4000) == []
    [chunk] = encode.video(picture(3, WIDTH, HEIGHT), 5001)
    assert (encode.counters.pictures, encode.counters.dropped_pictures) == (2, 2)
    assert not chunk.starts_segment


def test_one_picture_may_be_shown_again() -> None:
    """A repeated frame still carries the type it was decoded with, and our own order for a key frame."""
    encode = encoder()
    frame = picture(7, WIDTH, HEIGHT)
    chunks = [chunk for index in range(5) for chunk in encode.video(frame, index * 3000)]
    units = units_of(joined(chunks))
    assert [unit.keyframe for unit in units] == [True, False, False, False, False]
    assert numbers(decoded(units)) == [7] * 5


def test_frame_types_of_the_decoder_are_no_orders() -> None:
    source = [item.frame for item in pictures(decoded(units_of(joined(clip(10, sound=False)))))]
    encode = encoder()
    chunks = []
    for index, frame in enumerate(source):
        frame.pict_type = 1  # as every frame of an all-intra source has
        chunks += encode.video(frame, index * 3000)
    assert [unit.keyframe for unit in units_of(joined(chunks))] == [True] + [False] * 9


def test_stamps_far_from_zero_and_over_the_wrap() -> None:
    first = (1 << 33) - 30 * 3000
    units = units_of(joined(clip(90, first=first)))
    assert [unit.pts for unit in video(units)] == [first + number * 3000 for number in range(90)]
    assert steps(unit.pts for unit in audio(units) if unit.pts is not None) == {1800}


def test_jump_forward_begins_a_segment() -> None:
    encode = encoder()
    starts = []
    for pts in (0, 3000, 90_000 * 60, 90_000 * 60 + 3000, 90_000 * 62):
        [chunk] = encode.video(picture(0, WIDTH, HEIGHT), pts)
        starts.append(chunk.starts_segment)
    assert starts == [True, False, True, False, True]


def test_sound_before_the_first_picture_is_dropped_and_the_rest_waits() -> None:
    encode = encoder(sound=True)
    for index in range(30):
        assert encode.audio(block(index * 960), index * 1800) == []
    chunks = encode.video(picture(0, WIDTH, HEIGHT), 20 * 1800 + 15 * 8)  # within a block
    assert chunks[0].starts_segment
    units = units_of(joined(chunks))
    assert units[0].track.kind == "video"
    first = audio(units)[0]
    assert first.pts == 20 * 1800 + 15 * 8  # a packet begins with Opus' own delay of 312 samples
    assert len(audio(units)) == 9
    assert encode.counters.dropped_samples == 20 * 960 + 64 + 312


def test_sound_is_held_for_two_seconds_at_most() -> None:
    encode = encoder(sound=True)
    for index in range(150):
        assert encode.audio(block(index * 960), index * 1800) == []
    assert encode.counters.dropped_sounds == 50
    chunks = encode.video(picture(0, WIDTH, HEIGHT), 0)
    assert len(audio(units_of(joined(chunks)))) == 100


def test_late_sound_comes_in_on_its_own_time() -> None:
    encode = encoder(sound=True)
    chunks = [chunk for number in range(90) for chunk in encode.video(picture(number, WIDTH, HEIGHT), number * 3000)]
    written = 48_000
    while written < 3 * 48_000:
        chunks += encode.audio(block(written), written * 15 // 8)
        written += 960
    items = decoded(units_of(joined(chunks)))
    assert sounds(items)[0].pts == 90_000 - 585
    assert [round(at, 2) for at in bursts(items)] == [1.0, 2.0]


def sent(stamps: list[tuple[int, int]]) -> tuple[list[int], Encoder]:
    """Output stamps of sound given as (pts, samples), both counted from 0.1 s after the first picture."""
    encode = encoder(sound=True)
    chunks = encode.video(picture(0, WIDTH, HEIGHT), 0)
    for pts, samples in stamps:
        chunks += encode.audio(block(0, samples), 9000 + pts)
    units = audio(units_of(joined(chunks)))
    return [unit.pts + 585 - 9000 for unit in units if unit.pts is not None], encode


def test_gap_in_sound_is_kept_exactly() -> None:
    stamps, _ = sent([(0, 1024), (1920, 1024), (95_000, 1024), (96_920, 1024)])
    # 2048 samples are two packets and an eighth, which silence fills up.
    assert stamps == [0, 1800, 3600, 95_000, 96_800]


def test_short_gap_in_sound_is_silence() -> None:
    stamps, _ = sent([(0, 960), (1800 + 1200, 960), (4800, 960), (6600, 480)])
    assert stamps == [0, 1800, 3600, 5400]  # 3360 samples and 640 of silence


def test_overlapping_sound_is_cut() -> None:
    stamps, encode = sent([(0, 960), (0, 960), (900, 960), (2700, 960)])
    assert stamps == [0, 1800]
    assert encode.counters.dropped_samples == 960 + 480


def test_stamps_of_sound_always_increase() -> None:
    generator = np.random.default_rng(5)
    pts = 0
    given = []
    for _ in range(300):
        given.append((pts, 960))
        pts = max(0, pts + int(generator.choice([1800, 1800, 1790, 1815, 0, -5000, 2500, 3700, 9000])))
    stamps, _ = sent(given)
    assert stamps == sorted(set(stamps))
    assert all(after - before >= 1800 for before, after in pairwise(stamps))


def test_without_a_track_sound_is_dropped() -> None:
    encode = encoder()
    chunks = encode.video(picture(0, WIDTH, HEIGHT), 0)
    assert encode.audio(block(0), 0) == []
    assert encode.counters.dropped_sounds == 1
    reader = TsReader()
    units_of(joined(chunks), reader)
    assert [track.codec for track in reader.tracks] == ["h264"]


def test_sound_of_another_format_is_refused() -> None:
    encode = encoder(sound=True)
    encode.video(picture(0, WIDTH, HEIGHT), 0)
    frame = av.AudioFrame("fltp", "stereo", 960)
    frame.sample_rate = 48_000
    with pytest.raises(ValueError, match="fltp"):
        encode.audio(frame, 0)


@pytest.mark.parametrize("colour", [Colour("bt601"), Colour("bt709"), Colour("bt601", True), Colour("bt709", True)])
def test_colour_is_written_into_the_stream(colour: Colour) -> None:
    encode = encoder(colour=colour)
    data = joined(encode.video(picture(0, WIDTH, HEIGHT), 0))
    [shown] = pictures(decoded(units_of(data)))
    assert shown.colour == colour
    assert abs(luma_of(shown.frame).astype(int) - luma_of(picture(0, WIDTH, HEIGHT))).mean() < 4  # no conversion


@pytest.mark.parametrize(
    ("width", "height"), [(640, 240), (320, 480), (1280, 720), (160, 120), (318, 242), (854, 480)]
)
def test_other_sizes_cover_the_output(width: int, height: int) -> None:
    fitted = Fitter(WIDTH, HEIGHT, Colour()).fit(picture(5, width, height))
    assert (fitted.width, fitted.height, fitted.format.name) == (WIDTH, HEIGHT, "yuv420p")
    # The middle stays in the middle and nothing is squeezed: a bright square comes out as a square.
    source = av.VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 128, np.uint8), "yuv420p")
    luma = luma_of(source)
    luma[:] = 16
    side = min(width, height) // 4
    luma[height // 2 - side // 2 : height // 2 + side // 2, width // 2 - side // 2 : width // 2 + side // 2] = 235
    bright = luma_of(Fitter(WIDTH, HEIGHT, Colour()).fit(source)) > 128
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    assert abs(len(rows) - len(columns)) <= 3
    assert abs(rows.mean() - HEIGHT / 2) <= 2
    assert abs(columns.mean() - WIDTH / 2) <= 2
    assert len(rows) == pytest.approx(side * max(WIDTH / width, HEIGHT / height), abs=3)


def test_picture_size_never_changes() -> None:
    encode = encoder()
    chunks = []
    for index, size in enumerate([(320, 240), (640, 480), (640, 480), (240, 320), (320, 240)]):
        chunks += encode.video(picture(index, *size), index * 3000)
    shown = pictures(decoded(units_of(joined(chunks))))
    assert {(item.width, item.height) for item in shown} == {(WIDTH, HEIGHT)}
    assert [numbers([item])[0] for item in shown if item.pts != 9000] == [0, 1, 2, 4]
    assert encode.counters.scaled_pictures == 3


def test_other_formats_keep_their_range() -> None:
    source = picture(3, WIDTH, HEIGHT)
    full = source.reformat(format="yuvj420p", src_color_range=2, dst_color_range=2, threads=1)
    fitted = Fitter(WIDTH, HEIGHT, Colour(full_range=True)).fit(full)
    assert fitted.format.name == "yuv420p"
    assert np.array_equal(luma_of(fitted), luma_of(source))


#: The same red in each system, as levels of Y, Cb and Cr: BT.601 and BT.709 section 3, limited and full range.
REDS = {
    Colour(): (81, 90, 240),
    Colour("bt709"): (63, 102, 240),
    Colour(full_range=True): (76, 85, 255),
    Colour("bt709", full_range=True): (54, 99, 255),
}


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (WIDTH // 2, HEIGHT), (16, 4096)])
@pytest.mark.parametrize("ours", REDS)
@pytest.mark.parametrize("theirs", REDS)
def test_pictures_of_another_colour_mean_the_same_afterwards(
    ours: Colour, theirs: Colour, size: tuple[int, int]
) -> None:
    """A source may switch to another camera; the engine's session and the encoder have one colour for good."""
    width, height = size
    source = av.VideoFrame.from_ndarray(np.empty((height * 3 // 2, width), np.uint8), "yuv420p")
    for plane, level in zip(plane_views(source), REDS[theirs], strict=True):
        plane[:] = level
    fitter = Fitter(WIDTH, HEIGHT, ours)
    for _ in range(2):
        fitted = fitter.fit(source, theirs)
        levels = [float(plane.mean()) for plane in plane_views(fitted)]
        assert levels == pytest.approx(REDS[ours], abs=2.5)
    assert (fitter.fit(source, theirs) is source) == (size == (WIDTH, HEIGHT) and ours == theirs)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((1280, 720), (512, 512), (912, 512)),
        ((720, 1280), (512, 512), (512, 912)),
        ((512, 512), (512, 512), (512, 512)),
        ((3, 2), (512, 288), (512, 342)),
    ],
)
def test_cover(source: tuple[int, int], target: tuple[int, int], expected: tuple[int, int]) -> None:
    assert cover(*source, *target) == expected


@pytest.mark.parametrize("size", [(16, 4096), (16, 8192), (8192, 16), (8190, 18), (2, 8192), (320, 4000)])
@pytest.mark.parametrize("target", [(1280, 720), (16, 16), (16, 720), (4096, 16)])
def test_pictures_of_extreme_shape_are_scaled_too(size: tuple[int, int], target: tuple[int, int]) -> None:
    fitted = Fitter(*target, Colour()).fit(grey_with_white_middle(*size))
    assert (fitted.width, fitted.height, fitted.format.name) == (*target, "yuv420p")
    luma = luma_of(fitted)
    assert luma[target[1] // 2, target[0] // 2] > 200, "the middle is what is shown"


@pytest.mark.parametrize("pixel_format", ["yuv422p", "yuv444p"])
def test_pictures_of_extreme_shape_in_other_formats(pixel_format: str) -> None:
    source = grey_with_white_middle(16, 4096).reformat(format=pixel_format, threads=1)
    fitted = Fitter(WIDTH, HEIGHT, Colour()).fit(source)
    assert (fitted.width, fitted.height, fitted.format.name) == (WIDTH, HEIGHT, "yuv420p")


def grey_with_white_middle(width: int, height: int) -> av.VideoFrame:
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane in plane_views(frame):
        plane[:] = 128
    luma_of(frame)[height * 3 // 8 : -(-height * 5 // 8), width * 3 // 8 : -(-width * 5 // 8)] = 235
    return frame


def test_bit_rate_follows_size_and_rate() -> None:
    assert default_bit_rate(512, 512, Fraction(30)) == 1_500_000
    assert 2_800_000 < default_bit_rate(1280, 720, None) < 3_400_000
    assert default_bit_rate(1280, 720, Fraction(60)) > default_bit_rate(1280, 720, Fraction(30))


def test_bit_rate_is_kept() -> None:
    encode = Encoder(EncoderSettings(WIDTH, HEIGHT, Fraction(30), bit_rate=400_000, audio=False))
    noise = np.random.default_rng(3)
    size = 0
    for number in range(150):
        planes = noise.integers(0, 256, (HEIGHT * 3 // 2, WIDTH), np.uint8)  # cannot be coded in so few bits
        frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
        size += sum(len(chunk.data) for chunk in encode.video(frame, number * 3000))
    assert size * 8 / 5 < 1_500_000


def test_variable_frame_rate_keeps_its_stamps() -> None:
    encode = Encoder(EncoderSettings(WIDTH, HEIGHT, None, audio=False))
    stamps = np.cumsum(np.random.default_rng(2).integers(1, 20_000, 60)).tolist()
    chunks = [chunk for index, pts in enumerate(stamps) for chunk in encode.video(picture(index, WIDTH, HEIGHT), pts)]
    items = decoded(units_of(joined(chunks)))
    assert [item.pts for item in pictures(items)] == stamps
    assert numbers(items) == list(range(60))


@pytest.mark.parametrize(("width", "height"), [(321, 240), (320, 241), (0, 240), (8, 8), (20_000, 16)])
def test_sizes_that_cannot_be_encoded_are_refused(width: int, height: int) -> None:
    with pytest.raises(ValueError, match="even"):
        EncoderSettings(width, height)


@pytest.mark.parametrize(("width", "height"), [(MIN_SIDE, MIN_SIDE), (MAX_SIDE, MIN_SIDE), (MIN_SIDE, MAX_SIDE)])
def test_sizes_at_the_limits_are_encoded(width: int, height: int) -> None:
    encode = Encoder(EncoderSettings(width, height, Fraction(30), audio=False))
    assert encode.video(av.VideoFrame(width, height, "yuv420p"), 0)
    assert (MIN_SIDE, MAX_SIDE) == (keys.MIN_SIDE, keys.MAX_SIDE), "what may be asked for"


def test_a_closed_encoder_says_so() -> None:
    encode = encoder(sound=True)
    encode.video(picture(0, WIDTH, HEIGHT), 0)
    encode.flush()
    encode.close()
    assert encode.flush() == []
    with pytest.raises(ValueError, match="closed"):
        encode.video(picture(1, WIDTH, HEIGHT), 3000)
    with pytest.raises(ValueError, match="closed"):
        encode.audio(block(0), 3000)


def test_nothing_in_nothing_out() -> None:
    encode = encoder(sound=True)
    encode.audio(block(0), 0)
    assert encode.flush() == []
