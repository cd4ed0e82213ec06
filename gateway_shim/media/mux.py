"""Access units into an MPEG transport stream, each in the call that brings it.

libavformat's muxer interleaves: with a sound track declared that has not sent anything it held 40 of 40 pictures, and
one or two with max_interleave_delta=1 (hot-path.md section 5). Readers order by time stamps, so nothing is gained by
that. Here the bytes of a unit come out at once, and the caller decides where the tables stand. That takes 7 us for a
picture of 12.5 kB; libavformat takes 10.
"""

from __future__ import annotations

import numpy as np

from .psi import (
    DESCRIPTOR_EXTENSION,
    DESCRIPTOR_REGISTRATION,
    EXTENSION_OPUS,
    STREAM_TYPE_PRIVATE,
    crc32_mpeg,
)

_PID_PAT = 0x0000
# The numbers that libavformat uses as well.
_PID_PMT = 0x1000
_PID_VIDEO = 0x0100
_PID_AUDIO = 0x0101
_PROGRAM = 1
_STREAM_TYPE_H264 = 0x1B
_STREAM_ID_VIDEO = 0xE0
_STREAM_ID_PRIVATE = 0xBD

_PACKET_BYTES = 188
_PAYLOAD_BYTES = 184
_STAMP_MASK = (1 << 33) - 1
# How far the program clock runs behind the decode stamps: the time that a receiver's buffer has to take a picture in.
# Players that obey the clock show everything this much later.
_CLOCK_LEAD = 9_000  # 100 ms

_RANDOM_ACCESS = 0x40
_HAS_CLOCK = 0x10


class TsWriter:
    """One program with an H.264 track and, if asked for, an Opus stereo track; the track set never changes.

    Continuity counters go on over the tables and over segments, so segments put one behind another are one stream.
    """

    def __init__(self, *, audio: bool) -> None:
        self._pat_section = _section(0x00, _PROGRAM, bytes([0, _PROGRAM, 0xE0 | _PID_PMT >> 8, _PID_PMT & 0xFF]))
        streams = _stream_entry(_STREAM_TYPE_H264, _PID_VIDEO, b"")
        if audio:
            streams += _stream_entry(
                STREAM_TYPE_PRIVATE,
                _PID_AUDIO,
                bytes([DESCRIPTOR_REGISTRATION, 4]) + b"Opus" + bytes([DESCRIPTOR_EXTENSION, 2, EXTENSION_OPUS, 2]),
            )
        clock = bytes([0xE0 | _PID_VIDEO >> 8, _PID_VIDEO & 0xFF, 0xF0, 0])
        self._pmt_section = _section(0x02, _PROGRAM, clock + streams)
        self._counters = {_PID_PAT: 0, _PID_PMT: 0, _PID_VIDEO: 0, _PID_AUDIO: 0}
        self._plain = {
            pid: np.frombuffer(b"".join(_header(pid, 0x10 | count) for count in range(16)), np.uint8).reshape(16, 4)
            for pid in self._counters
        }

    def tables(self) -> bytes:
        """PAT and PMT, a packet each. A reader can begin after them."""
        return self._table(_PID_PAT, self._pat_section) + self._table(_PID_PMT, self._pmt_section)

    def video(self, pts: int, data: bytes, *, keyframe: bool) -> bytes:
        """One coded picture (Annex B); pts in 90 kHz, which is its decode stamp too: there are no B-frames."""
        size = len(data) + 8
        # A declared length lets readers have the picture without waiting for the next; it has 16 bits.
        pes = _pes_header(_STREAM_ID_VIDEO, size if size <= 0xFFFF else 0, pts) + data
        clock = (pts - _CLOCK_LEAD if pts >= _CLOCK_LEAD or pts < 0 else 0) & _STAMP_MASK
        adaptation = bytes([_HAS_CLOCK | (_RANDOM_ACCESS if keyframe else 0)]) + (clock << 15 | 0x7E00).to_bytes(6)
        return self._packets(_PID_VIDEO, pes, adaptation)

    def audio(self, pts: int, data: bytes) -> bytes:
        """One Opus packet with its control header ("Encapsulation of Opus in MPEG-TS", section 4.3.1)."""
        size = len(data)
        control = b"\x7f\xe0" + b"\xff" * (size // 255) + bytes([size % 255])
        pes = _pes_header(_STREAM_ID_PRIVATE, len(control) + size + 8, pts) + control + data
        return self._packets(_PID_AUDIO, pes, b"")

    def _table(self, pid: int, section: bytes) -> bytes:
        counter = self._counters[pid]
        self._counters[pid] = (counter + 1) & 15
        return (_header(pid, 0x10 | counter, starts=True) + b"\x00" + section).ljust(188, b"\xff")

    def _packets(self, pid: int, pes: bytes, adaptation: bytes) -> bytes:
        """``pes`` in packets; ``adaptation`` (flags and fields) goes into the first, padding into the last."""
        counter = self._counters[pid]
        parts: list[bytes | memoryview] = []
        room = _PAYLOAD_BYTES - (1 + len(adaptation) if adaptation else 0)
        if len(pes) < room:
            padded = _padded(adaptation, _PAYLOAD_BYTES - len(pes))
            parts = [_header(pid, 0x30 | counter, starts=True), padded, pes]
            self._counters[pid] = (counter + 1) & 15
            return b"".join(parts)
        field = bytes([len(adaptation)]) + adaptation if adaptation else b""
        parts = [_header(pid, (0x30 if adaptation else 0x10) | counter, starts=True), field, pes[:room]]
        counter += 1
        whole = (len(pes) - room) // _PAYLOAD_BYTES
        if whole:
            packets = np.empty((whole, _PACKET_BYTES), np.uint8)
            packets[:, :4] = self._plain[pid][np.arange(counter, counter + whole) & 15]
            packets[:, 4:] = np.frombuffer(pes, np.uint8, whole * _PAYLOAD_BYTES, room).reshape(whole, _PAYLOAD_BYTES)
            parts.append(packets.data)
            counter += whole
        whole_end = room + whole * _PAYLOAD_BYTES
        if whole_end < len(pes):
            parts.append(_header(pid, 0x30 | counter & 15))
            parts.append(_padded(b"", _PAYLOAD_BYTES - (len(pes) - whole_end)))
            parts.append(pes[whole_end:])
            counter += 1
        self._counters[pid] = counter & 15
        return b"".join(parts)


def _header(pid: int, last: int, *, starts: bool = False) -> bytes:
    return bytes([0x47, (0x40 if starts else 0) | pid >> 8, pid & 0xFF, last])


def _padded(adaptation: bytes, size: int) -> bytes:
    """An adaptation field of exactly ``size`` bytes, its length byte included."""
    if size == 1:
        return b"\x00"
    return (bytes([size - 1]) + (adaptation or b"\x00")).ljust(size, b"\xff")


def _section(table: int, extension: int, body: bytes) -> bytes:
    size = len(body) + 9
    section = bytes([table, 0xB0 | size >> 8, size & 0xFF, extension >> 8, extension & 0xFF, 0xC1, 0, 0]) + body
    return section + crc32_mpeg(section).to_bytes(4)


def _stream_entry(stream_type: int, pid: int, descriptors: bytes) -> bytes:
    return bytes([stream_type, 0xE0 | pid >> 8, pid & 0xFF, 0xF0, len(descriptors)]) + descriptors


def _pes_header(stream_id: int, size: int, pts: int) -> bytes:
    """PES header with a presentation stamp; ``size``: bytes after the length field, 0 for undeclared."""
    stamp = pts & _STAMP_MASK
    return (
        b"\x00\x00\x01"
        + bytes([stream_id, size >> 8, size & 0xFF, 0x84, 0x80, 5, 0x21 | stamp >> 29 & 0x0E])
        + ((stamp >> 14 & 0xFFFE) | 1).to_bytes(2)
        + ((stamp << 1 & 0xFFFE) | 1).to_bytes(2)
    )
