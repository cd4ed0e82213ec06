"""What fails between one stream and the engine: the last of it for the status, each as an event and in the log."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from .events import Events

logger = logging.getLogger(__name__)

#: At least this long between two lines of one kind in the log. A graph that fails does so on every frame; the ledger
#: counts them.
LOG_EVERY_S = 1.0


class Failures:
    """Told by whoever sees one; a stream survives them all."""

    def __init__(self, stream_id: str, events: Events) -> None:
        self.last: str | None = None
        self.last_at: float | None = None  # loop time
        self._stream_id = stream_id
        self._events = events
        self._logged_at: dict[str, float] = {}  # loop time by reason

    def tell(self, reason: str, message: str, **facts: Any) -> None:
        """``facts``: more for the event; see `Events.error`."""
        self.last = message
        self.last_at = asyncio.get_running_loop().time()
        self._events.error(reason, message, **facts)
        if self.last_at - self._logged_at.get(reason, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged_at[reason] = self.last_at
            logger.warning("stream %s: %s: %s", self._stream_id, reason, message)
