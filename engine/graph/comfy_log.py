"""ComfyUI's log lines, kept to what an operator can use."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any


class Quiet(logging.Filter):
    """On the root logger, where ComfyUI and its packs log.

    What the executor logs, a traceback for every failing frame, is reported by us. From ``frames_follow`` on any
    other line of ComfyUI's comes once a second at most.
    """

    frames_follow = False

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = str(directory)
        self._seen: dict[tuple[Any, ...], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.pathname.startswith(self._directory):
            return True
        if record.pathname.endswith("execution.py"):
            return False
        now, place = time.monotonic(), (record.pathname, record.lineno)
        # At boot one line of code says the same of many packs, or different things: only repetition is dropped.
        key, interval_s = (place, 1.0) if self.frames_follow else ((*place, record.getMessage()), 3600.0)
        if now - self._seen.get(key, -interval_s) < interval_s:
            return False
        self._seen[key] = now
        record.name = "comfyui"
        return True
