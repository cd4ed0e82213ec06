"""Edits of MPEG transport streams at the byte level, for inputs that no encoder would write."""

from __future__ import annotations

from collections.abc import Iterator

PACKET = 188
MASK = (1 << 33) - 1


def shifted(data: bytes, ticks: int) -> bytes:
    """Every PTS, DTS and PCR moved by ``ticks`` of 90 kHz, modulo 33 bits."""
    out = bytearray(data)
    for at in range(0, len(out), PACKET):
        pcr, pes = _fields(out, at)
        if pcr is not None:
            base = int.from_bytes(out[pcr : pcr + 5], "big") >> 7
            rest = out[pcr + 4] & 0x7F
            out[pcr : pcr + 5] = ((((base + ticks) & MASK) << 7) | rest).to_bytes(5, "big")
        for stamp in _stamps(out, pes):
            _write_stamp(out, stamp, (_read_stamp(out, stamp) + ticks) & MASK)
    return bytes(out)


def damaged_pts(data: bytes, unit: int, ticks: int) -> bytes:
    """The PTS of one unit of video (stream ids 0xE0 to 0xEF), counted from 0, moved by ``ticks``; its DTS stays."""
    out = bytearray(data)
    video = [pes for _, pes in _unit_starts(data) if 0xE0 <= data[pes + 3] <= 0xEF]
    pts, dts = _stamps(out, video[unit])
    assert pts != dts
    _write_stamp(out, pts, (_read_stamp(out, pts) + ticks) & MASK)
    return bytes(out)


def without_sound_before(data: bytes, pts: int) -> bytes:
    """Without the packets of sound (stream ids 0xC0 to 0xDF) that begin before ``pts``; the tables still name it."""
    sound_pid = next(pid for pid, unit in _unit_starts(data) if 0xC0 <= data[unit + 3] <= 0xDF)
    out = bytearray()
    keep = False
    for at in range(0, len(data), PACKET):
        pid = int.from_bytes(data[at + 1 : at + 3], "big") & 0x1FFF
        if pid == sound_pid:
            _, pes = _fields(data, at)
            if pes is not None:
                keep = _read_stamp(data, next(_stamps(data, pes))) >= pts
            if not keep:
                continue
        out += data[at : at + PACKET]
    return bytes(out)


def _unit_starts(data: bytes) -> Iterator[tuple[int, int]]:
    for at in range(0, len(data), PACKET):
        _, pes = _fields(data, at)
        if pes is not None:
            yield int.from_bytes(data[at + 1 : at + 3], "big") & 0x1FFF, pes


def _fields(data: bytes | bytearray, at: int) -> tuple[int | None, int | None]:
    """Positions of the PCR and of the PES header in the packet at ``at``."""
    control = data[at + 3] >> 4 & 3
    payload, pcr = at + 4, None
    if control & 2:
        length = data[at + 4]
        if length and data[at + 5] & 0x10:
            pcr = at + 6
        payload += 1 + length
    starts = data[at + 1] & 0x40 and control & 1 and data[payload : payload + 3] == b"\0\0\1"
    return pcr, payload if starts else None


def _stamps(data: bytes | bytearray, pes: int | None) -> Iterator[int]:
    if pes is None:
        return
    flags = data[pes + 7] >> 6
    if flags & 2:
        yield pes + 9
    if flags == 3:
        yield pes + 14


def _read_stamp(data: bytes | bytearray, at: int) -> int:
    return (
        (data[at] >> 1 & 7) << 30
        | data[at + 1] << 22
        | (data[at + 2] >> 1) << 15
        | data[at + 3] << 7
        | data[at + 4] >> 1
    )


def _write_stamp(data: bytearray, at: int, value: int) -> None:
    data[at] = data[at] & 0xF1 | (value >> 30 & 7) << 1
    data[at + 1] = value >> 22 & 0xFF
    data[at + 2] = (value >> 15 & 0x7F) << 1 | 1
    data[at + 3] = value >> 7 & 0xFF
    data[at + 4] = (value & 0x7F) << 1 | 1
