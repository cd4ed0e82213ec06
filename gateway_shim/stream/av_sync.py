"""One clock for picture and sound: output pts are input pts, and sound goes out with its picture.

A publisher whose clock begins again (a reconnect) would freeze every player that keeps its clock, so a jump back
shifts the new pts to where the old ones ended; picture and sound share the shift.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .pacing import TICKS

#: A step back by more than this is a clock that began again; less is disorder, which the encoder drops.
BACK_S = 0.5

#: A step forward by this much more than the time that really passed is a jump; a pause of the input is not.
AHEAD_S = 10.0


class HasPts(Protocol):
    pts: int


_T = TypeVar("_T", bound=HasPts)


@dataclass(slots=True)
class _Medium:
    epoch: int = 0
    raw: int | None = None  # last input pts
    seen_at: float = 0.0


class StreamClock:
    """Maps input pts to output pts, both 90 kHz. The identity until the publisher's clock jumps."""

    def __init__(self) -> None:
        self._media = {"video": _Medium(), "audio": _Medium()}
        self._shifts = [0]
        self._latest = 0  # largest output pts so far, of either medium
        self.jumps = 0

    def map(self, kind: str, pts: int, now: float) -> int:
        """Output pts for an input pts of ``kind`` ("video", "audio") that arrived at ``now`` (seconds)."""
        medium = self._media[kind]
        if medium.raw is not None:
            step_s = (pts - medium.raw) / TICKS
            if step_s < -BACK_S or step_s > now - medium.seen_at + AHEAD_S:
                self._enter_next_epoch(medium, pts)
        elif self._shifts[-1] and medium.epoch < len(self._shifts) - 1:
            medium.epoch = len(self._shifts) - 1  # sound that begins after a jump of the picture
        medium.raw, medium.seen_at = pts, now
        mapped = pts + self._shifts[medium.epoch]
        self._latest = max(self._latest, mapped)
        return mapped

    def _enter_next_epoch(self, medium: _Medium, pts: int) -> None:
        if medium.epoch == len(self._shifts) - 1:
            # This medium is the first to jump: go on one nominal frame (1/30 s) after the latest output.
            self._shifts.append(self._latest + TICKS // 30 - pts)
            self.jumps += 1
        medium.epoch = len(self._shifts) - 1


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
