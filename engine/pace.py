"""How long a run of a session takes at least, and so how many of them one visit to the executor thread takes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .parameters import Revision

#: How long a run takes at least is what the quickest of so many took, with the same parameters; for so long it is
#: believed. After that a frame runs although it seems too late: the device may have become faster.
QUICKEST_OF: Final = 8
BELIEVED_S: Final = 1.0

#: Frames that one visit to the executor thread runs, one after another, where they wait and are so quick: a visit and
#: a message cost as much CPU as a small frame's conversion. The first answer waits for the last: this long at most.
VISIT_FRAMES: Final = 8
VISIT_S: Final = 0.016


class Pace:
    """Runs with the parameters in force. Times in seconds, moments on one monotonic clock."""

    def __init__(self) -> None:
        self._of: Revision | None = None
        self._took: deque[float] = deque(maxlen=QUICKEST_OF)
        self._quickest = 0.0
        self._until = 0.0

    def ran(self, revision: Revision, took: float, now: float) -> None:
        """A run took so long and was over at ``now``."""
        if revision is not self._of:
            self._of = revision
            self._took.clear()
        self._took.append(took)
        self._quickest = min(self._took)
        self._until = now + BELIEVED_S

    def least(self, revision: Revision, now: float) -> float:
        """What the next run takes at least; 0 when nothing is known of it."""
        return self._quickest if revision is self._of and now < self._until else 0.0

    def per_visit(self, revision: Revision, now: float) -> int:
        """How many of the next runs fit one visit; 1 when nothing is known of them."""
        least = self.least(revision, now)
        return max(1, min(VISIT_FRAMES, int(VISIT_S / least))) if least else 1
