"""Protobuf fields, written and read by hand: what the two messages with pictures are made of, and why by hand.

The messages are in ``frames`` and ``results``.

Byte for byte the messages of ``engine.proto``: either end may be the generated code of any language. That code costs
a copy for setting ``planes``, one for serialising, one for parsing and one for reading them out. Here writing is one
copy, from the decoder's rows into the message (rows with padding are packed before it), and reading none.

What is not plainly one of the two messages goes to the generated code: every other message, and bytes that only it
can tell sense from nonsense (groups, merged outcomes). So does what has no planes in it, because they lie in slots:
there is no copy to save, and four frames there and back take it 22 us, written and read by hand 55.

Copies of a picture on this lane, each way: 1 of 5, into the message (the two ``encode``); 2, gRPC's own out of
``bytes``; 3 and 4, into the kernel's socket and out of it; 5, gRPC's join of what came (a bytearray, then bytes of
it: twice). There and back, both ends: 0.5 CPU seconds per GB at 1080p and 720p on an EPYC, 1.5 on a Cascade Lake with
memory a quarter as fast (docs/performance.md); the generated code takes about twice that (hot-path.md section 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview

#: What is read is one piece, a view into the received message; what is written may lie in several.
Planes: TypeAlias = Bytes | tuple[Bytes, ...]

#: Frames or results of one message. Two bytes make an empty one: a message could hold 32 million of them.
MAX_ITEMS: Final = 256

#: What is shorter holds slot numbers, or pictures of which a copy does not matter.
SMALL_BYTES: Final = 4096

#: The bits of a number that a uint32 of the contract keeps.
UINT32: Final = 0xFFFF_FFFF


class Malformed(ValueError):
    """The bytes are no message of the contract."""


class NotPlain(Exception):
    """Only the generated code knows what this is."""


def require_bounded(*counts: int) -> None:
    """Raises Malformed beyond MAX_ITEMS."""
    if max(counts) > MAX_ITEMS:
        raise Malformed(f"a message has {max(counts)} frames or slots, {MAX_ITEMS} is the limit")


# ---- writing


def varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def number(tag: bytes, value: int) -> bytes:
    """A field, left out at its default. Negative ones are 64 bits of two's complement."""
    return tag + varint(value & 0xFFFF_FFFF_FFFF_FFFF) if value else b""


def block(tag: bytes, content: bytes) -> bytes:
    """A field that has a length."""
    return tag + varint(len(content)) + content


def append_message(
    parts: list[Bytes], tag: bytes, head: bytes, planes_tag: bytes, planes: Planes, tail: bytes
) -> int:
    """Append a submessage of ``head``, planes and ``tail``; the bytes that it adds."""
    pieces = planes if isinstance(planes, tuple) else (planes,)
    count = sum(map(len, pieces))
    if count:
        head += planes_tag + varint(count)
    prefix = tag + varint(len(head) + count + len(tail))
    parts += (prefix + head, *pieces, tail)
    return len(prefix) + len(head) + count + len(tail)


# ---- reading


def read_fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """``(tag, number, 0)`` of numbers and ``(tag, begin, end)`` of what has a length; fixed-size fields are skipped.

    Unknown fields come too, with tags that nobody asks for. Nothing is read beyond ``end``. Raises NotPlain.
    """
    while at < end:
        tag, at = read_varint(data, at, end)
        if not 8 <= tag <= 0xFFFF_FFFF:
            raise NotPlain
        kind = tag & 7
        if kind == 0:
            value, at = read_varint(data, at, end)
            yield tag, value, 0
        elif kind == 2:
            size, at = read_varint(data, at, end)
            if size > end - at:
                raise NotPlain
            yield tag, at, at + size
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
            if at > end:
                raise NotPlain
        else:
            raise NotPlain


def read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of at most 64 bits and where it ends. Raises NotPlain."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise NotPlain
            return value, at
        shift += 7
    raise NotPlain


def signed(value: int) -> int:
    """The int64 that was read as a number."""
    return value - (1 << 64) if value >> 63 else value
