"""Sound goes out with its picture. Output pts are input pts, so holding sound back is all that sync needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from .pacing import TICKS


class HasPts(Protocol):
    @property
    def pts(self) -> int: ...


_T = TypeVar("_T", bound=HasPts)


class AudioGate(Generic[_T]):
    """Holds sound until the picture of the same time is out, so that both leave together.

    Never before the first picture: players take a stream that begins with sound alone for a broken one. Bounded by
    ``hold_s`` of sound; the oldest goes first. ``deadline`` releases sound when the picture stalls.
    """

    def __init__(self, hold_s: float = 10.0) -> None:
        self._hold_ticks = round(hold_s * TICKS)
        self._waiting: deque[tuple[float, _T]] = deque()
        self._open = False
        self.dropped = 0

    def put(self, block: _T, due: float) -> None:
        """``due``: moment after which the block goes out even without its picture."""
        self._waiting.append((due, block))
        while self._waiting[-1][1].pts - self._waiting[0][1].pts > self._hold_ticks:
            self._waiting.popleft()
            self.dropped += 1

    def release(self, video_pts: int) -> Iterator[_T]:
        """Blocks that belong to pictures up to ``video_pts``, which has just gone out."""
        if not self._open:
            self._open = True
            while self._waiting and self._waiting[0][1].pts < video_pts - TICKS // 10:
                self._waiting.popleft()  # sound from before the first picture
                self.dropped += 1
        while self._waiting and self._waiting[0][1].pts <= video_pts:
            yield self._waiting.popleft()[1]

    def overdue(self, now: float) -> Iterator[_T]:
        """Blocks whose picture did not come in time."""
        while self._open and self._waiting and self._waiting[0][0] <= now:
            yield self._waiting.popleft()[1]

    def rest(self) -> Iterator[_T]:
        """Everything left, at the end of the stream."""
        while self._open and self._waiting:
            yield self._waiting.popleft()[1]

    def __len__(self) -> int:
        return len(self._waiting)
