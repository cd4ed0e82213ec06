"""How long a run of a session's graph takes, and how long it may before it counts as a hang."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from .parameters import Revision

#: Runs over which ``mean_ms`` is taken.
MEAN_RUNS: Final = 64

#: How often the longest run so far a run may last. One of 50 ms that takes half a second has met a busy machine; the
#: setting ``run_limit_s`` is the floor.
TIMES_LONGEST: Final = 10

#: Seconds that the first run with changed parameters may last at least: it may load another checkpoint or LoRA.
FIRST_RUN_S: Final = 120.0


class RunClock:
    """Of one session. ``limit_s`` 0: no run counts as a hang."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._began: float | None = None
        self._revision: Revision | None = None  # of the run that is under way, or of the last one
        self._proven = False  # a run with it has ended well
        self._longest_s = 0.0
        self._graph_ms: deque[float] = deque(maxlen=MEAN_RUNS)

    def begin(self, revision: Revision) -> None:
        if self._revision is not revision:
            if self._revision is None or self._revision.graph is not revision.graph:
                self._longest_s = 0.0
            self._revision, self._proven = revision, False
        self._began = self._clock()

    def end(self, graph_us: int | None = None) -> None:
        """The run is over; ``graph_us`` is the time in the graph of one that ended well."""
        began, self._began = self._began, None
        if graph_us is not None and began is not None:
            self._proven = True
            self._longest_s = max(self._longest_s, self._clock() - began)
            self._graph_ms.append(graph_us / 1000)

    @property
    def mean_ms(self) -> float:
        """Time in the graph."""
        return sum(self._graph_ms) / len(self._graph_ms) if self._graph_ms else 0.0

    @property
    def run_ms(self) -> int:
        """Since the run that is under way began, at least 1; 0: none is."""
        return 0 if self._began is None else max(1, round((self._clock() - self._began) * 1000))

    @property
    def limit_ms(self) -> int:
        """What the run may take; 0: as long as it likes."""
        if not self._limit_s:
            return 0
        floor_s = self._limit_s if self._proven else max(self._limit_s, FIRST_RUN_S)
        return round(max(floor_s, TIMES_LONGEST * self._longest_s) * 1000)
