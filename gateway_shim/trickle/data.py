"""The data channel: one JSON object a line, several lines a segment when they come fast."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from .publisher import Publisher
from .wire import ChannelClosed, ChannelError

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = "application/jsonl"
# The gateway reads lines into a buffer of this size; a longer one makes it read the segment again, for ever
# (go-livepeer byoc/trickle.go). The line feed counts.
LINE_LIMIT_BYTES: Final = (64 << 10) - 1
# One segment when records come fast: well below the publisher's buffer.
BATCH_LIMIT_BYTES: Final = 512 << 10
KEEP_ALIVE: Final[Mapping[str, Any]] = {"type": "keepalive"}


@dataclass(slots=True)
class DataCounters:
    """Records since the writer was made: put = sent + dropped + waiting."""

    sent: int = 0
    dropped: int = 0  # queue full, line too long, not JSON, channel over, segment lost
    keepalives: int = 0


class DataWriter:
    """An async context manager; leaving it sends what waits, within a deadline.

    The publisher stays its owner's, and must be entered before and left after.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        keepalive_s: float = 25.0,
        keepalive: Any = KEEP_ALIVE,
        interval_s: float = 0.1,
        limit: int = 1000,
        flush_s: float = 5.0,
    ) -> None:
        """``keepalive_s``: of silence until ``keepalive`` is sent; a channel without a segment for 5 min is swept.

        ``interval_s``: shortest time between two segments, so that five of them stay readable for half a second.
        ``limit``: records that may wait. ``flush_s``: how long leaving may take.
        """
        self.counters = DataCounters()
        self._publisher = publisher
        self._keepalive_s = keepalive_s
        self._keepalive = _line(keepalive)
        self._interval_s = interval_s
        self._limit = limit
        self._flush_s = flush_s
        self._lines: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._leaving = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="trickle data")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._task is not None
        self._leaving.set()
        self._changed.set()
        try:
            await asyncio.wait({self._task}, timeout=self._flush_s)
        finally:
            self._task.cancel()
            await asyncio.wait({self._task})
            self.counters.dropped += len(self._lines)
            self._lines.clear()
        if not self._task.cancelled():
            self._task.result()

    def put(self, record: dict[str, Any]) -> bool:
        """Queue one record. False: it was dropped, and counted."""
        line = None
        if not self._leaving.is_set() and not self._publisher.closed.is_set() and len(self._lines) < self._limit:
            with contextlib.suppress(TypeError, ValueError, RecursionError):
                line = _line(record)
        if line is None or len(line) > LINE_LIMIT_BYTES:
            self.counters.dropped += 1
            return False
        self._lines.append(line)
        self._changed.set()
        return True

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._keepalive_s):
                    await self._changed.wait()
            except TimeoutError:
                if not await self._publish([self._keepalive], 0):
                    return
                self.counters.keepalives += 1
                continue
            self._changed.clear()
            while self._lines:
                batch = self._batch()
                if not await self._publish(batch, len(batch)):
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._leaving.wait()
            if self._leaving.is_set():
                return

    def _batch(self) -> list[bytes]:
        batch, size = [], 0
        while self._lines and size + len(self._lines[0]) <= BATCH_LIMIT_BYTES:
            batch.append(self._lines.popleft())
            size += len(batch[-1])
        return batch

    async def _publish(self, lines: list[bytes], records: int) -> bool:
        """False when the channel is over."""
        try:
            await self._publisher.publish(b"".join(lines))
        except ChannelClosed as exc:
            logger.debug("data: %s", exc)
            self.counters.dropped += records
            return False
        except ChannelError as exc:
            logger.debug("data: %s", exc)
            self.counters.dropped += records
        else:
            self.counters.sent += records
        return True


def _line(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
