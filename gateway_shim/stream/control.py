"""Updates from the control channel: read at once, applied in order.

Reading does not wait for applying. An update may wait for a frame, or for an engine that boots; a reader that waited
with it would fall out of the broker's five segments and lose the last update, the one that counts. Nor does an update
wait for the answer to the one before: those that wait together go to the engine together.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import HeadraceError
from ..trickle.control import control_messages
from ..trickle.subscriber import Subscriber
from .events import Events

logger = logging.getLogger(__name__)

#: Updates that wait to be applied. A client that sends more while nothing is applied loses its oldest, with an event.
MAX_WAITING = 256

#: Updates under way at one time.
MAX_APPLYING = 64


class ControlUpdates:
    """``apply`` gets each JSON value and raises a HeadraceError for what it refuses."""

    def __init__(self, subscriber: Subscriber, apply: Callable[[Any], Awaitable[object]], events: Events) -> None:
        self._subscriber = subscriber
        self._apply = apply
        self._events = events
        self._waiting: deque[tuple[int, Any]] = deque()  # index of the segment, value
        self._unfinished: set[int] = set()
        self._arrived = asyncio.Event()

    @property
    def done_seq(self) -> int | None:
        """Index of the last segment up to which every update was applied or refused; None before the first."""
        return min(self._unfinished) - 1 if self._unfinished else self._subscriber.read_seq

    async def run(self) -> str:
        """Until the channel is over; returns why. What still waits then is not applied: the stream ends."""
        applier = asyncio.create_task(self._apply_waiting(), name="apply control updates")
        try:
            async for message in control_messages(self._subscriber):
                if len(self._waiting) == MAX_WAITING:
                    self._unfinished.discard(self._waiting.popleft()[0])
                    self._events.error("update_lost", f"more than {MAX_WAITING} updates wait; the oldest was dropped")
                seq = self._subscriber.read_seq or 0
                self._unfinished.add(seq)
                self._waiting.append((seq, message))
                self._arrived.set()
        finally:
            applier.cancel()
            await asyncio.gather(applier, return_exceptions=True)
        return f"the control channel is over: {self._subscriber.closed_reason}"

    async def _apply_waiting(self) -> None:
        room = asyncio.Semaphore(MAX_APPLYING)
        async with asyncio.TaskGroup() as applying:
            while True:
                self._arrived.clear()
                while self._waiting:
                    await room.acquire()
                    task = applying.create_task(self._apply_one(*self._waiting.popleft()), name="control update")
                    task.add_done_callback(lambda _: room.release())
                await self._arrived.wait()

    async def _apply_one(self, seq: int, message: Any) -> None:
        try:
            await self._apply(message)
        except HeadraceError as exc:
            self._events.error("update_refused", exc.message, errors=[each.as_json() for each in exc.violations])
        except Exception:  # an update that we failed to handle is refused; the stream does not pay for our bug
            incident = uuid.uuid4().hex[:8]
            logger.exception("a control update failed, incident %s", incident)
            self._events.error("update_refused", f"internal error, incident {incident}; nothing was changed")
        self._unfinished.discard(seq)
