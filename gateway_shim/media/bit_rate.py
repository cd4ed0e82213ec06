"""How many bits a stream gets, and the frame rate that they depend on."""

from __future__ import annotations

import math
from collections import deque
from fractions import Fraction
from statistics import median_low
from typing import Final

from .clock import TICKS_PER_S

DEFAULT_RATE: Final = Fraction(30)

# Bits per second that look right for textured content at 30 fps: 1.5 Mbit/s at 512x512, 3 at 720p, 5 at 1080p. The
# exponent follows: content of four times the pixels needs about twice the bits.
_REFERENCE_BIT_RATE: Final = 1_500_000
_REFERENCE_PIXELS_PER_S: Final = 512 * 512 * 30
_BIT_RATE_EXPONENT: Final = 0.58

#: Distances between pictures that are looked at: two seconds at 30 fps.
_DISTANCES: Final = 60
_ENOUGH: Final = 8  # to believe them rather than what the stream says of itself
#: Frames per second that are believed; streams declare 1000 and 90000 too, and a pause is no frame rate.
_SLOWEST, _FASTEST = 2, 240


def default_bit_rate(width: int, height: int, frame_rate: Fraction | None) -> int:
    """Bits per second of video for a size and rate."""
    pixels_per_s = width * height * float(frame_rate or DEFAULT_RATE)
    ratio = math.pow(pixels_per_s / _REFERENCE_PIXELS_PER_S, _BIT_RATE_EXPONENT)
    return round(_REFERENCE_BIT_RATE * ratio)


class RateMeter:
    """Frames per second of a row of stamps: their middle distance, which jumps, pauses and lost frames leave alone.

    declared: what is believed before there are enough stamps; None where nothing was said.
    """

    def __init__(self, declared: Fraction | None = None) -> None:
        self._declared = declared
        self._distances: deque[int] = deque(maxlen=_DISTANCES)
        self._last: int | None = None

    def add(self, pts: int) -> None:
        """The next picture's stamp, 90 kHz."""
        if self._last is not None and TICKS_PER_S // _FASTEST <= pts - self._last <= TICKS_PER_S // _SLOWEST:
            self._distances.append(pts - self._last)
        self._last = pts

    @property
    def rate(self) -> Fraction | None:
        """None while nothing is known."""
        if len(self._distances) < _ENOUGH:
            return self._declared
        return Fraction(TICKS_PER_S, median_low(self._distances))


def declared_rate(rate: Fraction | None) -> Fraction | None:
    """What a stream's parameter sets say, if that can be."""
    return rate if rate is not None and _SLOWEST <= rate <= _FASTEST else None
