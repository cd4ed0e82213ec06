"""Sound goes out with its picture. Output pts are input pts, so holding sound back is all that sync needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .pacing import TICKS


class HasPts(Protocol):
    @property
    def pts(self) -> int: ...


_T = TypeVar("_T", bound=HasPts)


#: More between two blocks is a gap: AAC has 1024 samples in a block, at 8 kHz 128 ms.
LONGEST_BLOCK = TICKS // 5


@dataclass(slots=True)
class _Held(Generic[_T]):
    block: _T
    due: float
    ticks: int  # that it adds to what waits


class AudioGate(Generic[_T]):
    """Holds sound until the picture of the same time is out, so that both leave together.

    Never before the first picture: players take a stream that begins with sound alone for a broken one. Bounded by
    ``hold_s`` of sound; the oldest goes first. ``deadline`` releases sound when the picture stalls.
    """

    def __init__(self, hold_s: float = 10.0) -> None:
        self._hold_ticks = round(hold_s * TICKS)
        self._waiting: deque[_Held[_T]] = deque()
        self._held_ticks = 0
        self._last_pts: int | None = None
        self._open = False
        self.dropped = 0

    def put(self, block: _T, due: float) -> None:
        """``due``: moment after which the block goes out even without its picture."""
        step = 0 if self._last_pts is None else block.pts - self._last_pts
        self._last_pts = block.pts
        # A leap of the clock, or a pause, is no sound that waits.
        held = _Held(block, due, min(max(step, 0), LONGEST_BLOCK))
        self._waiting.append(held)
        self._held_ticks += held.ticks
        while self._held_ticks > self._hold_ticks:
            self._take()
            self.dropped += 1

    def _take(self) -> _T:
        held = self._waiting.popleft()
        self._held_ticks -= held.ticks
        return held.block

    def release(self, video_pts: int) -> Iterator[_T]:
        """Blocks that belong to pictures up to ``video_pts``, which has just gone out."""
        if not self._open:
            self._open = True
            while self._waiting and self._waiting[0].block.pts < video_pts - TICKS // 10:
                self._take()  # sound from before the first picture
                self.dropped += 1
        while self._waiting and self._waiting[0].block.pts <= video_pts:
            yield self._take()

    def overdue(self, now: float) -> Iterator[_T]:
        """Blocks whose picture did not come in time."""
        while self._open and self._waiting and self._waiting[0].due <= now:
            yield self._take()

    def rest(self) -> Iterator[_T]:
        """Everything left, at the end of the stream."""
        while self._open and self._waiting:
            yield self._take()

    def __len__(self) -> int:
        return len(self._waiting)
