"""Which x264 preset a stream can afford, from the time that its pictures take."""

from __future__ import annotations

from typing import Final, Literal

Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium"]
#: The choice between the two fastest by measurement.
AUTO: Final = "auto"

#: Share of a picture's time from which on encoding it is too slow: sound, muxing and the hand-over want the rest.
_TOO_SLOW: Final = 0.85
#: Ultrafast takes 0.6 of superfast's time (3.6 and 6.1 ms at 720p, hot-path.md section 5): from here it would be 0.5.
_FAST_AGAIN: Final = 0.3
_SETTLED_S: Final = 1.0  # of pictures, before a preset is judged
_PATIENCE_S: Final = 20.0  # of pictures, before the slower one is tried again
_MEMORY_S: Final = 2.0  # what was longer ago counts for less than a third
_LONGEST_S: Final = 0.5  # a longer pause says nothing of the machine


class PresetChoice:
    """``wanted``: a preset, which stays, or AUTO. Whoever encodes asks ``next`` where a change is safe."""

    def __init__(self, wanted: Preset | Literal["auto"]) -> None:
        self._fixed = wanted != AUTO
        self.now: Preset = "superfast" if wanted == AUTO else wanted
        self._begin()

    def _begin(self) -> None:
        self._spent_s = self._available_s = self._seen_s = 0.0

    @property
    def load(self) -> float:
        """Share of their time that the last pictures took to encode; 0 before the second one."""
        return self._spent_s / self._available_s if self._available_s else 0.0

    def spent(self, seconds: float, interval_s: float) -> None:
        """A picture took ``seconds``; the one before it was ``interval_s`` earlier, by the stamps."""
        if not 0 < interval_s <= _LONGEST_S:
            return
        keep = 1 - interval_s / _MEMORY_S
        self._spent_s = self._spent_s * keep + seconds
        self._available_s = self._available_s * keep + interval_s
        self._seen_s += interval_s

    def next(self) -> Preset:
        """The preset from here on."""
        if not self._fixed:
            if self.now == "superfast" and self._seen_s >= _SETTLED_S and self.load > _TOO_SLOW:
                self._change("ultrafast")
            elif self.now == "ultrafast" and self._seen_s >= _PATIENCE_S and self.load < _FAST_AGAIN:
                self._change("superfast")
        return self.now

    def _change(self, preset: Preset) -> None:
        self.now = preset
        self._begin()
