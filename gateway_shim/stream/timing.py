"""How honest the time of a stream is, measured where it goes out."""

from __future__ import annotations

from collections import deque
from typing import Any

from .pacing import TICKS

#: Measurements that are kept: ten seconds of sound and half a minute of pictures.
SOUNDS = 500
PICTURES = 900


class OutputTiming:
    """Offsets of sound from its picture, and how long pictures were on their way through this worker.

    Pictures go out with the pts that they came with, so the offset is how far a block of sound goes out behind its
    own stamp: what decoder and encoder even out, for samples are counted and stamps are rounded.
    """

    def __init__(self) -> None:
        self._offsets: deque[int] = deque(maxlen=SOUNDS)
        self._latencies: deque[float] = deque(maxlen=PICTURES)

    def picture(self, latency_s: float) -> None:
        """Of one picture, from the last of its bytes to its way out."""
        self._latencies.append(latency_s)

    def sound(self, late: int) -> None:
        """Of one block: ticks that it goes out behind its stamp."""
        self._offsets.append(late)

    def as_json(self) -> dict[str, Any]:
        """Milliseconds; null before there is something to measure. A positive offset: the sound is late."""
        offsets = list(self._offsets)  # the encoder's thread appends
        apart = _share(sorted(map(abs, offsets)), 0.99)
        on_the_way = sorted(self._latencies)
        return {
            "av_offset_ms": _ms(offsets[-1] / TICKS if offsets else None),
            "av_offset_p99_ms": _ms(None if apart is None else apart / TICKS),
            "latency_ms": _ms(_share(on_the_way, 0.5)),
            "latency_p99_ms": _ms(_share(on_the_way, 0.99)),
        }


def _share(ordered: list[Any], share: float) -> float | None:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
