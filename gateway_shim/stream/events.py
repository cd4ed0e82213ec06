"""What the gateway is told about one stream: one JSON object per segment of the events channel.

The gateway gives a worker up after 30 s without an event (protocol.md 1.8), so a status goes out at once and then
every ten seconds, whatever the engine does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ..trickle.publisher import Publisher
from ..trickle.wire import ChannelClosed, ChannelError

logger = logging.getLogger(__name__)

STATUS_EVERY_S = 10.0

#: Events waiting for a slow channel; beyond it the oldest go, since a gateway wants the present.
MAX_WAITING = 64

#: Error events of one kind in a second: one of what may come with every frame, since the counters hold the rest. Of
#: what answers a caller, who has no other answer on a control channel, as many as the queue has room for.
ERROR_EVERY_S = 1.0
ANSWERS = frozenset({"update_refused"})
MOST_ANSWERS = MAX_WAITING // 2

#: Findings in one error event; a gateway keeps events, and a body of megabytes may have one for each of its keys.
MAX_ERRORS = 20

STREAM_EVENTS = "ai_stream_events"
STREAM_TRACE = "stream_trace"


def now_ms() -> int:
    return round(time.time() * 1000)


class Events:
    """Writes events until cancelled. Without an events channel it only keeps the last few for the status page."""

    def __init__(self, publisher: Publisher | None, status: Callable[[], Mapping[str, Any]]) -> None:
        self._publisher = publisher
        self._status = status
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._wake = asyncio.Event()
        self._told: dict[str, tuple[float, int]] = {}  # by reason, since when and how many within ERROR_EVERY_S
        self._left_out: dict[str, int] = {}  # by reason, since the last one that was told
        self.recent: deque[dict[str, Any]] = deque(maxlen=20)

    def attach(self, publisher: Publisher) -> None:
        """The channel to write to; before `run`."""
        self._publisher = publisher

    def send(self, kind: str, payload: Mapping[str, Any] | None = None, *, queue: str = STREAM_EVENTS) -> None:
        """Queue one event of type ``kind``; never blocks, never raises."""
        event = {"type": kind, **(payload or {})}
        event.setdefault("timestamp", now_ms())
        if kind != "status":
            self.recent.append(event)
        self._waiting.append(json.dumps({"event": event, "queue_event_type": queue}).encode())
        self._wake.set()

    def trace(self, kind: str) -> None:
        """A milestone, in the form that gateways chart."""
        self.send(kind, queue=STREAM_TRACE)

    def error(self, reason: str, message: str, **facts: Any) -> None:
        """An ``error`` event; of the same ``reason`` at most one a second, or ``MOST_ANSWERS`` of one of ``ANSWERS``.
        The next one says how many were ``left_out``.

        ``errors`` among the facts is a list, of which the first ``MAX_ERRORS`` are told.
        """
        now = time.monotonic()
        since, told = self._told.get(reason, (now, 0))
        if now - since >= ERROR_EVERY_S:
            since, told = now, 0
        if told >= (MOST_ANSWERS if reason in ANSWERS else 1):
            self._left_out[reason] = self._left_out.get(reason, 0) + 1
            return
        self._told[reason] = since, told + 1
        if left_out := self._left_out.pop(reason, 0):
            facts["left_out"] = left_out
        if len(errors := facts.get("errors", ())) > MAX_ERRORS:
            facts |= {"errors": errors[:MAX_ERRORS], "errors_left_out": len(errors) - MAX_ERRORS}
        self.send("error", {"reason": reason, "message": message, "time": now_ms(), **facts})

    def send_status(self) -> None:
        self.send("status", self._status())

    async def run(self) -> None:
        """Publish what is queued, and a status every ten seconds, until the channel is over."""
        if self._publisher is None:
            return
        next_status_at = 0.0
        try:
            while True:
                if time.monotonic() >= next_status_at:
                    self.send_status()
                    next_status_at = time.monotonic() + STATUS_EVERY_S
                await self._publish_waiting(self._publisher)
                self._wake.clear()
                try:
                    async with asyncio.timeout(max(0.0, next_status_at - time.monotonic())):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        except ChannelClosed as exc:
            # Not the end of the stream: the input or the control channel says that.
            logger.info("events channel is over: %s", exc.reason)

    async def _publish_waiting(self, publisher: Publisher) -> None:
        while self._waiting:
            try:
                await publisher.publish(self._waiting.popleft())
            except ChannelClosed:
                raise
            except ChannelError as exc:
                logger.warning("an event could not be sent: %s", exc)

    async def flush(self) -> None:
        """Publish what is still queued, at the end of the stream."""
        if self._publisher is not None:
            try:
                await self._publish_waiting(self._publisher)
            except ChannelError:
                return
