"""What the broker keeps of a channel: five segments in memory, and everybody who waits for one of them to change.

Rules of the ring: go-livepeer trickle/trickle_server.go. Belongs to one event loop; there are no locks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ..trickle.wire import MAX_LAG_SEGMENTS, SEQ_CURRENT, SEQ_NEXT


class Signal:
    """Wakes all who wait for a change; they look for themselves what it is."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def fire(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        """Returns at the next ``fire``. Look first, and let no await lie between looking and waiting."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)


@dataclass(slots=True)
class Counters:
    """What happened on one channel, since it was created."""

    gets: int = 0
    posts: int = 0
    nexts: int = 0  # GET /next
    deletes: int = 0  # of single segments
    segments: int = 0  # whose first byte arrived
    bytes_in: int = 0
    bytes_out: int = 0
    outside_window: int = 0  # GETs answered 470
    refused_posts: int = 0  # answered early: the segment was closed before the first byte
    discarded_bytes: int = 0  # written to a segment that was closed meanwhile
    aborted_posts: int = 0  # the client left before the end of the body
    continues: int = 0  # interim 100 responses


class Segment:
    """Bytes of one index. Grows until closed; readers hold it, so it outlives its place in the ring."""

    __slots__ = ("at_work", "changed", "chunks", "closed", "seq", "size")

    def __init__(self, seq: int) -> None:
        self.seq = seq
        self.chunks: list[bytes] = []  # as they came; relayed by reference
        self.size = 0  # bytes in all chunks
        self.closed = False  # no more bytes will be accepted
        self.at_work: Counter[str] = Counter()  # open requests by method, idle ones included
        self.changed = Signal()

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)

    def write(self, data: bytes) -> bool:
        """False when the segment was closed meanwhile; the bytes are lost then."""
        if self.closed:
            return False
        self.chunks.append(data)
        self.size += len(data)
        self.changed.fire()
        return True

    def close(self) -> None:
        self.closed = True
        self.changed.fire()


@dataclass(slots=True)
class Channel:
    """A ring of five segments, a MIME type, and the index that is written next."""

    name: str
    mime: str
    written_at: float  # clock of the broker: when a segment last started, or the channel was created
    next_write: int = 0
    closed: bool = False
    counters: Counters = field(default_factory=Counters)
    changed: Signal = field(default_factory=Signal)
    _ring: list[Segment | None] = field(default_factory=lambda: [None] * MAX_LAG_SEGMENTS)

    def segment(self, seq: int) -> Segment | None:
        """The segment with this index, if the ring holds it."""
        held = self._ring[seq % MAX_LAG_SEGMENTS]
        return held if held is not None and held.seq == seq else None

    def for_reading(self, seq: int) -> Segment | None:
        """Resolve -1 and -2; None is the answer 470. The next index may be read before it is written, and so may
        index 1 of a fresh channel: a reader connects to it while index 0 has no bytes yet."""
        if seq == SEQ_NEXT:
            seq = self.next_write
        elif seq == SEQ_CURRENT:
            seq = max(self.next_write - 1, 0)
        ahead = seq == self.next_write or (seq == 1 and self.next_write == 0)
        return self.segment(seq) or (self._place(seq) if ahead and not self.closed else None)

    def for_writing(self, seq: int) -> Segment:
        """Resolve -1. Whatever else sits in the slot is closed and dropped, be it older or newer."""
        if seq == SEQ_NEXT:
            seq = self.next_write
        return self.segment(seq) or self._place(seq)

    def _place(self, seq: int) -> Segment:
        slot = seq % MAX_LAG_SEGMENTS
        if (evicted := self._ring[slot]) is not None:
            evicted.close()
        segment = self._ring[slot] = Segment(seq)
        return segment

    def started(self, seq: int, now: float) -> None:
        """First byte of ``seq``, or the end of a POST without any. May move the write head backwards, as upstream."""
        self.next_write = seq + 1
        self.written_at = now

    def at_work(self, method: str, seq: int) -> int:
        """How many requests with this method are open on the segment."""
        segment = self.segment(seq)
        return 0 if segment is None else segment.at_work[method]

    def reset(self, seq: int) -> None:
        """Close all that lies before ``seq``: releases readers of segments that nobody will finish."""
        for held in self._ring:
            if held is not None and held.seq < seq:
                held.close()

    def close(self) -> None:
        """The order matters: who is woken by a segment's end looks at ``closed``."""
        self.closed = True
        for held in self._ring:
            if held is not None:
                held.close()
        self._ring = [None] * MAX_LAG_SEGMENTS
        self.changed.fire()

    async def wait_for(self, condition: Callable[[Channel], bool]) -> None:
        """Until ``condition`` holds: for tests. Raises LookupError when the channel ends before."""
        while not condition(self):
            if self.closed:
                raise LookupError(f"channel {self.name} ended")
            await self.changed.wait()
