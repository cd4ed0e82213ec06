"""How busy a thread has been."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

#: Seconds after which what was so counts for a third: longer than a build's steps, shorter than people wait.
MEMORY_S: Final = 5.0


class Busy:
    """Exponential mean of "was it busy?". One thread sets it, any may read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._state = (clock(), 0.0, False)  # when it changed, the share up to then, what it is since; one object

    def turns(self, busy: bool) -> None:
        """It is busy, or idle, from now on."""
        now, share = self._now()
        self._state = now, share, busy

    @property
    def share(self) -> float:
        """0 to 1, of the last seconds."""
        return self._now()[1]

    def _now(self) -> tuple[float, float]:
        at, share, busy = self._state
        now = self._clock()
        keep = math.exp((at - now) / MEMORY_S)
        return now, share * keep + (1 - keep if busy else 0.0)
