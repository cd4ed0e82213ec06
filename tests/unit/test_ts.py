"""Access units from transport streams: the same as libavformat's, at once, and whatever happens to the bytes."""

from __future__ import annotations

import io
import time

import av
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway_shim.media.clock import Clock
from gateway_shim.media.elementary import Adts, Opus, has_idr, opus_samples
from gateway_shim.media.mux import TsWriter
from gateway_shim.media.psi import program_tracks
from gateway_shim.media.ts import AccessUnit, Track, TsReader
from tests.fakes.media_clips import audio, clip, steps, units_of, video

VIDEO = 0x100
WRAP = 1 << 33
IDR = b"\x00\x00\x00\x01\x09\xf0\x00\x00\x00\x01\x65"
SLICE = b"\x00\x00\x00\x01\x09\xf0\x00\x00\x00\x01\x41"


def packet(pid: int, counter: int, payload: bytes, *, starts: bool = False, stuff: bool = True) -> bytes:
    """One transport packet; short payloads are padded by an adaptation field."""
    header = bytes([0x47, (0x40 if starts else 0) | pid >> 8, pid & 0xFF])
    missing = 184 - len(payload)
    if not missing:
        return header + bytes([0x10 | counter]) + payload
    assert stuff
    field = b"\x00" if missing == 1 else (bytes([missing - 1]) + b"\x00").ljust(missing, b"\xff")
    return header + bytes([0x30 | counter]) + field + payload


def pes(pts: int, data: bytes, *, declared: bool = False) -> bytes:
    """A video PES packet whose header says nothing but a presentation stamp."""
    whole = TsWriter(audio=False).video(pts, b"", keyframe=False)
    header = bytearray(whole[-14:])
    header[4:6] = (len(data) + 8 if declared else 0).to_bytes(2)
    return bytes(header) + data


def started(*, with_audio: bool = False) -> TsReader:
    reader = TsReader()
    assert reader.feed(TsWriter(audio=with_audio).tables()) == []
    return reader


def demuxed(data: bytes) -> dict[str, list[tuple[int | None, int | None, bytes]]]:
    """libavformat's units by kind of track."""
    found: dict[str, list[tuple[int | None, int | None, bytes]]] = {"video": [], "audio": []}
    with av.open(io.BytesIO(data), format="mpegts") as container:
        for unit in container.demux():
            if unit.size:
                found[unit.stream.type].append((unit.pts, unit.dts, bytes(unit)))
    return found


@pytest.mark.parametrize("sound", [None, "aac", "opus"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_units_are_those_of_libavformat(sound: str | None, b_frames: int) -> None:
    data = clip(60, audio=sound, b_frames=b_frames)
    units = units_of(data)
    reference = demuxed(data)
    assert [(unit.pts, unit.dts, unit.data) for unit in video(units)] == reference["video"]
    # libavformat puts the stamps of frames after the first of a PES packet by a parser, one tick off at times.
    assert [unit.data for unit in audio(units)] == [entry[2] for entry in reference["audio"]]
    for unit, (pts, _, _) in zip(audio(units), reference["audio"], strict=True):
        assert pts is not None
        assert unit.pts is not None
        assert abs(unit.pts - pts) <= 1
    assert [index for index, unit in enumerate(video(units)) if unit.keyframe] == [0, 30]
    assert not any(unit.discontinuity for unit in units)


def test_unit_is_out_with_its_last_byte() -> None:
    data = clip(60, width=640, height=360)
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    last_of_unit: list[int] = []
    for index, raw in enumerate(packets):
        if (raw[1] & 0x1F) << 8 | raw[2] == VIDEO:
            if raw[1] & 0x40:
                last_of_unit.append(index)
            last_of_unit[-1] = index
    reader = TsReader()
    out_at: list[int] = []
    for index, raw in enumerate(packets):
        out_at += [index] * len(reader.feed(raw[:-1]))
        assert len(out_at) == len([last for last in out_at if last < index])  # nothing before a packet is whole
        out_at += [index] * len(reader.feed(raw[-1:]))
    out_at += [len(packets)] * len(reader.end_segment())
    assert len(out_at) == 60
    late = [(out, last) for out, last in zip(out_at, last_of_unit, strict=True) if out != last]
    assert all(not packets[last][3] & 0x20 for _, last in late)  # only those that fill their last packet exactly
    assert len(late) <= 3


def test_one_byte_of_stuffing_ends_a_unit() -> None:
    reader = started()
    data = IDR + bytes(183 - 14 - len(IDR))
    [unit] = reader.feed(packet(VIDEO, 0, pes(7, data), starts=True))
    assert unit.data == data


def test_indicators_of_the_adaptation_field() -> None:
    reader = started()
    indicated = bytearray(packet(VIDEO, 0, pes(7, SLICE), starts=True))
    indicated[5] = 0x40  # random access: a recovery point that is no IDR picture
    [unit] = reader.feed(bytes(indicated))
    assert unit.keyframe
    indicated = bytearray(packet(VIDEO, 9, pes(8, SLICE), starts=True))
    indicated[5] = 0x80  # the counter is discontinuous on purpose
    [unit] = reader.feed(bytes(indicated))
    assert (unit.keyframe, unit.discontinuity, reader.counters.continuity_errors) == (False, False, 0)


def test_table_with_a_wrong_check_sum_is_not_believed() -> None:
    tables = bytearray(TsWriter(audio=True).tables())
    tables[188 + 20] ^= 1  # the PMT names another PID
    reader = TsReader()
    reader.feed(bytes(tables))
    assert reader.tracks == ()


def test_declared_length_ends_a_unit_that_fills_its_packet() -> None:
    reader = started()
    data = IDR + bytes(184 - 14 - len(IDR))
    [unit] = reader.feed(packet(VIDEO, 0, pes(7, data, declared=True), starts=True))
    assert (unit.pts, unit.dts, unit.data, unit.keyframe) == (7, 7, data, True)
    longer = data + bytes(2 * 184)
    assert reader.feed(packet(VIDEO, 1, pes(8, longer, declared=True)[:184], starts=True)) == []
    assert reader.feed(packet(VIDEO, 2, bytes(184))) == []
    [unit] = reader.feed(packet(VIDEO, 3, bytes(184)))
    assert unit.data == longer


def test_unit_that_fills_its_packet_waits_for_the_next_or_for_the_end() -> None:
    reader = started()
    data = SLICE + bytes(184 - 14 - len(SLICE))
    assert reader.feed(packet(VIDEO, 0, pes(7, data), starts=True)) == []
    [unit] = reader.feed(packet(VIDEO, 1, pes(8, data), starts=True))
    assert (unit.pts, unit.data, unit.keyframe) == (7, data, False)
    [unit] = reader.end_segment()
    assert (unit.pts, unit.discontinuity) == (8, False)


def test_segment_cut_inside_a_packet_drops_the_open_unit() -> None:
    reader = started()
    whole = packet(VIDEO, 0, pes(7, bytes(170)), starts=True)
    assert reader.feed(whole + packet(VIDEO, 1, bytes(184))[:100]) == []
    assert reader.end_segment() == []
    assert reader.counters.dropped_units == 1
    [unit] = reader.feed(packet(VIDEO, 0, pes(9, IDR), starts=True))
    assert unit.discontinuity


def test_header_over_two_packets() -> None:
    reader = started()
    whole = pes(7, IDR)
    assert reader.feed(packet(VIDEO, 0, whole[:5], starts=True)) == []
    [unit] = reader.feed(packet(VIDEO, 1, whole[5:]))
    assert (unit.pts, unit.data) == (7, IDR)


def test_muxer_that_stuffs_in_the_middle_is_recognised() -> None:
    reader = started()
    [cut_short] = reader.feed(packet(VIDEO, 0, pes(7, IDR), starts=True))
    assert cut_short.data == IDR
    assert reader.feed(packet(VIDEO, 1, b"tail")) == []
    assert reader.counters.dropped_units == 1
    assert reader.feed(packet(VIDEO, 2, pes(8, IDR), starts=True)) == []
    assert reader.feed(packet(VIDEO, 3, b"tail")) == []
    [unit] = reader.feed(packet(VIDEO, 4, pes(9, IDR), starts=True))
    assert (unit.pts, unit.data, unit.discontinuity) == (8, IDR + b"tail", True)


def test_missing_packet_costs_its_unit_and_marks_the_next() -> None:
    data = clip(60)
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    middle = next(
        index
        for index, raw in enumerate(packets[100:], 100)
        if raw[3] & 0x30 == 0x10 and not raw[1] & 0x40 and raw[2] == 0
    )
    reader = TsReader()
    units = video(units_of(b"".join(packets[:middle] + packets[middle + 1 :]), reader))
    assert len(units) == 59
    assert [unit.discontinuity for unit in units].count(True) == 1
    marked = next(index for index, unit in enumerate(units) if unit.discontinuity)
    assert units[marked].pts == units[marked - 1].pts + 6000  # type: ignore[operator]
    assert (reader.counters.continuity_errors, reader.counters.dropped_units) == (1, 1)


def test_packet_sent_twice_is_no_error() -> None:
    data = clip(30)
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    doubled = b"".join(raw + raw if (raw[1] & 0x1F, raw[2]) == (1, 0) else raw for raw in packets)
    reader = TsReader()
    assert units_of(doubled, reader) == units_of(data)
    assert reader.counters.continuity_errors == 0


def test_fresh_muxer_in_each_segment_is_no_error() -> None:
    reader = TsReader()
    pts = 0
    for _ in range(3):
        writer = TsWriter(audio=True)
        segment = writer.tables()
        for index in range(5):
            segment += writer.video(pts, (SLICE if index else IDR) + bytes(500), keyframe=not index)
            segment += writer.audio(pts, b"\xfc" + bytes(60))
            pts += 3000
        units = units_of(segment, reader)
        assert len(units) == 10
        assert not any(unit.discontinuity for unit in units)
    assert reader.counters.continuity_errors == 0


def test_gap_drops_what_is_open_and_marks_what_follows() -> None:
    reader = started(with_audio=True)
    reader.feed(packet(VIDEO, 0, pes(7, bytes(170)), starts=True) + b"\x47half a packet")
    reader.gap()
    [unit] = reader.feed(packet(VIDEO, 9, pes(8, IDR), starts=True))
    assert unit.discontinuity
    [unit] = reader.feed(packet(VIDEO, 10, pes(9, IDR), starts=True))
    assert not unit.discontinuity
    assert reader.counters.continuity_errors == 0


def test_tables_that_change_change_the_tracks() -> None:
    reader = TsReader()
    units_of(clip(10), reader)
    assert reader.tracks == (Track(0x100, "h264", "video"),)
    units = units_of(clip(10, audio="aac"), reader)
    assert reader.tracks == (Track(0x100, "h264", "video"), Track(0x101, "aac", "audio"))
    assert len(video(units)) == 10
    assert audio(units)
    units = units_of(clip(10, audio="opus"), reader)
    assert reader.tracks[1] == Track(0x101, "opus", "audio", 1)
    assert {unit.track for unit in audio(units)} == {reader.tracks[1]}
    assert not any(unit.discontinuity for unit in units)


def test_opus_in_surround_is_no_track() -> None:
    def entry(channels: int) -> bytes:
        return bytes([0x06, 0xE1, 0x01, 0xF0, 10, 5, 4]) + b"Opus" + bytes([0x7F, 2, 0x80, channels])

    head = bytes(7) + b"\xf0\x00"
    assert program_tracks(head + entry(1)) == (Track(0x101, "opus", "audio", 1),)
    assert program_tracks(head + entry(0)) == (Track(0x101, "opus", "audio", 2),)
    assert program_tracks(head + entry(6)) == ()
    assert program_tracks(head + entry(1)[:3]) == ()


def test_only_the_first_track_of_a_kind_is_read() -> None:
    output = io.BytesIO()
    with av.open(output, "w", format="mpegts") as container:
        tracks = [container.add_stream("aac", rate=48000) for _ in range(2)]
        for track in tracks:
            track.codec_context.layout = "mono"  # type: ignore[union-attr]
        for _ in range(10):
            for track in tracks:
                frame = av.AudioFrame("fltp", "mono", 1024)
                frame.planes[0].update(bytes(4096))
                frame.sample_rate = 48000
                container.mux(track.encode(frame))  # type: ignore[union-attr, arg-type]
        for track in tracks:
            container.mux(track.encode(None))  # type: ignore[union-attr]
    reader = TsReader()
    units = units_of(output.getvalue(), reader)
    assert len(reader.tracks) == 2
    assert {unit.track for unit in units} == {reader.tracks[0]}


def test_packets_are_found_again_after_lost_and_inserted_bytes() -> None:
    data = clip(60)
    reader = TsReader()
    cut = data[: 188 * 200 + 50] + data[188 * 203 + 11 :]
    units = video(units_of(b"\x00noise" + cut[: 188 * 150] + b"GG" + cut[188 * 150 :], reader))
    assert reader.counters.sync_losses == 3
    assert len(units) >= 54
    whole = {unit.data for unit in video(units_of(data))}
    assert all(unit.data in whole for unit in units)  # nothing damaged gets through


def test_bytes_inserted_within_a_packet_spoil_its_unit() -> None:
    """The counters of the packets around go on as if nothing had been."""
    writer = TsWriter(audio=False)
    units = [writer.video(3000 * index, IDR + bytes([index]) * 2000, keyframe=True) for index in range(4)]
    spoilt = units[1][:400] + b"inserted" + units[1][400:]
    reader = started()
    given = units_of(units[0] + spoilt + units[2] + units[3], reader)
    assert [(unit.pts, unit.discontinuity) for unit in given] == [(0, False), (6000, True), (9000, False)]


def test_loss_of_sync_just_before_the_end() -> None:
    reader = started()
    assert reader.feed(b"\x00" * 30 + packet(VIDEO, 0, pes(7, IDR), starts=True)) == []
    [unit] = reader.end_segment()
    assert unit.data == IDR


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["flip", "delete", "insert", "repeat"]),
            st.integers(0, 60_000),
            st.binary(min_size=1, max_size=400),
        ),
        max_size=8,
    ),
    st.lists(st.integers(1, 3000), min_size=1, max_size=20),
    st.sampled_from([None, "aac", "opus"]),
)
def test_any_bytes_in_any_pieces_give_the_same_units(
    damage: list[tuple[str, int, bytes]], sizes: list[int], sound: str | None
) -> None:
    data = bytearray(clip(10, audio=sound))
    for kind, position, extra in damage:
        at = position % len(data)
        if kind == "flip":
            data[at] ^= extra[0] or 1
        elif kind == "delete":
            del data[at : at + len(extra)]
        elif kind == "insert":
            data[at:at] = extra
        else:
            data[at:at] = data[at : at + len(extra)]
    whole, pieces = TsReader(), TsReader()
    expected = whole.feed(bytes(data)) + whole.end_segment()
    units: list[AccessUnit] = []
    at = index = 0
    while at < len(data):
        size = sizes[index % len(sizes)]
        units += pieces.feed(bytes(data[at : at + size]))
        at += size
        index += 1
    units += pieces.end_segment()
    assert units == expected
    assert pieces.counters == whole.counters


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=2000), max_size=5))
def test_noise_raises_nothing(pieces: list[bytes]) -> None:
    reader = TsReader()
    for piece in pieces:
        reader.feed(piece)
    reader.end_segment()
    reader.gap()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600), st.sampled_from(["tables", "video", "audio"]))
def test_noise_inside_packets_raises_nothing(noise: bytes, where: str) -> None:
    reader = started(with_audio=True)
    pid = {"tables": 0x1000, "video": 0x100, "audio": 0x101}[where]
    for counter, at in enumerate(range(0, len(noise), 184)):
        reader.feed(packet(pid, counter, noise[at : at + 184], starts=not at))
    reader.end_segment()


def test_stamps_go_on_over_33_bits_on_both_tracks() -> None:
    writer, reader = TsWriter(audio=True), TsReader()
    data = writer.tables()
    first = WRAP - 9000
    for index in range(10):
        data += writer.video(first + 3000 * index, IDR, keyframe=True)
        data += writer.audio(first + 3000 * index - 4000, b"\xfc\x00")  # still before the edge when video is over it
    units = reader.feed(data)
    assert [unit.pts for unit in video(units)] == [first + 3000 * index for index in range(10)]
    assert [unit.pts for unit in audio(units)] == [first + 3000 * index - 4000 for index in range(10)]


def test_a_jump_is_no_wrap() -> None:
    clock = Clock()
    assert clock.unwrap(WRAP - 90_000 * 3600) == WRAP - 90_000 * 3600
    assert clock.unwrap(0) == 0  # the source was restarted an hour before its edge
    assert clock.unwrap(3000) == 3000
    assert clock.unwrap(WRAP // 2 + 5) == WRAP // 2 + 5  # damaged
    assert clock.unwrap(6000) == 6000
    assert clock.unwrap(WRAP - 90_000 * 3600) == WRAP - 90_000 * 3600


def test_wrap_after_a_pause() -> None:
    clock = Clock()
    clock.unwrap(WRAP - 100)
    assert clock.unwrap(30 * 90_000) == WRAP + 30 * 90_000
    assert clock.unwrap(WRAP - 50) == WRAP - 50  # a late unit of another track
    assert clock.unwrap(31 * 90_000) == WRAP + 31 * 90_000


def test_several_opus_packets_in_one_pes() -> None:
    first, second, third = b"\xfc" + b"a" * 300, b"\x78bb", b"\xfb\x02cc"
    payload = b"\x7f\xe0\xff" + bytes([301 - 255]) + first
    payload += b"\x7f\xf0\x03\x01\x38" + second  # with a start trim
    payload += b"\x7f\xe4\x04\x02xx" + third  # with a control extension
    assert Opus().split(payload) == [(0, first), (1800, second), (1800 + opus_samples(second) * 15 // 8, third)]
    assert [opus_samples(part) for part in (first, second, third)] == [960, 960, 1920]
    assert Opus().split(payload[:200]) == []  # its size is more than there is


def adts(body: bytes) -> bytes:
    """A frame of AAC-LC, 44100 Hz, stereo."""
    size = len(body) + 7
    return bytes([0xFF, 0xF1, 0x50, 0x80 | size >> 11, size >> 3 & 0xFF, (size & 7) << 5 | 0x1F, 0xFC]) + body


def test_adts_frames_in_one_pes_and_over_its_end() -> None:
    frames = [adts(bytes([index]) * 50) for index in range(4)]
    splitter = Adts()
    data = b"".join(frames)
    assert splitter.split(data[:70]) == [(0, frames[0])]
    # The stamp belongs to the first frame that begins here; the one carried over is a frame earlier.
    assert splitter.split(data[70:]) == [(-2090, frames[1]), (0, frames[2]), (2090, frames[3])]
    splitter.split(data[:70])
    splitter.reset()
    assert splitter.split(data[70:]) == [(0, frames[2]), (2090, frames[3])]


def test_idr_is_seen_behind_other_nals() -> None:
    assert has_idr(b"\x00\x00\x01\x09\xf0\x00\x00\x01\x67x\x00\x00\x01\x68y\x00\x00\x01\x06z\x00\x00\x01\x65w")
    assert not has_idr(b"\x00\x00\x01\x09\xf0\x00\x00\x01\x41\x00\x00\x01\x65")
    assert not has_idr(b"\x00\x00\x01")
    assert not has_idr(b"")


def test_unit_that_never_ends_is_given_up() -> None:
    reader = started()
    reader.feed(packet(VIDEO, 0, pes(7, bytes(170)), starts=True))
    run = b"".join(packet(VIDEO, counter & 15, bytes(184)) for counter in range(1, 1025))
    continued = b"".join(packet(VIDEO, counter & 15, bytes(184)) for counter in range(1025, 1025 + 1024))
    for _ in range(60):
        assert reader.feed(run[: 188 * 1024]) == []
        run = continued
    assert reader.counters.dropped_units == 1
    [unit] = reader.feed(packet(VIDEO, 1, pes(8, IDR), starts=True))
    assert unit.discontinuity


def test_reading_is_quick_enough_for_many_streams() -> None:
    """70 us of CPU per frame at 3 Mbit/s is the goal (hot-path.md section 5); ten times that is a mistake."""
    writer = TsWriter(audio=False)
    data = writer.tables() + b"".join(
        writer.video(3000 * index, IDR + bytes(12_500), keyframe=False) for index in range(100)
    )
    best = float("inf")
    for _ in range(3):
        reader = TsReader()
        began = time.thread_time()
        units = reader.feed(data)
        best = min(best, time.thread_time() - began)
        assert len(units) == 100
    assert best / 100 < 700e-6
    assert steps(unit.pts for unit in units if unit.pts is not None) == {3000}
