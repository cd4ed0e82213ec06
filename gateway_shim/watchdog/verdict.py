"""Whether an engine hangs, from what it answers. Pure: the clock is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

#: Silence that is no hang while ComfyUI or a workflow is loaded, or before the first answer: native libraries of a
#: gigabyte are bound with the interpreter's lock held, and nothing else of the process runs meanwhile.
LOADING_SILENCE_S = 60.0

#: How long nobody may listen at the engine's address: while it boots, or on its way out after SIGTERM, for which
#: supervisord gives it 30 s (stopwaitsecs).
DEAF_S = 60.0


#: How long an engine may hold frames, run nothing and answer none of them. Below the five seconds between two looks.
STALL_S = 4.0


class Silence(Enum):
    """No answer came."""

    TIMEOUT = "timeout"  # somebody listens and says nothing
    REFUSED = "refused"  # nobody listens


@dataclass(frozen=True)
class Answer:
    """What ListSessions said; see ``proto/engine.proto``."""

    preparing: bool = False
    run_ms: int = 0
    run_limit_ms: int = 0
    step_ms: int = 0
    step_limit_ms: int = 0
    #: Of each session that waits for answers, how many of its frames were answered so far.
    answered: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_at_work(self) -> bool:
        return self.preparing or self.run_ms > 0 or self.step_ms > 0


@dataclass
class Patience:
    """What is known of one engine's process, and for how long it may be silent."""

    probe_s: float
    _pid: int = 0
    _heard_at: float = 0.0
    _last: Answer | None = field(default=None, repr=False)
    _stalls: dict[str, tuple[int, float]] = field(default_factory=dict, repr=False)  # session: answered so far, since

    def verdict(self, pid: int, answer: Answer | Silence, now: float, *, stopped: bool) -> str:
        """Why the process has to go, one sentence without a subject; empty when it may stay.

        stopped: the kernel does not run it. now: seconds of one clock, the same at every call.
        """
        if pid != self._pid:
            self._pid, self._heard_at, self._last, self._stalls = pid, now, None, {}
        if isinstance(answer, Answer):
            self._heard_at, self._last = now, answer
            return _hang(answer) or self._stall(answer, now)
        if stopped:
            return "was stopped (SIGSTOP) and not continued"
        silent_s = now - self._heard_at
        if answer is Silence.REFUSED:
            return f"nobody listened at its address for {silent_s:.0f} s" if silent_s > DEAF_S else ""
        if self._last is not None and not self._last.preparing:
            return f"did not answer within {self.probe_s:g} s"
        return f"did not answer for {silent_s:.0f} s" if silent_s > LOADING_SILENCE_S else ""

    def _stall(self, answer: Answer, now: float) -> str:
        """Frames lie there and the thread that runs graphs is idle, at every look for `STALL_S`."""
        waiting = {} if answer.is_at_work else answer.answered
        before, self._stalls = self._stalls, {}
        for session, answered in waiting.items():
            so_far, since = before.get(session, (answered, now))
            self._stalls[session] = answered, since if so_far == answered else now
        stalled_s = max((now - since for _, since in self._stalls.values()), default=0.0)
        return f"held frames for {stalled_s:.0f} s and ran none of them" if stalled_s >= STALL_S else ""


def _hang(answer: Answer) -> str:
    limit_ms = answer.run_limit_ms
    if answer.preparing:  # a library that is bound beside the run may hold the interpreter's lock
        limit_ms = max(limit_ms, round(1000 * LOADING_SILENCE_S))
    if answer.run_limit_ms and answer.run_ms > limit_ms:
        return _too_long("a run of its graph", answer.run_ms, limit_ms)
    if 0 < answer.step_limit_ms < answer.step_ms:
        return _too_long("a step of loading a workflow", answer.step_ms, answer.step_limit_ms)
    return ""


def _too_long(what: str, took_ms: int, limit_ms: int) -> str:
    return f"{what} took {took_ms / 1000:.1f} s so far, more than {limit_ms / 1000:.1f} s is a hang"
