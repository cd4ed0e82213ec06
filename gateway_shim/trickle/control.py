"""The control channel: one JSON value per segment, keep-alives left out."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from ..errors import MalformedRequest
from ..json_text import read_json
from .subscriber import Subscriber
from .wire import SegmentTooLarge

logger = logging.getLogger(__name__)

# The gateway sends it every 10 s (go-livepeer server/ai_live_video.go). Only exactly this is no update.
KEEP_ALIVE: Final = {"keep": "alive"}
MESSAGE_LIMIT_BYTES: Final = 16 << 20  # as much as the HTTP way takes (settings.BODY_LIMIT_BYTES)
COMPLAINT_S: Final = 1.0


async def control_messages(subscriber: Subscriber, *, limit: int = MESSAGE_LIMIT_BYTES) -> AsyncIterator[Any]:
    """Values in order, null and lists included, until the channel is over.

    What cannot be read (not JSON, cut off, more than ``limit`` bytes) is skipped; the log says so, but once a second
    at most.
    """
    complain = _Complaints(subscriber.url)
    async for segment in subscriber:
        try:
            text = await segment.read(limit)
        except SegmentTooLarge as exc:
            complain(str(exc))
            continue
        if not segment.complete:
            complain(f"segment {segment.seq} was cut off")
            continue
        if not text.strip():
            continue
        try:
            value = read_json(text)
        except MalformedRequest as exc:
            complain(f"segment {segment.seq}: {exc}")
            continue
        if value != KEEP_ALIVE:
            yield value


class _Complaints:
    """Logs once a second at most, and how many there were in between."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._quiet_until = float("-inf")
        self._kept_back = 0

    def __call__(self, what: str) -> None:
        if self._clock() < self._quiet_until:
            self._kept_back += 1
            return
        logger.warning("%s: control message ignored: %s (%d more before)", self._url, what, self._kept_back)
        self._quiet_until = self._clock() + COMPLAINT_S
        self._kept_back = 0
