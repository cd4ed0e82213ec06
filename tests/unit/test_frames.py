"""Messages with pictures, by hand: byte for byte what the generated code writes, and read as it reads."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from proto import engine_pb2 as pb
from proto.fields import MAX_ITEMS, SMALL_BYTES, Malformed, Planes
from proto.frames import Frame, FrameBatch, encode_request, parse_request
from proto.results import FrameResult, Picture, Results, encode_response, parse_response, result_of


@pytest.fixture(autouse=True, scope="module", params=[0, SMALL_BYTES], ids=["by hand", "short by generated"])
def small_bytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most messages here are short; they are to be written and read by hand as well."""
    with (
        mock.patch("proto.frames.SMALL_BYTES", request.param),
        mock.patch("proto.results.SMALL_BYTES", request.param),
    ):
        yield


uint32 = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
uint64 = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))
int64 = st.one_of(st.integers(-300, 300), st.integers(-(2**63), 2**63 - 1))
planes = st.one_of(st.binary(max_size=300), st.just(bytes(70_000)))

frames = st.builds(pb.Frame, frame_id=uint64, pts=int64, planes=planes, slot=uint32, age_ms=uint32)
pictures = st.builds(pb.Picture, planes=planes, slot=uint32, width=uint32, height=uint32)
drops = st.builds(pb.Dropped, reason=st.integers(0, 9))
faults = st.builds(pb.Fault, code=st.text(max_size=9), message=st.text(max_size=200), version=uint64)
numbers = {
    "frame_id": uint64,
    "pts": int64,
    "version": uint64,
    "graph_us": uint32,
    "waiting_us": uint32,
    "convert_us": uint32,
}
results = st.one_of(
    st.builds(pb.FrameResult, **numbers),
    st.builds(pb.FrameResult, picture=pictures, **numbers),
    st.builds(pb.FrameResult, dropped=drops, **numbers),
    st.builds(pb.FrameResult, failed=faults, **numbers),
)
requests = st.builds(
    pb.ProcessRequest,
    frames=st.builds(pb.FrameBatch, frames=st.lists(frames, max_size=4), released_slots=st.lists(uint32, max_size=5)),
)
responses = st.builds(
    pb.ProcessResponse,
    results=st.builds(pb.ResultBatch, results=st.lists(results, max_size=4)),
    credits=uint32,
)


def light_request(message: pb.ProcessRequest) -> FrameBatch:
    return FrameBatch(
        [Frame(one.frame_id, one.pts, one.planes, one.slot, one.age_ms) for one in message.frames.frames],
        list(message.frames.released_slots),
    )


def light_response(message: pb.ProcessResponse) -> Results:
    return Results([result_of(one) for one in message.results.results], message.credits)


def generated_request(message: FrameBatch | pb.ProcessRequest) -> pb.ProcessRequest:
    """What was read, as a message of the generated code."""
    if isinstance(message, pb.ProcessRequest):
        return message
    made = [
        pb.Frame(frame_id=one.frame_id, pts=one.pts, planes=joined(one.planes), slot=one.slot, age_ms=one.age_ms)
        for one in message.frames
    ]
    return pb.ProcessRequest(frames=pb.FrameBatch(frames=made, released_slots=message.released_slots))


def generated_response(message: Results | pb.ProcessResponse) -> pb.ProcessResponse:
    if isinstance(message, pb.ProcessResponse):
        return message
    made = []
    for one in message.results:
        result = pb.FrameResult(
            frame_id=one.frame_id,
            pts=one.pts,
            dropped=one.dropped,
            version=one.version,
            graph_us=one.graph_us,
            waiting_us=one.waiting_us,
            convert_us=one.convert_us,
        )
        if one.picture is not None:
            picture = one.picture
            result.picture.SetInParent()
            result.picture.planes = joined(picture.planes)
            result.picture.slot, result.picture.width = picture.slot, picture.width
            result.picture.height = picture.height
        if one.failed is not None:
            result.failed.CopyFrom(one.failed)
        made.append(result)
    return pb.ProcessResponse(results=pb.ResultBatch(results=made), credits=message.credits)


def joined(pieces: Planes) -> bytes:
    return b"".join(pieces) if isinstance(pieces, tuple) else bytes(pieces)


@given(requests)
def test_requests_are_those_of_the_generated_code(message: pb.ProcessRequest) -> None:
    data = message.SerializeToString()
    assert encode_request(light_request(message)) == data
    read = parse_request(data)
    assert isinstance(read, FrameBatch)
    assert generated_request(read) == message


@given(responses)
def test_responses_are_those_of_the_generated_code(message: pb.ProcessResponse) -> None:
    data = message.SerializeToString()
    assert encode_response(light_response(message)) == data
    read = parse_response(data)
    assert isinstance(read, Results)
    assert generated_response(read) == message


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_planes_in_pieces_are_written_as_one(pieces: list[bytes]) -> None:
    whole, cut = b"".join(pieces), tuple(map(memoryview, pieces))
    assert encode_request(FrameBatch([Frame(1, planes=cut)])) == encode_request(FrameBatch([Frame(1, planes=whole)]))
    [one, other] = [
        encode_response(Results([FrameResult(1, picture=Picture(planes, width=2))])) for planes in (cut, whole)
    ]
    assert one == other


def test_planes_are_views_of_the_message() -> None:
    data = encode_request(FrameBatch([Frame(1, planes=bytes(3000)), Frame(2, planes=bytes(2000))]))
    batch = parse_request(data)
    assert isinstance(batch, FrameBatch)
    for frame in batch.frames:
        assert isinstance(frame.planes, memoryview)
        assert frame.planes.obj is data


@pytest.mark.parametrize(
    "message",
    [
        pb.ProcessRequest(open=pb.OpenSession(session_id="a", workflow_json="{}")),
        pb.ProcessRequest(audio=pb.AudioBatch(blocks=[pb.AudioBlock(pts=1, samples=b"ab")])),
        pb.ProcessRequest(end_of_input=pb.EndOfInput()),
        pb.ProcessRequest(),
    ],
)
def test_other_requests_are_left_to_the_generated_code(message: pb.ProcessRequest) -> None:
    assert encode_request(message) == message.SerializeToString()
    assert parse_request(encode_request(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        pb.ProcessResponse(opened=pb.SessionOpened(session_id="a"), credits=3),
        pb.ProcessResponse(credits=3),
        pb.ProcessResponse(fault=pb.Fault(code="x")),
    ],
)
def test_other_responses_are_left_to_the_generated_code(message: pb.ProcessResponse) -> None:
    assert encode_response(message) == message.SerializeToString()
    assert parse_response(encode_response(message)) == message


# ---- what no peer of ours writes

#: Fields of every wire type, known and unknown, in any order and number, some of them cut off.
loose_varint = st.one_of(
    st.integers(0, 2**64 - 1).map(lambda value: varint(value)),
    st.binary(min_size=1, max_size=12),  # too long, unfinished, more than 64 bits
    st.sampled_from([b"\x80\x00", b"\x81\x80\x00", b"\xff" * 9 + b"\x01", b"\xff" * 9 + b"\x02"]),
)


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def block(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def fields(content: st.SearchStrategy[bytes], known: int) -> st.SearchStrategy[bytes]:
    number = st.one_of(st.integers(1, known), st.sampled_from([0, 15, 16, 77, 2**28]))
    one = st.one_of(
        st.builds(lambda n, value: varint(n << 3) + value, number, loose_varint),
        st.builds(block, number, content),
        st.builds(block, number, content),
        st.builds(lambda n, value: varint(n << 3 | 5) + value, number, st.binary(min_size=3, max_size=4)),
        st.builds(lambda n, value: varint(n << 3 | 1) + value, number, st.binary(min_size=7, max_size=8)),
        st.builds(lambda n: varint(n << 3 | 3) + varint(n << 3 | 4), number),  # a group
        st.binary(max_size=3),
    )
    return st.lists(one, max_size=4).map(b"".join)


frame_bytes = fields(st.binary(max_size=5), 6)
request_bytes = fields(st.one_of(fields(frame_bytes, 2), st.builds(lambda each: block(1, each), frame_bytes)), 6)
result_bytes = fields(fields(st.binary(max_size=5), 5), 10)
response_bytes = fields(fields(result_bytes, 1), 15)


def cut(data: bytes, place: int, flip: int) -> bytes:
    if not data:
        return data
    place %= len(data)
    return data[:place] if flip == 0 else data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]


@given(request_bytes)
@example(b"\x12\x02\x0a\x00" * 2)  # twice the same member: they merge
@example(b"\x12\x02\x0a\x00\x2a\x00")  # another one after it: the last holds
@example(b"\x12\x04\x0a\x02\x08\x80")
@example(b"\x12\xff\xff\xff\xff\x0f")
def test_anything_is_read_as_the_generated_code_reads_it(data: bytes) -> None:
    same_request(data)


@given(response_bytes)
@example(b"\x12\x08\x0a\x06\x1a\x00\x1a\x02\x10\x01")  # two pictures merge
@example(b"\x12\x08\x0a\x06\x1a\x02\x10\x01\x22\x00")  # a picture, then a drop
def test_any_response_is_read_as_the_generated_code_reads_it(data: bytes) -> None:
    same_response(data)


@given(requests, st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_request(message: pb.ProcessRequest, place: int, flip: int) -> None:
    same_request(cut(message.SerializeToString(), place, flip))


@given(responses, st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_response(message: pb.ProcessResponse, place: int, flip: int) -> None:
    same_response(cut(message.SerializeToString(), place, flip))


def same_request(data: bytes) -> None:
    try:
        expected = pb.ProcessRequest.FromString(data)
    except DecodeError:
        with pytest.raises(Malformed):
            parse_request(data)
        return
    expected.DiscardUnknownFields()  # type: ignore[attr-defined]  # missing in the stubs
    read = generated_request(parse_request(data))
    read.DiscardUnknownFields()  # type: ignore[attr-defined]
    assert read == expected


def same_response(data: bytes) -> None:
    try:
        expected = pb.ProcessResponse.FromString(data)
    except DecodeError:
        with pytest.raises(Malformed):
            parse_response(data)
        return
    expected.DiscardUnknownFields()  # type: ignore[attr-defined]
    read = generated_response(parse_response(data))
    read.DiscardUnknownFields()  # type: ignore[attr-defined]
    assert read == expected


@pytest.mark.parametrize("strange", [b"", b"\x2a\x00\x1a\x00"])
def test_a_message_of_countless_frames_is_refused(strange: bytes) -> None:
    assert len(parse_request(strange + block(2, b"\x0a\x00" * MAX_ITEMS)).frames) == MAX_ITEMS  # type: ignore[union-attr, arg-type]
    with pytest.raises(Malformed, match="limit"):
        parse_request(strange + block(2, b"\x0a\x00" * (MAX_ITEMS + 1)))
    with pytest.raises(Malformed, match="limit"):
        parse_request(strange + block(2, block(2, b"\x01" * (MAX_ITEMS + 1))))
    with pytest.raises(Malformed, match="limit"):
        parse_response(block(2, b"\x0a\x00" * (MAX_ITEMS + 1)))
