"""The frames of one stream between decoder and encoder, in order, each waiting for its outcome.

Identity is the frame_id, never a position: the engine may answer late, twice or not at all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import av

from ..media.colour import Colour
from .ledger import Outcome


@dataclass(slots=True, eq=False)
class Entry:
    """One received picture and what is known of its fate."""

    frame_id: int
    pts: int  # output pts, 90 kHz
    frame: av.VideoFrame  # yuv420p of even size, samples read-only; what a pass-through publishes
    colour: Colour
    arrived_at: float  # loop time at which its last byte was decoded
    due: float  # loop time at which something must go out for it
    outcome: Outcome | None = None
    reason: str = ""
    result: av.VideoFrame | None = None  # the graph's picture when processed


class Mailbox:
    """Ordered and keyed; `room` is its bound, for which the producer waits.

    One producer, one taker (the engine's sender), one popper (the output).
    """

    def __init__(self, limit: int) -> None:
        #: The most that wait; the producer may change it before it puts. Too few for what comes within the latency
        #: budget hold the producer up again and again; see `Places`.
        self.limit = limit
        #: The longest latency budget for which they are enough, in seconds.
        self.longest_s = float("inf")
        self._entries: deque[Entry] = deque()  # by arrival; leave by pop
        self._by_id: dict[int, Entry] = {}
        self._unsent: deque[Entry] = deque()
        self._closed = False
        self._refusal: str | None = None  # why nothing is waiting for the engine now
        self._arrived = asyncio.Event()  # for the taker
        self._head = asyncio.Event()  # for the popper
        self._left = asyncio.Event()  # for the producer
        #: What the popper needs for a picture, from taking it to its last byte: `Entry.due` is when that must be out,
        #: so a result that is not there so much earlier is late. May change at any time.
        self.lead_s = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    async def room(self) -> None:
        """Wait until there is room: back-pressure towards the channel when the output is slower than the input."""
        while len(self._entries) >= self.limit:
            self._left.clear()
            await self._left.wait()

    def put(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._by_id[entry.frame_id] = entry
        if self._refusal is not None:
            entry.outcome, entry.reason = Outcome.PASSED_THROUGH, self._refusal
        else:
            self._unsent.append(entry)
            self._arrived.set()
        self._head.set()

    def refuse(self, reason: str) -> None:
        """Nothing will come from the engine: settle what waits and what comes, at once, as passed through."""
        self._refusal = reason
        self._unsent.clear()
        for entry in self._entries:
            if entry.outcome is None:
                entry.outcome, entry.reason = Outcome.PASSED_THROUGH, reason
        self._head.set()

    def accept(self) -> None:
        """The engine takes frames (again)."""
        self._refusal = None

    async def take(self, needed_s: float) -> Entry:
        """The oldest frame that the engine can still finish in time, ``needed_s`` before it is due.

        Frames that cannot make it are settled as late, which keeps the cadence at the latency budget when the
        graph is slower than the input.
        """
        now = asyncio.get_running_loop().time
        while True:
            while self._unsent:
                entry = self._unsent.popleft()
                if entry.outcome is not None:
                    continue
                if now() + needed_s + self.lead_s > entry.due and self._unsent:
                    entry.outcome, entry.reason = Outcome.DROPPED, "late"
                    self._head.set()
                    continue
                return entry
            self._arrived.clear()
            await self._arrived.wait()

    def take_waiting(self, needed_s: float) -> Entry | None:
        """Another frame as `take` gives it, if there is one now."""
        now = asyncio.get_running_loop().time()
        while self._unsent and self._unsent[0].outcome is not None:
            self._unsent.popleft()
        if not self._unsent or now + needed_s + self.lead_s > self._unsent[0].due:
            return None  # or `take` decides
        return self._unsent.popleft()

    def resolve(
        self, frame_id: int, outcome: Outcome, reason: str = "", result: av.VideoFrame | None = None
    ) -> Entry | None:
        """Record the engine's answer; None when the frame is gone or has an outcome (the answer came too late)."""
        entry = self._by_id.get(frame_id)
        if entry is None or entry.outcome is not None:
            return None
        entry.outcome, entry.reason, entry.result = outcome, reason, result
        self._head.set()
        return entry

    async def pop(self) -> Entry | None:
        """The next frame in order, as soon as it has an outcome or is due; None after `close` when all are out."""
        loop = asyncio.get_running_loop()
        while True:
            self._head.clear()
            if self._entries:
                head = self._entries[0]
                if head.outcome is None and loop.time() >= head.due - self.lead_s:
                    head.outcome, head.reason = Outcome.DROPPED, "late"
                if head.outcome is not None:
                    self._take_out(head)
                    return head
                try:
                    async with asyncio.timeout_at(head.due - self.lead_s):
                        await self._head.wait()
                except TimeoutError:
                    continue
            elif self._closed:
                return None
            else:
                await self._head.wait()

    def settled(self, most: int) -> list[Entry]:
        """Those that come next and have an outcome already, for who has just popped one."""
        found: list[Entry] = []
        while len(found) < most and self._entries and self._entries[0].outcome is not None:
            found.append(self._entries[0])
            self._take_out(found[-1])
        return found

    def _take_out(self, head: Entry) -> None:
        self._entries.popleft()
        del self._by_id[head.frame_id]
        # Nobody takes while the engine grants no credit; what is settled must not wait for that.
        while self._unsent and self._unsent[0].outcome is not None:
            self._unsent.popleft()
        self._left.set()

    def close(self) -> None:
        """No frame comes any more; `pop` ends when the rest is out."""
        self._closed = True
        self._head.set()

    def clear(self) -> list[Entry]:
        """Take out everything that is left, at the end of the stream, for the ledger."""
        left = list(self._entries)
        self._entries.clear()
        self._by_id.clear()
        self._unsent.clear()
        self._left.set()
        return left
