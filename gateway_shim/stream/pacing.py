"""When a frame is due at the latest: the latency budget, measured on the stream's own clock."""

from __future__ import annotations

from collections import deque

#: Ticks per second of every pts in the shim, the clock of MPEG-TS.
TICKS = 90_000

#: How long the worst arrival delay is remembered. Gateways send segments of about two seconds and may send each
#: in one burst (protocol.md 2.1); a shorter memory would forget the burst before the next one comes.
WINDOW_S = 3.0

#: How much later than the others a frame may come without making them wait for it. On a busy machine one in some
#: hundred is 10 to 15 ms late, and a whole window of frames would be as much later than the budget.
JITTER_S = 0.015

#: A delay that grows by more than this at once is a jump of the publisher's clock, not jitter.
JUMP_S = 10.0

#: One that shrinks by more than this at once is a leap of the clock: within a burst it shrinks by the distance of two
#: frames. What was late before it says nothing about what comes after.
LEAP_S = 1.0


class Pacer:
    """Gives each frame its due time.

    The delay of a frame is its arrival minus its pts. Frames of one burst have the same arrival and different delays;
    the largest delay of the last seconds is how late a frame may arrive without being late, so

        due = max(pts + largest delay - jitter, arrival) + budget.

    A frame that arrives in step with the others, give or take 15 ms, has exactly the budget; the last frame of a
    burst has the burst's length more, which is when a viewer needs it. None has less than the budget. No frame waits
    longer than ``window_s`` and the budget: a clock that jumps ahead would fill the mailbox with frames that nobody
    may have yet.

    `budget_s` may change at any time; it is never longer than `longest_s`.
    """

    def __init__(self, budget_s: float, window_s: float = WINDOW_S) -> None:
        self.longest_s = float("inf")
        self.asked_s = budget_s
        self._window_s = window_s
        # Decreasing delays with their arrival: the head is the maximum of the window.
        self._delays: deque[tuple[float, float]] = deque()
        self._last_delay: float | None = None

    @property
    def budget_s(self) -> float:
        """The latency budget."""
        return min(self.asked_s, self.longest_s)

    @budget_s.setter
    def budget_s(self, asked_s: float) -> None:
        self.asked_s = asked_s

    @property
    def delay_s(self) -> float | None:
        """The largest delay; None before the first frame."""
        return self._delays[0][1] if self._delays else None

    def due(self, pts: int, arrived_at: float) -> float:
        """Moment (seconds, the clock of ``arrived_at``) at which a picture for ``pts`` must go out."""
        delay = arrived_at - pts / TICKS
        if self._last_delay is not None and not -LEAP_S <= delay - self._last_delay <= JUMP_S:
            self._delays.clear()
        self._last_delay = delay
        while self._delays and self._delays[-1][1] <= delay:
            self._delays.pop()
        self._delays.append((arrived_at, delay))
        while self._delays[0][0] < arrived_at - self._window_s:
            self._delays.popleft()
        in_step = max(pts / TICKS + self._delays[0][1] - JITTER_S, arrived_at)
        return min(in_step, arrived_at + self._window_s) + self.budget_s
