"""What a viewer sees for a frame that the graph did not give: the last good picture, or the frame itself."""

from __future__ import annotations

from dataclasses import dataclass

import av

from .ledger import Outcome
from .mailbox import Entry
from .pacing import TICKS

#: A graph that is only late or hiccups keeps its look: for this long the last processed picture stands in. Beyond it
#: the picture would look frozen, and the unprocessed frame is the lesser evil.
HOLD_S = 0.5


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture to encode. ``frame``: yuv420p of even size; a repeated one comes again and again."""

    frame: av.VideoFrame
    pts: int
    repeated: bool


class Fallback:
    """Chooses the picture for each frame and remembers the last processed one. Time is the stream's own, in pts."""

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_ticks = round(hold_s * TICKS)
        self._last: av.VideoFrame | None = None
        self._last_pts = 0

    def choose(self, entry: Entry) -> Shown:
        """The picture for a frame that has an outcome."""
        if entry.outcome is Outcome.PROCESSED:
            assert entry.result is not None
            self._last, self._last_pts = entry.result, entry.pts
            return Shown(entry.result, entry.pts, repeated=False)
        if self._last is not None and entry.pts - self._last_pts < self._hold_ticks:
            return Shown(self._last, entry.pts, repeated=True)
        return Shown(entry.frame, entry.pts, repeated=False)
