"""What a viewer sees for a frame that the graph did not give: the last good picture, or the frame itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .ledger import Outcome
from .mailbox import Entry

#: A graph that is only late or hiccups keeps its look: for this long the last processed picture stands in. Beyond it
#: the picture would look frozen, and the unprocessed frame is the lesser evil.
HOLD_S = 0.5


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture to encode. ``planes``: I420 without padding, of ``width`` x ``height`` pixels."""

    planes: bytes
    width: int
    height: int
    pts: int
    repeated: bool


class Fallback:
    """Chooses the picture for each frame and remembers the last processed one."""

    def __init__(self, hold_s: float = HOLD_S, *, clock: Callable[[], float]) -> None:
        self._hold_s = hold_s
        self._clock = clock
        self._last: tuple[bytes, int, int] | None = None
        self._last_at = 0.0

    def forget(self) -> None:
        """The last picture belongs to a workflow that runs no more."""
        self._last = None

    def choose(self, entry: Entry) -> Shown:
        """The picture for a frame that has an outcome."""
        if entry.outcome is Outcome.PROCESSED:
            picture = entry.result
            self._last = (picture.planes, picture.width, picture.height)
            self._last_at = self._clock()
            return Shown(picture.planes, picture.width, picture.height, entry.pts, repeated=False)
        if self._last is not None and self._clock() - self._last_at < self._hold_s:
            return Shown(*self._last, entry.pts, repeated=True)
        return Shown(entry.planes, entry.width, entry.height, entry.pts, repeated=False)
