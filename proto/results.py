"""What became of pictures in the engine, ``ProcessResponse{results}``, written and read by hand.

Why that is worth it, and what it leaves to the generated code: ``fields``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from . import engine_pb2 as pb
from .fields import (
    SMALL_BYTES,
    UINT32,
    Bytes,
    Malformed,
    NotPlain,
    Planes,
    append_message,
    block,
    number,
    read_fields,
    require_bounded,
    signed,
    varint,
)


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
            number(b"\x30", result.version)
            + number(b"\x38", result.graph_us)
            + number(b"\x40", result.waiting_us)
            + number(b"\x48", result.convert_us)
        )
        head = number(b"\x08", result.frame_id) + number(b"\x10", result.pts)
        picture = result.picture
        if picture is None:
            if result.dropped is not None:
                head += block(b"\x22", result.dropped.SerializeToString())
            if result.failed is not None:
                head += block(b"\x2a", result.failed.SerializeToString())
            size += append_message(parts, b"\x0a", head, b"", b"", tail)
            continue
        inner: list[Bytes] = []
        rest = number(b"\x10", picture.slot) + number(b"\x18", picture.width) + number(b"\x20", picture.height)
        length = append_message(inner, b"\x1a", b"", b"\x0a", picture.planes, rest)
        prefix = varint(len(head) + length + len(tail))
        parts += (b"\x0a" + prefix + head, *inner, tail)
        size += 1 + len(prefix) + len(head) + length + len(tail)
    parts[0] = b"\x12" + varint(size)
    parts.append(number(b"\x78", message.credits))
    return b"".join(parts)


def _small_response(message: Results) -> bytes:
    response = pb.ProcessResponse(credits=message.credits)
    response.results.SetInParent()
    add = response.results.results.add
    for result in message.results:
        written = add(
            frame_id=result.frame_id,
            pts=result.pts,
            version=result.version,
            graph_us=result.graph_us & UINT32,
            waiting_us=result.waiting_us & UINT32,
            convert_us=result.convert_us & UINT32,
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


# ---- reading


def parse_response(data: bytes) -> Results | pb.ProcessResponse:
    """A message from the wire. Planes are views of ``data``, if it is not short. Raises Malformed."""
    if len(data) < SMALL_BYTES:
        return _generated_response(data)
    try:
        results = Results()
        plain = False
        for tag, at, end in read_fields(data, 0, len(data)):
            if tag == 0x12:
                plain = True
                _read_results(data, at, end, results.results)
            elif tag == 0x78:
                results.credits = at & UINT32
            else:
                raise NotPlain
        if plain:
            return results
    except NotPlain:
        pass
    return _generated_response(data)


def _generated_response(data: bytes) -> Results | pb.ProcessResponse:
    try:
        message = pb.ProcessResponse.FromString(data)
    except DecodeError as exc:
        raise Malformed("the bytes are no ProcessResponse") from exc
    if message.WhichOneof("message") != "results":
        return message
    require_bounded(len(message.results.results))
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


def _read_results(data: bytes, at: int, end: int, results: list[FrameResult]) -> None:
    for tag, begin, stop in read_fields(data, at, end):
        if tag == 0x0A:
            require_bounded(len(results) + 1)
            results.append(_read_result(data, begin, stop))


def _read_result(data: bytes, at: int, end: int) -> FrameResult:
    result = FrameResult()
    outcomes = 0
    for tag, value, stop in read_fields(data, at, end):
        if tag == 0x08:
            result.frame_id = value
        elif tag == 0x10:
            result.pts = signed(value)
        elif tag in (0x1A, 0x22, 0x2A):
            outcomes += 1
            if outcomes > 1:  # they merge, or the last one holds
                raise NotPlain
            try:
                if tag == 0x1A:
                    result.picture = _read_picture(data, value, stop)
                elif tag == 0x22:
                    result.dropped = pb.Dropped.FromString(data[value:stop])
                else:
                    result.failed = pb.Fault.FromString(data[value:stop])
            except DecodeError:
                raise NotPlain from None
        elif tag == 0x30:
            result.version = value
        elif tag == 0x38:
            result.graph_us = value & UINT32
        elif tag == 0x40:
            result.waiting_us = value & UINT32
        elif tag == 0x48:
            result.convert_us = value & UINT32
    return result


def _read_picture(data: bytes, at: int, end: int) -> Picture:
    picture = Picture()
    for tag, value, stop in read_fields(data, at, end):
        if tag == 0x0A:
            picture.planes = memoryview(data)[value:stop]
        elif tag == 0x10:
            picture.slot = value & UINT32
        elif tag == 0x18:
            picture.width = value & UINT32
        elif tag == 0x20:
            picture.height = value & UINT32
    return picture
