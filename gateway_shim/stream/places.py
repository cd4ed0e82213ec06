"""How many pictures may wait between decoder and encoder, and so how long one of them may wait for its outcome.

A graph that cannot keep up leaves pictures waiting for the whole latency budget. With fewer places than pictures come
in that time the reader would have to wait for each place, fall behind its source for ever, and lose whatever the
broker throws away meanwhile. So there are as many as the budget needs; where memory has no room for them the budget
is shorter.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

from ..media.bit_rate import DEFAULT_RATE, RateMeter
from ..media.rows import planes_size

#: Two seconds of 30 fps, the usual burst. What a burst has beyond the places waits in the channel, where it is
#: smaller, and is read as places become free: that is before the next burst.
USUAL: Final = 60

#: Of what waits in one stream, beyond the usual. 185 pictures of 720p, which at 30 fps are a budget of 4.9 s; 82 of
#: 1080p and 2.2 s; of larger ones the usual, 1.6 s.
MAX_BYTES: Final = 256_000_000

#: Part of the places that pictures within their budget may take. The rest is for a rate that is not quite as measured
#: and for pictures that came earlier than others and are due later.
SHARE: Final = Fraction(4, 5)


class Places:
    """Of one stream, for pictures of one size. Learns their rate from their stamps."""

    def __init__(self, width: int, height: int) -> None:
        self._most = max(MAX_BYTES // planes_size(width, height), USUAL)
        self._meter = RateMeter()
        self._rate = DEFAULT_RATE

    def add(self, pts: int) -> None:
        """The next picture's stamp, 90 kHz."""
        self._meter.add(pts)
        self._rate = self._meter.rate or DEFAULT_RATE

    @property
    def longest_s(self) -> float:
        """The longest latency budget for which there are places."""
        return float(self._most * SHARE / self._rate)

    def needed(self, budget_s: float) -> int:
        """How many there are with a latency budget."""
        return min(max(math.ceil(budget_s * self._rate / SHARE), USUAL), self._most)
