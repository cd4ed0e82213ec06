"""The C library's memory, set for messages of megabytes that come and go with every frame."""

from __future__ import annotations

import ctypes
from typing import Final

# <malloc.h>
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

#: The most that glibc takes (half a thread's heap): a picture of 4K is 12.4 MB, a batch of two less than this.
_MMAP_BYTES: Final = 32 * 1024 * 1024
_TRIM_BYTES: Final = 128 * 1024 * 1024


def keep_large_blocks() -> None:
    """Let blocks of a picture's size be used again and not go back to the kernel with every frame.

    By default glibc maps each such block afresh, and the kernel clears every page of it at the first touch. That is
    a third of the lane: 1.5 to 1.0 CPU seconds per GB at 1080p, 2.5 to 1.2 at 720p (bytes lane there and back, both
    ends, two shared cores). Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
