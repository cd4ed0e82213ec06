"""Pictures on their way to the engine, ``ProcessRequest{frames}``, written and read by hand.

Why that is worth it, and what it leaves to the generated code: ``fields``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    read_varint,
    require_bounded,
    signed,
    varint,
)


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
        head = number(b"\x08", frame.frame_id) + number(b"\x10", frame.pts)
        tail = number(b"\x20", frame.slot) + number(b"\x28", frame.age_ms)
        size += append_message(parts, b"\x0a", head, b"\x1a", frame.planes, tail)
    if message.released_slots:
        parts.append(block(b"\x12", b"".join(map(varint, message.released_slots))))
        size += len(parts[-1])
    parts[0] = b"\x12" + varint(size)
    return b"".join(parts)


def _small_request(message: FrameBatch) -> bytes:
    request = pb.ProcessRequest()
    batch = request.frames
    batch.SetInParent()
    for frame in message.frames:
        batch.frames.add(frame_id=frame.frame_id, pts=frame.pts, slot=frame.slot, age_ms=frame.age_ms & UINT32)
    batch.released_slots.extend(message.released_slots)
    return request.SerializeToString()


# ---- reading


def parse_request(data: bytes) -> FrameBatch | pb.ProcessRequest:
    """A message from the wire. Planes are views of ``data``, if it is not short. Raises Malformed."""
    if len(data) < SMALL_BYTES:
        return _generated_request(data)
    try:
        frames: list[Frame] = []
        released: list[int] = []
        plain = False
        for tag, at, end in read_fields(data, 0, len(data)):
            if tag != 0x12:
                raise NotPlain
            plain = True
            _read_batch(data, at, end, frames, released)
        if plain:
            return FrameBatch(frames, released)
    except NotPlain:
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
    require_bounded(len(batch.frames), len(batch.released_slots))
    return FrameBatch(
        [Frame(each.frame_id, each.pts, each.planes, each.slot, each.age_ms) for each in batch.frames],
        list(batch.released_slots),
    )


def _read_batch(data: bytes, at: int, end: int, frames: list[Frame], released: list[int]) -> None:
    for tag, begin, stop in read_fields(data, at, end):
        if tag == 0x0A:
            require_bounded(len(frames) + 1)
            frames.append(_read_frame(data, begin, stop))
        elif tag == 0x12:  # packed
            while begin < stop:
                require_bounded(len(released) + 1)
                slot, begin = read_varint(data, begin, stop)
                released.append(slot & UINT32)
        elif tag == 0x10:  # one by one
            require_bounded(len(released) + 1)
            released.append(begin & UINT32)


def _read_frame(data: bytes, at: int, end: int) -> Frame:
    frame = Frame()
    for tag, value, stop in read_fields(data, at, end):
        if tag == 0x08:
            frame.frame_id = value
        elif tag == 0x10:
            frame.pts = signed(value)
        elif tag == 0x1A:
            frame.planes = memoryview(data)[value:stop]
        elif tag == 0x20:
            frame.slot = value & UINT32
        elif tag == 0x28:
            frame.age_ms = value & UINT32
    return frame
