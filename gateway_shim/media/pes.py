"""Puts the PES packets of one track together and says when one is complete, at the earliest moment that shows it.

ISO/IEC 13818-1 section 2.4.3.6. A video PES packet has no declared length, so libavformat waits for the next one: a
frame of delay. But a transport packet is stuffed only when there is nothing left to put into it, which ends the unit
at once; the one in 184 that fills its last packet exactly waits for the next start.
"""

from __future__ import annotations

from dataclasses import dataclass

from .clock import Clock
from .elementary import has_idr, splitter_of
from .psi import Track

PAYLOAD_BYTES = 184
# A coded picture above this is damage: level 5.2 allows 240 Mbit/s, 1 MB per frame at 30 fps.
MAX_UNIT_BYTES = 8 << 20

_NO_COUNTER = -1


@dataclass(frozen=True, slots=True)
class AccessUnit:
    """One coded picture or one audio frame, as a decoder takes it.

    pts, dts: 90 kHz, unwrapped over 33 bits, None where the stream has none; dts is pts where only that is written.
    data: Annex B for H.264, ADTS for AAC, a bare packet for Opus.
    keyframe: a decoder can begin here; audio always.
    discontinuity: units of this track are missing or damaged just before this one.
    """

    track: Track
    pts: int | None
    dts: int | None
    data: bytes
    keyframe: bool
    discontinuity: bool


class PesStream:
    """Assembly of one track. ``parts``, ``room`` and ``next_counter`` are open to the reader's loop over packets.

    room: how many whole payloads may be appended to ``parts`` without a further look.
    next_counter: continuity counter of the next packet, -1 when any will do.
    """

    __slots__ = (
        "_at_once",
        "_clock",
        "_dts",
        "_ended_by_stuffing",
        "_head",
        "_is_open",
        "_lost",
        "_pts",
        "_random_access",
        "_size",
        "_splitter",
        "_tail",
        "continuity_errors",
        "dropped_units",
        "next_counter",
        "parts",
        "room",
        "track",
    )

    def __init__(self, track: Track, clock: Clock) -> None:
        self.track = track
        self._clock = clock
        self._splitter = splitter_of(track.codec)
        self.parts: list[bytes] = []
        self.room = 0
        self.next_counter = _NO_COUNTER
        self.continuity_errors = 0
        self.dropped_units = 0
        self._is_open = False  # between the start of a PES packet and its end
        self._head: bytes | None = None  # its beginning, as long as the PES header is not complete
        self._size: int | None = None  # declared bytes of payload
        self._pts: int | None = None
        self._dts: int | None = None
        self._random_access = False
        self._lost = False  # the next unit follows a loss
        self._tail = b""  # last payload, to know a repeated packet by
        self._at_once = True  # stuffing ends a unit; not so with a muxer that was seen to stuff in the middle
        self._ended_by_stuffing = False

    def packet(
        self, counter: int, starts: bool, payload: bytes, *, random_access: bool, stuffed: bool, restarts: bool
    ) -> list[AccessUnit]:
        """Take one transport packet's payload; the units that it completes.

        random_access, restarts: indicators of the adaptation field (random access, discontinuity).
        stuffed: the packet has padding before its payload.
        """
        if self.next_counter not in (_NO_COUNTER, counter) and not restarts:
            tail = self.parts[-1][-PAYLOAD_BYTES:] if self.parts else self._tail
            if counter == (self.next_counter - 1) & 15 and (payload == tail or payload == self._tail):
                return []  # a packet may be sent twice, section 2.4.3.3
            self.continuity_errors += 1
            self._lose()
        self.next_counter = (counter + 1) & 15
        self._tail = payload
        units: list[AccessUnit] = []
        if starts:
            units = self.end()
            self._is_open = True
            self._ended_by_stuffing = False
            self._head = b""
            self._random_access = random_access
        elif not self._is_open:
            if self._ended_by_stuffing:
                # It was not the end: this muxer stuffs in the middle. What went out was cut short.
                self._ended_by_stuffing = self._at_once = False
                self._lose()
                self.dropped_units += 1
            return units
        if self._head is not None:
            if not self._begin(self._head + payload):
                return units
        else:
            self.parts.append(payload)
        received = sum(map(len, self.parts))
        if self._size is None:
            self.room = (MAX_UNIT_BYTES - received) // PAYLOAD_BYTES
            if self.room <= 0:
                self._lose()
            elif stuffed and self._at_once:
                units += self._finish()
                self._ended_by_stuffing = True
        elif received >= self._size:
            units += self._finish()
        else:
            self.room = (self._size - received - 1) // PAYLOAD_BYTES
        return units

    def end(self) -> list[AccessUnit]:
        """The next PES packet begins, or the segment has ended: what has no declared length is complete by that."""
        if not self._is_open:
            return []
        if self._head is None and self._size is None:
            return self._finish()
        self._lose()
        return []

    def restart(self) -> None:
        """A fresh muxer goes on with the stream: its counter begins anywhere and that is no error."""
        self.next_counter = _NO_COUNTER
        self._ended_by_stuffing = False

    def gap(self) -> None:
        """Bytes were lost."""
        self._lose()
        self.restart()

    def _lose(self) -> None:
        if self._is_open:
            self.dropped_units += 1
        self._close()
        self._lost = True
        self._ended_by_stuffing = False
        self._splitter.reset()

    def _close(self) -> None:
        self._is_open = False
        self._head = None
        self._size = None
        self.parts = []
        self.room = 0

    def _begin(self, head: bytes) -> bool:
        """Read the PES header; False while it is incomplete, or when it is none."""
        if len(head) < 9:
            self._head = head
            return False
        body = 9 + head[8]
        if head[:3] != b"\x00\x00\x01" or head[6] & 0xC0 != 0x80:
            self._lose()
            return False
        if len(head) < body:
            self._head = head
            return False
        declared = head[4] << 8 | head[5]
        flags = head[7]
        pts = _stamp(head, 9) if flags & 0x80 and head[8] >= 5 else None
        dts = _stamp(head, 14) if flags & 0xC0 == 0xC0 and head[8] >= 10 else None
        if dts is not None:
            self._dts = self._clock.unwrap(dts)
        self._pts = None if pts is None else self._clock.unwrap(pts)
        if dts is None:
            self._dts = self._pts
        self._head = None
        self._size = max(declared + 6 - body, 0) if declared else None
        self.parts = [head[body:]]
        return True

    def _finish(self) -> list[AccessUnit]:
        data = b"".join(self.parts)
        if self._size is not None:
            data = data[: self._size]
        pts, dts, random_access, lost = self._pts, self._dts, self._random_access, self._lost
        self._close()
        if self.track.codec == "h264":
            if not data:
                return []
            self._lost = False
            return [AccessUnit(self.track, pts, dts, data, random_access or has_idr(data), lost)]
        units = []
        for delay, part in self._splitter.split(data):
            at = None if pts is None else pts + delay
            units.append(AccessUnit(self.track, at, at, part, True, self._lost))
            self._lost = False
        return units


def _stamp(data: bytes, at: int) -> int | None:
    """33 bits in five bytes with three marker bits between; None when a marker is wrong, which is damage."""
    a, b, c, d, e = data[at : at + 5]
    if not a & c & e & 1:
        return None
    return (a >> 1 & 7) << 30 | b << 22 | c >> 1 << 15 | d << 7 | e >> 1
