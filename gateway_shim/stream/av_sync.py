"""Sound goes out with its picture. Output pts are input pts, so holding sound back is all that sync needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..media.sound import SAMPLE_RATE
from .pacing import TICKS


class HasSamples(Protocol):
    @property
    def samples(self) -> int: ...


class IsSound(Protocol):
    """``pts`` in ticks; ``frame.samples`` at 48 kHz, for each channel."""

    @property
    def pts(self) -> int: ...
    @property
    def frame(self) -> HasSamples: ...


_T = TypeVar("_T", bound=IsSound)


#: Samples. Opus packets are 2.5 ms or longer; shorter blocks are odd ends, and each takes memory beside its samples.
SHORTEST_BLOCK = SAMPLE_RATE // 400


@dataclass(slots=True)
class _Held(Generic[_T]):
    block: _T
    due: float


class AudioGate(Generic[_T]):
    """Holds sound until the picture of the same time is out, so that both leave together.

    Never before the first picture: players take a stream that begins with sound alone for a broken one. Bounded by
    ``hold_s`` of sound; the oldest goes first. ``overdue`` releases sound when the picture stalls.
    Samples are counted, not stamps: a leap of the clock, or a pause, is no sound that waits; stamps that stand still
    or fall are no reason to keep it.
    """

    def __init__(self, hold_s: float = 10.0) -> None:
        self._hold_samples = round(hold_s * SAMPLE_RATE)
        self._hold_blocks = self._hold_samples // SHORTEST_BLOCK
        self._waiting: deque[_Held[_T]] = deque()
        self._held_samples = 0
        self._open = False
        self.dropped = 0

    def put(self, block: _T, due: float) -> None:
        """``due``: moment after which the block goes out even without its picture."""
        self._waiting.append(_Held(block, due))
        self._held_samples += block.frame.samples
        while self._held_samples > self._hold_samples or len(self._waiting) > self._hold_blocks:
            self._take()
            self.dropped += 1

    def _take(self) -> _T:
        block = self._waiting.popleft().block
        self._held_samples -= block.frame.samples
        return block

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
