"""How many threads a codec gets: one, unless there are cores to spare; the encoder no more than its pictures need.

On busy cores a second thread buys nothing and costs up to 14 % CPU (hot-path.md section 5), and x264's slices cost
quality. One thread of x264 superfast does 150 million pixels a second there, the decoder three times as many.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from pathlib import Path
from typing import Final

#: Pixels per second that one thread may be asked for: half of what it can, so that a picture takes half its time.
_ENCODER_PIXELS_PER_S: Final = 75e6
#: Beyond it slices are too thin for the encoder, and few streams have as many for the decoder.
_MOST: Final = 8
_MOST_OF_DECODER: Final = 4

_CGROUP_CPU: Final = Path("/sys/fs/cgroup/cpu.max")


@functools.cache
def cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container (cgroup v2), at least one."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = _CGROUP_CPU.read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def share(streams: int) -> int:
    """Threads for one codec of one of ``streams`` streams: a quarter of the stream's cores, for it has two codecs,
    and the engine has the other half."""
    return max(1, cores() // (4 * max(1, streams)))


def encoder_threads(pixels_per_s: float, streams: int) -> int:
    return min(math.ceil(pixels_per_s / _ENCODER_PIXELS_PER_S), share(streams), _MOST)


def decoder_threads(streams: int) -> int:
    """They share the slices of a picture: where it has one, the others sleep."""
    return min(share(streams), _MOST_OF_DECODER)
