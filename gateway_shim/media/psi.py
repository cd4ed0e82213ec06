"""Program tables of an MPEG transport stream: which track is on which PID.

ISO/IEC 13818-1 section 2.4.4; Opus: "Encapsulation of Opus in MPEG-TS" (opus-codec.org), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["video", "audio"]

STREAM_TYPE_PRIVATE = 0x06
# stream_type -> codec, ISO/IEC 13818-1 table 2-34.
_CODECS: dict[int, tuple[str, Kind]] = {
    0x03: ("mp2", "audio"),
    0x04: ("mp2", "audio"),
    0x0F: ("aac", "audio"),
    0x11: ("aac_latm", "audio"),
    0x1B: ("h264", "video"),
}
DESCRIPTOR_REGISTRATION = 0x05
DESCRIPTOR_EXTENSION = 0x7F
EXTENSION_OPUS = 0x80

_TABLE_PAT = 0x00
_TABLE_PMT = 0x02
_MAX_SECTION_BYTES = 3 + 1021  # section_length of PAT and PMT is at most 1021


@dataclass(frozen=True, slots=True)
class Track:
    """One elementary stream. ``channels`` is 0 where only the data itself knows it (everything but Opus)."""

    pid: int
    codec: str
    kind: Kind
    channels: int = 0


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
        table.append(value)
    return tuple(table)


_CRC_TABLE = _crc_table()


def crc32_mpeg(data: bytes) -> int:
    """CRC of ISO/IEC 13818-1 annex A; 0 over a section that carries its own."""
    value = 0xFFFFFFFF
    for byte in data:
        value = (value << 8 & 0xFFFFFFFF) ^ _CRC_TABLE[value >> 24 ^ byte]
    return value


class SectionReader:
    """Puts the sections of one PID together. A section that equals the last one is not given out again.

    Tables repeat ten times a second and a check sum over 40 bytes in Python costs as much as a picture's packets.
    """

    def __init__(self, table: int) -> None:
        self._table = table
        self._buffer: bytes | None = None
        self._counter = -1
        self._last = b""

    def reset(self) -> None:
        """Drop what is incomplete; the counter may begin anywhere."""
        self._buffer = None
        self._counter = -1

    def packet(self, counter: int, starts: bool, payload: bytes) -> list[bytes]:
        """Sections that this packet completes and that differ from the last: check sum right, without header and CRC.

        What is left is the table's id extension (2 bytes), version (1), section numbers (2) and the entries.
        """
        in_order = self._counter in (-1, counter)
        self._counter = (counter + 1) & 15
        if not in_order:
            self._buffer = None
        complete: list[bytes] = []
        if starts:
            pointer = payload[0] + 1 if payload else 0
            if self._buffer is not None:
                self._take(self._buffer + payload[1:pointer], complete)
            self._buffer = payload[pointer:]
        elif self._buffer is not None:
            self._buffer += payload
        if self._buffer is not None:
            self._buffer = self._take(self._buffer, complete)
        return complete

    def _take(self, buffer: bytes, complete: list[bytes]) -> bytes | None:
        """Move whole sections from ``buffer`` to ``complete``; the incomplete rest, or None where nothing follows."""
        while len(buffer) >= 3 and buffer[0] != 0xFF:  # 0xFF is stuffing up to the packet's end
            size = 3 + ((buffer[1] & 0x0F) << 8 | buffer[2])
            if size > _MAX_SECTION_BYTES:
                return None
            if len(buffer) < size:
                return buffer
            section, buffer = buffer[:size], buffer[size:]
            if section[0] != self._table or section == self._last or size < 12:
                continue
            if crc32_mpeg(section) == 0 and section[5] & 1:  # current_next_indicator: valid already
                self._last = section
                complete.append(section[3:-4])
        return buffer if buffer and buffer[0] != 0xFF else None


def pat_reader() -> SectionReader:
    return SectionReader(_TABLE_PAT)


def pmt_reader() -> SectionReader:
    return SectionReader(_TABLE_PMT)


def first_program(pat: bytes) -> int | None:
    """PID of the first program's PMT in the body of a PAT; program 0 is the network table."""
    for at in range(5, len(pat) - 3, 4):
        if pat[at] or pat[at + 1]:
            return (pat[at + 2] & 0x1F) << 8 | pat[at + 3]
    return None


def program_tracks(pmt: bytes) -> tuple[Track, ...]:
    """Tracks in the body of a PMT, in its order; streams that nobody here decodes are left out."""
    tracks = []
    at = 9 + ((pmt[7] & 0x0F) << 8 | pmt[8]) if len(pmt) >= 9 else len(pmt)
    while at + 5 <= len(pmt):
        pid = (pmt[at + 1] & 0x1F) << 8 | pmt[at + 2]
        size = (pmt[at + 3] & 0x0F) << 8 | pmt[at + 4]
        track = _track(pid, pmt[at], pmt[at + 5 : at + 5 + size])
        if track is not None:
            tracks.append(track)
        at += 5 + size
    return tuple(tracks)


def _track(pid: int, stream_type: int, descriptors: bytes) -> Track | None:
    if stream_type in _CODECS:
        codec, kind = _CODECS[stream_type]
        return Track(pid, codec, kind)
    if stream_type != STREAM_TYPE_PRIVATE:
        return None
    is_opus, channels = False, 2
    for tag, body in _descriptors(descriptors):
        if tag == DESCRIPTOR_REGISTRATION and body[:4] == b"Opus":
            is_opus = True
        elif tag == DESCRIPTOR_EXTENSION and len(body) >= 2 and body[0] == EXTENSION_OPUS:
            channels = body[1] or 2  # 0 is two independent channels in one stereo stream
    # Surround is several Opus streams in one; a decoder would need their mapping, and no gateway sends it.
    return Track(pid, "opus", "audio", channels) if is_opus and channels <= 2 else None


def _descriptors(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 2 <= len(data):
        size = data[at + 1]
        yield data[at], data[at + 2 : at + 2 + size]
        at += 2 + size
