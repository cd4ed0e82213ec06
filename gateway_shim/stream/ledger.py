"""The account of every frame of one stream: nothing is lost without a line in it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from enum import StrEnum


class Outcome(StrEnum):
    """What became of one received frame; each gets exactly one."""

    PROCESSED = "processed"  # the graph's picture was published
    FAILED = "failed"  # the graph raised on it; a stand-in was published
    PASSED_THROUGH = "passed_through"  # published unprocessed, by policy
    DROPPED = "dropped"  # its own picture was never published; a repeat may stand in its place


class Ledger:
    """``received = processed + failed + passed_through + dropped + in_flight`` at every read."""

    def __init__(self) -> None:
        self.received = 0
        self.in_flight = 0
        self.repeated = 0  # pictures published a second time in place of a late or failed one, or while none came
        self.published = 0
        self._outcomes: Counter[Outcome] = Counter()
        self._reasons: Counter[str] = Counter()

    def receive(self) -> None:
        self.received += 1
        self.in_flight += 1

    def settle(self, outcome: Outcome, reason: str = "") -> None:
        """Close the account of one frame. ``reason`` is required for all but processed frames."""
        if self.in_flight <= 0:
            raise AssertionError("a frame was settled twice")
        self.in_flight -= 1
        self._outcomes[outcome] += 1
        if reason:
            self._reasons[f"{outcome}:{reason}"] += 1

    def count(self, outcome: Outcome) -> int:
        return self._outcomes[outcome]

    def as_json(self) -> dict[str, object]:
        reasons: dict[str, dict[str, int]] = {}
        for key, number in sorted(self._reasons.items()):
            outcome, _, reason = key.partition(":")
            reasons.setdefault(outcome, {})[reason] = number
        return {
            "received": self.received,
            **{outcome.value: self._outcomes[outcome] for outcome in Outcome},
            "in_flight": self.in_flight,
            "repeated": self.repeated,
            "published": self.published,
            "reasons": reasons,
        }


class Rate:
    """Events per second over the last ``window_s`` seconds."""

    def __init__(self, window_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._times: deque[float] = deque()
        self._started_at = clock()

    def tick(self) -> None:
        self._times.append(self._clock())
        self._forget()

    def _forget(self) -> None:
        horizon = self._clock() - self._window_s
        while self._times and self._times[0] < horizon:
            self._times.popleft()

    @property
    def per_second(self) -> float:
        self._forget()
        elapsed = min(self._window_s, max(self._clock() - self._started_at, 1.0))
        return len(self._times) / elapsed
