"""From 33-bit time stamps to integers that go on counting."""

from __future__ import annotations

TICKS_PER_S = 90_000
_WRAP = 1 << 33  # 26.5 h
_HALF = _WRAP >> 1

# A stream that is silent for 60 s is ended (protocol.md 6.3), so two neighbouring stamps of one stream are never
# further apart than this across a wrap. A larger step there is a jump, for example a source that starts again at 0.
MAX_WRAP_STEP = 60 * TICKS_PER_S


class Clock:
    """Unwraps the stamps of one program; all its tracks share it, so that they wrap together.

    Only a small step over the 33-bit edge counts as a wrap. A jump keeps its own value: stamps that a damaged packet
    or a restarted source makes up never change the number of wraps, and the next good stamp reads as if nothing had
    been.
    """

    def __init__(self) -> None:
        self._reference: int | None = None

    def resume(self, reference: int) -> None:
        """Go on near a stamp that another clock has unwrapped."""
        self._reference = reference

    def unwrap(self, stamp: int) -> int:
        """``stamp`` (0..2^33-1) as 90 kHz ticks, near the latest one. Negative shortly before a first wrap."""
        value = stamp
        if self._reference is not None:
            base = self._reference & -_WRAP
            value = base + stamp
            step = value - self._reference
            if step > _HALF and _WRAP - step <= MAX_WRAP_STEP:
                value -= _WRAP
            elif step < -_HALF and _WRAP + step <= MAX_WRAP_STEP:
                value += _WRAP
        self._reference = value
        return value
