"""What a viewer sees for a frame that the graph did not give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import av

from ..media.overlay import Notice, dimmed, grey, with_notice
from .ledger import Outcome
from .mailbox import Entry
from .pacing import TICKS

#: A graph that is only late or hiccups keeps its look: for this long the last processed picture stands in. Beyond it
#: the picture would look frozen, and the unprocessed frame is the lesser evil.
HOLD_S = 0.5


class Policy(StrEnum):
    """What stands in for the graph's pictures while there are none; the values are those of the settings.

    With HOLD and OVERLAY the input is never shown: a graph that makes faces unknown may fail, and they stay unknown.
    """

    AUTO = "auto"  # the last picture for half a second, then the input
    PASSTHROUGH = "passthrough"  # the input, at once when the engine is lost
    HOLD = "hold"  # the last picture, dimmed after half a second
    OVERLAY = "overlay"  # the same with the reason and the progress on it


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture to encode. ``frame``: yuv420p of even size; a repeated one comes again and again."""

    frame: av.VideoFrame
    pts: int
    repeated: bool


class Fallback:
    """Chooses the picture for each frame and remembers the last processed one. Time is the stream's own, in pts.

    `policy` may change at any time. gives_pictures: whether the graph has pictures at all; where it has none, those
    of the input are the stream's. notice: what to say when asked.
    """

    def __init__(
        self,
        policy: Policy = Policy.AUTO,
        *,
        hold_s: float = HOLD_S,
        gives_pictures: Callable[[], bool] = lambda: True,
        notice: Callable[[], Notice] = Notice,
    ) -> None:
        self.policy = policy
        self._gives_pictures = gives_pictures
        self._notice = notice
        self._hold_ticks = round(hold_s * TICKS)
        self._last: av.VideoFrame | None = None
        self._last_pts = 0
        # Drawn once for as long as nothing changes.
        self._still: av.VideoFrame | None = None
        self._noticed: tuple[Notice, av.VideoFrame] | None = None

    def forget(self) -> None:
        """Let go of the pictures. The last one may lie in memory that the engine shares, and a stream that has ended
        lives on in the circles of its parts until the garbage collector comes by."""
        self._last = self._still = None

    def choose(self, entry: Entry) -> Shown:
        """The picture for a frame that has an outcome."""
        if entry.outcome is Outcome.PROCESSED:
            assert entry.result is not None
            self._last, self._last_pts = entry.result, entry.pts
            self._still = self._noticed = None
            return Shown(entry.result, entry.pts, repeated=False)
        policy = self.policy if self._gives_pictures() else Policy.AUTO
        lost = entry.outcome is Outcome.PASSED_THROUGH
        recent = self._last is not None and entry.pts - self._last_pts < self._hold_ticks
        if self._last is not None and recent and not (lost and policy is Policy.PASSTHROUGH):
            return Shown(self._last, entry.pts, repeated=True)
        if policy in (Policy.AUTO, Policy.PASSTHROUGH):
            return Shown(entry.frame, entry.pts, repeated=False)
        return Shown(self._stand_in(entry, policy), entry.pts, repeated=True)

    def _stand_in(self, entry: Entry, policy: Policy) -> av.VideoFrame:
        if self._still is None:
            size = entry.frame.width, entry.frame.height
            self._still = dimmed(self._last) if self._last is not None else grey(*size)
        if policy is Policy.HOLD:
            return self._still
        notice = self._notice()
        if self._noticed is None or self._noticed[0] != notice:
            self._noticed = notice, with_notice(self._still, notice)
        return self._noticed[1]
