"""The two messages that carry pictures, by hand: ``ProcessRequest{frames}`` and ``ProcessResponse{results}``.

Byte for byte the messages of ``engine.proto``: either end may be the generated code of any language. That code costs
a copy for setting ``planes``, one for serialising, one for parsing and one for reading them out. Here writing is one
copy, from the decoder's rows into the message, and reading none.

What is not plainly one of these two messages goes to the generated code: every other message, and bytes that only it
can tell sense from nonsense (groups, merged outcomes). So does what has no planes in it, because they lie in slots:
there is no copy to save, and four frames there and back take it 22 us, written and read by hand 55.

Copies of a picture on this lane, each way: 1 of 5, into the message (here); 2, gRPC's own out of ``bytes``; 3 and
4, into the kernel's socket and out of it; 5, gRPC's join of what came (a bytearray, then bytes of it: twice). There
and back, both ends, on two shared cores: 0.8 CPU seconds per GB at 1080p, 1.0 at 720p; the generated code takes
about twice that (hot-path.md section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from google.protobuf.message import DecodeError

from . import engine_pb2 as pb

Bytes: TypeAlias = bytes | bytearray | memoryview

#: What is read is one piece, a view into the received message; what is written may lie in several.
Planes: TypeAlias = Bytes | tuple[Bytes, ...]

#: Frames or results of one message. Two bytes make an empty one: a message could hold 32 million of them.
MAX_ITEMS: Final = 256


#: What is shorter holds slot numbers, or pictures of which a copy does not matter.
SMALL_BYTES: Final = 4096

_UINT32: Final = 0xFFFF_FFFF


class Malformed(ValueError):
    """The bytes are no message of the contract."""


@dataclass(slots=True)
class Frame:
    """As in the contract."""

    frame_id: int = 0
    pts: int = 0
    planes: Planes = b""
    slot: int = 0
    age_ms: int = 0


@dataclass(slots=True)
class FrameBatch:
    """``ProcessRequest{frames}``."""

    frames: Sequence[Frame]
    released_slots: Sequence[int] = ()


@dataclass(slots=True)
class Picture:
    """As in the contract."""

    planes: Planes = b""
    slot: int = 0
    width: int = 0
    height: int = 0


@dataclass(slots=True)
class FrameResult:
    """As in the contract: at most one of ``picture``, ``dropped`` and ``failed`` is given."""

    frame_id: int = 0
    pts: int = 0
    picture: Picture | None = None
    dropped: pb.Dropped | None = None
    failed: pb.Fault | None = None
    version: int = 0
    graph_us: int = 0
    waiting_us: int = 0
    convert_us: int = 0


@dataclass(slots=True)
class Results:
    """``ProcessResponse{results, credits}``."""

    results: list[FrameResult] = field(default_factory=list)
    credits: int = 0

    @property
    def is_small(self) -> bool:
        """Whether no planes travel in it."""
        return all(result.picture is None or not result.picture.planes for result in self.results)


# ---- writing


def encode_request(message: FrameBatch | pb.ProcessRequest) -> bytes:
    """The bytes on the wire; planes are copied once."""
    if not isinstance(message, FrameBatch):
        return message.SerializeToString()
    if SMALL_BYTES and not any(frame.planes for frame in message.frames):
        return _small_request(message)
    parts: list[Bytes] = [b""]
    size = 0
    for frame in message.frames:
        head = _number(b"\x08", frame.frame_id) + _number(b"\x10", frame.pts)
        tail = _number(b"\x20", frame.slot) + _number(b"\x28", frame.age_ms)
        size += _append(parts, b"\x0a", head, b"\x1a", frame.planes, tail)
    if message.released_slots:
        parts.append(_block(b"\x12", b"".join(map(_varint, message.released_slots))))
        size += len(parts[-1])
    parts[0] = b"\x12" + _varint(size)
    return b"".join(parts)


def encode_response(message: Results | pb.ProcessResponse) -> bytes:
    """The bytes on the wire; planes are copied once."""
    if not isinstance(message, Results):
        return message.SerializeToString()
    if SMALL_BYTES and message.is_small:
        return _small_response(message)
    parts: list[Bytes] = [b""]
    size = 0
    for result in message.results:
        tail = (
            _number(b"\x30", result.version)
            + _number(b"\x38", result.graph_us)
            + _number(b"\x40", result.waiting_us)
            + _number(b"\x48", result.convert_us)
        )
        head = _number(b"\x08", result.frame_id) + _number(b"\x10", result.pts)
        picture = result.picture
        if picture is None:
            if result.dropped is not None:
                head += _block(b"\x22", result.dropped.SerializeToString())
            if result.failed is not None:
                head += _block(b"\x2a", result.failed.SerializeToString())
            size += _append(parts, b"\x0a", head, b"", b"", tail)
            continue
        inner: list[Bytes] = []
        rest = _number(b"\x10", picture.slot) + _number(b"\x18", picture.width) + _number(b"\x20", picture.height)
        length = _append(inner, b"\x1a", b"", b"\x0a", picture.planes, rest)
        prefix = _varint(len(head) + length + len(tail))
        parts += (b"\x0a" + prefix + head, *inner, tail)
        size += 1 + len(prefix) + len(head) + length + len(tail)
    parts[0] = b"\x12" + _varint(size)
    parts.append(_number(b"\x78", message.credits))
    return b"".join(parts)


def _small_request(message: FrameBatch) -> bytes:
    request = pb.ProcessRequest()
    batch = request.frames
    batch.SetInParent()
    for frame in message.frames:
        batch.frames.add(frame_id=frame.frame_id, pts=frame.pts, slot=frame.slot, age_ms=frame.age_ms & _UINT32)
    batch.released_slots.extend(message.released_slots)
    return request.SerializeToString()


def _small_response(message: Results) -> bytes:
    response = pb.ProcessResponse(credits=message.credits)
    response.results.SetInParent()
    add = response.results.results.add
    for result in message.results:
        written = add(
            frame_id=result.frame_id,
            pts=result.pts,
            version=result.version,
            graph_us=result.graph_us & _UINT32,
            waiting_us=result.waiting_us & _UINT32,
            convert_us=result.convert_us & _UINT32,
        )
        if (picture := result.picture) is not None:
            shown = written.picture
            shown.SetInParent()
            shown.slot, shown.width, shown.height = picture.slot, picture.width, picture.height
        elif result.dropped is not None:
            written.dropped.CopyFrom(result.dropped)
        elif result.failed is not None:
            written.failed.CopyFrom(result.failed)
    return response.SerializeToString()


def _append(parts: list[Bytes], tag: bytes, head: bytes, planes_tag: bytes, planes: Planes, tail: bytes) -> int:
    """Append a submessage of ``head``, planes and ``tail``; the bytes that it adds."""
    pieces = planes if isinstance(planes, tuple) else (planes,)
    count = sum(map(len, pieces))
    if count:
        head += planes_tag + _varint(count)
    prefix = tag + _varint(len(head) + count + len(tail))
    parts += (prefix + head, *pieces, tail)
    return len(prefix) + len(head) + count + len(tail)


def _block(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


def _number(tag: bytes, value: int) -> bytes:
    """A field, left out at its default. Negative ones are 64 bits of two's complement."""
    return tag + _varint(value & 0xFFFF_FFFF_FFFF_FFFF) if value else b""


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


# ---- reading


class _NotPlain(Exception):
    """Only the generated code knows what this is."""


def parse_request(data: bytes) -> FrameBatch | pb.ProcessRequest:
    """A message from the wire. Planes are views of ``data``, if it is not short. Raises Malformed."""
    if len(data) < SMALL_BYTES:
        return _generated_request(data)
    try:
        frames: list[Frame] = []
        released: list[int] = []
        plain = False
        for tag, at, end in _fields(data, 0, len(data)):
            if tag != 0x12:
                raise _NotPlain
            plain = True
            _read_batch(data, at, end, frames, released)
        if plain:
            return FrameBatch(frames, released)
    except _NotPlain:
        pass
    return _generated_request(data)


def _generated_request(data: bytes) -> FrameBatch | pb.ProcessRequest:
    try:
        message = pb.ProcessRequest.FromString(data)
    except DecodeError as exc:
        raise Malformed("the bytes are no ProcessRequest") from exc
    if message.WhichOneof("message") != "frames":
        return message
    batch = message.frames
    _bounded(len(batch.frames), len(batch.released_slots))
    return FrameBatch(
        [Frame(each.frame_id, each.pts, each.planes, each.slot, each.age_ms) for each in batch.frames],
        list(batch.released_slots),
    )


def parse_response(data: bytes) -> Results | pb.ProcessResponse:
    """A message from the wire. Planes are views of ``data``, if it is not short. Raises Malformed."""
    if len(data) < SMALL_BYTES:
        return _generated_response(data)
    try:
        results = Results()
        plain = False
        for tag, at, end in _fields(data, 0, len(data)):
            if tag == 0x12:
                plain = True
                _read_results(data, at, end, results.results)
            elif tag == 0x78:
                results.credits = at & 0xFFFF_FFFF
            else:
                raise _NotPlain
        if plain:
            return results
    except _NotPlain:
        pass
    return _generated_response(data)


def _generated_response(data: bytes) -> Results | pb.ProcessResponse:
    try:
        message = pb.ProcessResponse.FromString(data)
    except DecodeError as exc:
        raise Malformed("the bytes are no ProcessResponse") from exc
    if message.WhichOneof("message") != "results":
        return message
    _bounded(len(message.results.results))
    return Results([result_of(each) for each in message.results.results], message.credits)


def result_of(message: pb.FrameResult) -> FrameResult:
    """The same result, out of the generated code."""
    result = FrameResult(
        message.frame_id,
        message.pts,
        version=message.version,
        graph_us=message.graph_us,
        waiting_us=message.waiting_us,
        convert_us=message.convert_us,
    )
    match message.WhichOneof("outcome"):
        case "picture":
            picture = message.picture
            result.picture = Picture(picture.planes, picture.slot, picture.width, picture.height)
        case "dropped":
            result.dropped = message.dropped
        case "failed":
            result.failed = message.failed
    return result


def _bounded(*counts: int) -> None:
    if max(counts) > MAX_ITEMS:
        raise Malformed(f"a message has {max(counts)} frames or slots, {MAX_ITEMS} is the limit")


def _read_batch(data: bytes, at: int, end: int, frames: list[Frame], released: list[int]) -> None:
    for tag, begin, stop in _fields(data, at, end):
        if tag == 0x0A:
            _bounded(len(frames) + 1)
            frames.append(_read_frame(data, begin, stop))
        elif tag == 0x12:  # packed
            while begin < stop:
                _bounded(len(released) + 1)
                number, begin = _read_varint(data, begin, stop)
                released.append(number & 0xFFFF_FFFF)
        elif tag == 0x10:  # one by one
            _bounded(len(released) + 1)
            released.append(begin & 0xFFFF_FFFF)


def _read_frame(data: bytes, at: int, end: int) -> Frame:
    frame = Frame()
    for tag, value, stop in _fields(data, at, end):
        if tag == 0x08:
            frame.frame_id = value
        elif tag == 0x10:
            frame.pts = _signed(value)
        elif tag == 0x1A:
            frame.planes = memoryview(data)[value:stop]
        elif tag == 0x20:
            frame.slot = value & 0xFFFF_FFFF
        elif tag == 0x28:
            frame.age_ms = value & 0xFFFF_FFFF
    return frame


def _read_results(data: bytes, at: int, end: int, results: list[FrameResult]) -> None:
    for tag, begin, stop in _fields(data, at, end):
        if tag == 0x0A:
            _bounded(len(results) + 1)
            results.append(_read_result(data, begin, stop))


def _read_result(data: bytes, at: int, end: int) -> FrameResult:
    result = FrameResult()
    outcomes = 0
    for tag, value, stop in _fields(data, at, end):
        if tag == 0x08:
            result.frame_id = value
        elif tag == 0x10:
            result.pts = _signed(value)
        elif tag in (0x1A, 0x22, 0x2A):
            outcomes += 1
            if outcomes > 1:  # they merge, or the last one holds
                raise _NotPlain
            try:
                if tag == 0x1A:
                    result.picture = _read_picture(data, value, stop)
                elif tag == 0x22:
                    result.dropped = pb.Dropped.FromString(data[value:stop])
                else:
                    result.failed = pb.Fault.FromString(data[value:stop])
            except DecodeError:
                raise _NotPlain from None
        elif tag == 0x30:
            result.version = value
        elif tag == 0x38:
            result.graph_us = value & 0xFFFF_FFFF
        elif tag == 0x40:
            result.waiting_us = value & 0xFFFF_FFFF
        elif tag == 0x48:
            result.convert_us = value & 0xFFFF_FFFF
    return result


def _read_picture(data: bytes, at: int, end: int) -> Picture:
    picture = Picture()
    for tag, value, stop in _fields(data, at, end):
        if tag == 0x0A:
            picture.planes = memoryview(data)[value:stop]
        elif tag == 0x10:
            picture.slot = value & 0xFFFF_FFFF
        elif tag == 0x18:
            picture.width = value & 0xFFFF_FFFF
        elif tag == 0x20:
            picture.height = value & 0xFFFF_FFFF
    return picture


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """``(tag, number, 0)`` of numbers and ``(tag, begin, end)`` of what has a length; fixed-size fields are skipped.

    Unknown fields come too, with tags that nobody asks for. Nothing is read beyond ``end``.
    """
    while at < end:
        tag, at = _read_varint(data, at, end)
        if not 8 <= tag <= 0xFFFF_FFFF:
            raise _NotPlain
        kind = tag & 7
        if kind == 0:
            value, at = _read_varint(data, at, end)
            yield tag, value, 0
        elif kind == 2:
            size, at = _read_varint(data, at, end)
            if size > end - at:
                raise _NotPlain
            yield tag, at, at + size
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
            if at > end:
                raise _NotPlain
        else:
            raise _NotPlain


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of at most 64 bits and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise _NotPlain
            return value, at
        shift += 7
    raise _NotPlain


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
