"""What is inside a PES packet: key frames of H.264, frames of AAC, packets of Opus.

A splitter takes the payload of one PES packet and gives ``(delay, data)`` pairs: one per unit that a decoder takes,
``delay`` in 90 kHz ticks after the stamp of the PES packet.
"""

from __future__ import annotations

from typing import Protocol

from .clock import TICKS_PER_S

_NAL_SLICE = 1
_NAL_IDR = 5


def has_idr(data: bytes) -> bool:
    """Whether an access unit in Annex B form is an IDR picture. Looks no further than its first slice."""
    at = data.find(b"\x00\x00\x01")
    while 0 <= at < len(data) - 3:
        kind = data[at + 3] & 31
        if _NAL_SLICE <= kind <= _NAL_IDR:
            return kind == _NAL_IDR
        at = data.find(b"\x00\x00\x01", at + 3)
    return False


class Splitter(Protocol):
    def split(self, data: bytes) -> list[tuple[int, bytes]]: ...

    def reset(self) -> None:
        """Bytes are missing before the next payload."""


class Whole:
    """Codecs whose decoder takes a PES payload as it is."""

    def split(self, data: bytes) -> list[tuple[int, bytes]]:
        return [(0, data)]

    def reset(self) -> None:
        pass


class Opus:
    """Strips the control header of each packet ("Encapsulation of Opus in MPEG-TS", section 4.3.1).

    The trims are left in: the stamp is that of the first sample decoded, so the time is right with them.
    """

    def split(self, data: bytes) -> list[tuple[int, bytes]]:
        packets = []
        at, samples, size_of_data = 0, 0, len(data)
        while at + 3 <= size_of_data and data[at] == 0x7F and data[at + 1] & 0xE0 == 0xE0:
            flags = data[at + 1]
            at += 2
            size = 0
            while at < size_of_data and data[at] == 0xFF:
                size += 255
                at += 1
            size += data[at] if at < size_of_data else 0
            at += 1 + (2 if flags & 0x10 else 0) + (2 if flags & 0x08 else 0)  # start and end trim
            if flags & 0x04 and at < size_of_data:  # control extension
                at += 1 + data[at]
            packet = data[at : at + size]
            if len(packet) < size or not packet:
                break
            packets.append((samples * TICKS_PER_S // 48_000, packet))
            samples += opus_samples(packet)
            at += size
        return packets

    def reset(self) -> None:
        pass


# Frame durations in samples at 48 kHz by configuration, RFC 6716 table 2.
_OPUS_FRAME = (480, 960, 1920, 2880) * 3 + (480, 960) * 2 + (120, 240, 480, 960) * 4


def opus_samples(packet: bytes) -> int:
    """Duration of an Opus packet in samples at 48 kHz, from its first two bytes (RFC 6716 section 3.1)."""
    code = packet[0] & 3
    frames = (1, 2, 2, packet[1] & 63 if len(packet) > 1 else 0)[code]
    return _OPUS_FRAME[packet[0] >> 3] * frames


_ADTS_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_ADTS_HEADER_BYTES = 7
_ADTS_SAMPLES = 1024  # per raw data block


class Adts:
    """Cuts AAC in ADTS frames (ISO/IEC 13818-7 section 6.2). A frame may go over the end of a PES packet.

    The stamp of a PES packet belongs to the first frame that begins in it (ISO/IEC 13818-1 section 2.4.3.7).
    """

    def __init__(self) -> None:
        self._rest = b""

    def reset(self) -> None:
        self._rest = b""

    def split(self, data: bytes) -> list[tuple[int, bytes]]:
        carried = len(self._rest)
        data = self._rest + data
        self._rest = b""
        frames: list[tuple[int, bytes]] = []
        at = 0
        blocks = 0  # raw data blocks since the first frame that begins in this payload
        while (at := _find_adts(data, at)) >= 0:
            header = data[at : at + _ADTS_HEADER_BYTES]
            if len(header) < _ADTS_HEADER_BYTES:
                self._rest = data[at:]
                break
            size = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
            index = header[2] >> 2 & 15
            if size <= _ADTS_HEADER_BYTES or index >= len(_ADTS_RATES):
                at += 1
                continue
            if at + size > len(data):
                self._rest = data[at:]
                break
            rate = _ADTS_RATES[index]
            count = (header[6] & 3) + 1
            if at < carried:  # began in the packet before: one frame earlier than this stamp
                frames.append((-_ticks(count, rate), data[at : at + size]))
            else:
                frames.append((_ticks(blocks, rate), data[at : at + size]))
                blocks += count
            at += size
        return frames


def _ticks(blocks: int, rate: int) -> int:
    return round(blocks * _ADTS_SAMPLES * TICKS_PER_S / rate)


def _find_adts(data: bytes, at: int) -> int:
    """Where the next ADTS frame can begin: 12 sync bits and layer 0; -1 for nowhere."""
    while (at := data.find(b"\xff", at)) >= 0:
        if at + 1 == len(data) or data[at + 1] & 0xF6 == 0xF0:
            return at
        at += 1
    return -1


def splitter_of(codec: str) -> Splitter:
    if codec == "opus":
        return Opus()
    return Adts() if codec == "aac" else Whole()
