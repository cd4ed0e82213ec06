"""How both programs learn that supervisord is gone, whatever ended it.

supervisord gives each program a pipe as standard input and holds its other end, which no other process inherits
(supervisor/process.py). A pipe needs no set-up after the fork, so there is no moment in which the death is missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Final

STDIN: Final = 0


def when_gone(call: Callable[[], object]) -> None:
    """Have the running loop ``call`` once the parent is gone. Does nothing where standard input cannot be watched
    because it is no pipe: a file, or nothing at all."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        try:
            gone = not os.read(STDIN, 4096)
        except OSError:
            gone = True
        if gone:
            loop.remove_reader(STDIN)
            call()

    with contextlib.suppress(OSError, ValueError):
        loop.add_reader(STDIN, look)
