"""Circles of what has ended. The traceback of a lost connection holds the frames of functions, these a picture, and
that the shared memory of an engine session: megabytes, for as long as the collector does not come by, and in a shim
that has nothing to do it does not.
"""

from __future__ import annotations

import asyncio
import gc


def settle() -> None:
    """Before the first stream: take the modules out of the collector's sight."""
    gc.collect()
    gc.freeze()


def collect_soon() -> None:
    """When whoever calls has let go of everything: a full collection, 1 ms after `settle`, 11 without it."""
    asyncio.get_running_loop().call_soon(gc.collect)
