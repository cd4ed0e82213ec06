"""Cuts access units out of a live MPEG transport stream, each as soon as its last byte is there.

libavformat on a live stream adds 70 ms to every frame and 0.7 s to the first (hot-path.md section 5); this adds none,
for 17 us per frame at 3 Mbit/s (75 us when fed in pieces of 1400 bytes). Any bytes are survived: what is damaged is
counted and left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .clock import Clock
from .pes import PAYLOAD_BYTES, AccessUnit, PesStream
from .psi import Kind, SectionReader, Track, first_program, pat_reader, pmt_reader, program_tracks

__all__ = ["AccessUnit", "Track", "TsCounters", "TsReader"]

PACKET_BYTES = 188
_SYNC = 0x47
# After a loss of sync a packet counts as one when this many further packets begin at the right distance: a stray 0x47
# comes once in 256 bytes, three in step once in 90 KB.
_SYNC_CHECKS = 2
_SYNC_SPAN = _SYNC_CHECKS * PACKET_BYTES

_PID_PAT = 0x0000
_PID_NULL = 0x1FFF
# Parts of a packet's first four bytes, ISO/IEC 13818-1 section 2.4.3.2.
_ERROR = 0x0080_0000
_STARTS = 0x0040_0000
_SCRAMBLED = 0xC0
_ADAPTATION = 0x20
_PAYLOAD = 0x10
_NOT_COUNTER = 0xFFFF_FFF0


@dataclass(slots=True)
class TsCounters:
    """packets: transport packets read. sync_losses: times the packet rhythm was lost. continuity_errors: times that
    packets of a track were missing. dropped_units: access units left out because parts of them were missing."""

    packets: int = 0
    sync_losses: int = 0
    continuity_errors: int = 0
    dropped_units: int = 0


class TsReader:
    """One transport stream, over any number of segments. Never raises; what comes out depends on the bytes alone, not
    on how they are cut into calls. Units come from the first video and the first audio track of the first program.
    """

    def __init__(self) -> None:
        self.tracks: tuple[Track, ...] = ()  # all that the program table names and we know, in its order
        self._rest = b""
        self._in_sync = True
        self._clock = Clock()
        self._pat = pat_reader()
        self._pmt: SectionReader = pmt_reader()
        self._pmt_pid: int | None = None
        self._streams: dict[int, PesStream] = {}  # by PID
        # The same by the header of a packet with nothing but payload, counter bits off: one look-up in the loop below
        # finds the stream and rules out every special case.
        self._plain: dict[int, PesStream] = {}
        self._gone = TsCounters()  # counts of tracks that are no more, packets and losses of sync

    def resume(self, source: int) -> None:
        """Go on with a stream whose latest stamp, unwrapped, another reader has seen."""
        self._clock.resume(source)

    @property
    def counters(self) -> TsCounters:
        streams = self._streams.values()
        return TsCounters(
            packets=self._gone.packets,
            sync_losses=self._gone.sync_losses,
            continuity_errors=self._gone.continuity_errors + sum(stream.continuity_errors for stream in streams),
            dropped_units=self._gone.dropped_units + sum(stream.dropped_units for stream in streams),
        )

    def feed(self, data: bytes) -> list[AccessUnit]:
        """Take the next bytes of a segment; the units that they complete, in the order of their last bytes."""
        units: list[AccessUnit] = []
        data = self._rest + data
        at = 0
        while True:
            if not self._in_sync:
                found = _find_sync(data, at)
                at = abs(found)
                if found < 0 or len(data) - at <= _SYNC_SPAN:
                    break
                self._in_sync = True
            whole = (len(data) - at) // PACKET_BYTES
            starts = data[at : at + whole * PACKET_BYTES : PACKET_BYTES]
            good = whole - len(starts.lstrip(b"\x47"))
            self._packets(data, at, good, units)
            at += good * PACKET_BYTES
            if good == whole:
                break
            # Whatever moved the packets apart did so inside the last one, whose payload is wrong without its counter
            # saying so.
            for stream in self._streams.values():
                stream.gap()
            self._in_sync = False
            self._gone.sync_losses += 1
        self._rest = data[at:]
        return units

    def end_segment(self) -> list[AccessUnit]:
        """The segment has ended in good order: what its end completes. A fresh muxer may write the next one."""
        units: list[AccessUnit] = []
        rest, self._rest = self._rest, b""
        if not self._in_sync:
            rest = self._end_out_of_sync(rest, units)
        if rest:  # cut inside a packet: whoever was being received is incomplete
            for stream in self._streams.values():
                stream.gap()
        for stream in self._streams.values():
            units += stream.end()
            stream.restart()
        self._restart_tables()
        return units

    def gap(self) -> None:
        """Bytes were lost, or the segment was given up: drop what is incomplete. The next units are marked."""
        self._rest = b""
        self._in_sync = True
        for stream in self._streams.values():
            stream.gap()
        self._restart_tables()

    def _restart_tables(self) -> None:
        self._pat.reset()
        self._pmt.reset()

    def _end_out_of_sync(self, rest: bytes, units: list[AccessUnit]) -> bytes:
        """Too few bytes are left for the usual check: take whole packets that reach exactly to the end."""
        self._in_sync = True
        for whole in range(len(rest) // PACKET_BYTES, 0, -1):
            at = len(rest) - whole * PACKET_BYTES
            if rest[at::PACKET_BYTES] == b"\x47" * whole:
                self._packets(rest, at, whole, units)
                return b""
        return rest

    def _packets(self, data: bytes, at: int, count: int, units: list[AccessUnit]) -> None:
        self._gone.packets += count
        if not count:
            return
        stream_of = self._plain.get
        headers = np.ndarray(count, ">u4", data, at, PACKET_BYTES).astype(np.uint32)
        payloads = np.ndarray((count, PAYLOAD_BYTES), np.uint8, data, at + 4, (PACKET_BYTES, 1))
        # Where a header is not the one before with its counter one further. What lies between is of one kind.
        breaks = np.flatnonzero(headers[1:] ^ (headers[:-1] & _NOT_COUNTER | headers[:-1] + 1 & 15)) + 1
        first = 0
        for end in (*breaks.tolist(), count):
            while first < end:
                header = int(headers[first])
                stream = stream_of(header & _NOT_COUNTER)
                if stream is not None and stream.room > 0 and stream.next_counter == header & 15:
                    taken = min(end - first, stream.room)
                    stream.parts.append(payloads[first : first + taken].tobytes())
                    stream.room -= taken
                    stream.next_counter = (header + taken) & 15
                    first += taken
                else:
                    self._packet(data, at + first * PACKET_BYTES, header, units)
                    first += 1

    def _packet(self, data: bytes, at: int, header: int, units: list[AccessUnit]) -> None:
        pid = header >> 8 & 0x1FFF
        if pid == _PID_NULL or header & (_ERROR | _SCRAMBLED):
            return
        is_table = pid in (_PID_PAT, self._pmt_pid)
        stream = self._streams.get(pid)
        if stream is None and not is_table:
            return
        begin, random_access, restarts, stuffed = at + 4, False, False, False
        if header & _ADAPTATION:
            size = data[at + 4]
            begin = at + 5 + size
            flags = data[at + 5] if size else 0
            restarts, random_access = bool(flags & 0x80), bool(flags & 0x40)
            if begin > at + PACKET_BYTES:
                return
            stuffed = size == 0 or size > _adaptation_used(data, at, flags)
        if not header & _PAYLOAD:
            if stream is not None and restarts:
                stream.restart()
            return
        payload = data[begin : at + PACKET_BYTES]
        counter, starts = header & 15, bool(header & _STARTS)
        if is_table:
            self._table(pid, counter, starts, payload, units)
        elif stream is not None:
            units += stream.packet(
                counter, starts, payload, random_access=random_access, stuffed=stuffed, restarts=restarts
            )

    def _table(self, pid: int, counter: int, starts: bool, payload: bytes, units: list[AccessUnit]) -> None:
        if pid == _PID_PAT:
            for pat in self._pat.packet(counter, starts, payload):
                program = first_program(pat)
                if program is not None and program != self._pmt_pid:
                    self._pmt_pid = program
                    self._pmt = pmt_reader()
        else:
            for pmt in self._pmt.packet(counter, starts, payload):
                self._use(program_tracks(pmt), units)

    def _use(self, tracks: tuple[Track, ...], units: list[AccessUnit]) -> None:
        """A program table came. Tracks that are in it as before go on undisturbed; those that are not have ended."""
        self.tracks = tracks
        chosen: dict[Kind, Track] = {}
        for track in tracks:
            chosen.setdefault(track.kind, track)
        for pid, stream in list(self._streams.items()):
            if stream.track not in chosen.values():
                units += stream.end()
                self._gone.continuity_errors += stream.continuity_errors
                self._gone.dropped_units += stream.dropped_units
                del self._streams[pid]
        for track in chosen.values():
            if track.pid not in self._streams:
                self._streams[track.pid] = PesStream(track, self._clock)
        self._plain.clear()
        for pid, stream in self._streams.items():
            self._plain[_SYNC << 24 | pid << 8 | _PAYLOAD] = stream


def _find_sync(data: bytes, at: int) -> int:
    """Where packets begin again, at or after ``at``: an offset with enough checked packets after it, or minus the
    offset from where to look again when more bytes are there."""
    while (at := data.find(b"\x47", at)) >= 0:
        known = data[at : at + _SYNC_SPAN + 1 : PACKET_BYTES]
        if known == b"\x47" * len(known):
            return at if len(known) > _SYNC_CHECKS else -at
        at += 1
    return -len(data)


def _adaptation_used(data: bytes, at: int, flags: int) -> int:
    """Bytes of an adaptation field (after its length) that carry something; the rest is stuffing."""
    used = 1 + (6 if flags & 0x10 else 0) + (6 if flags & 0x08 else 0) + (1 if flags & 0x04 else 0)
    end = at + PACKET_BYTES
    for flag in (0x02, 0x01):  # private data, extension: each begins with its length
        if flags & flag and at + 5 + used < end:
            used += 1 + data[at + 5 + used]
    return used
