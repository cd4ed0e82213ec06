"""The clock of a stream without an input channel: grey frames at its rate, for graphs that paint pictures alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from fractions import Fraction
from typing import Final

from ..media.colour import Colour
from ..media.planes import frame_of
from ..media.rows import planes_size
from .intake import Decoded
from .ledger import Rate
from .pacing import TICKS

#: Frames per second when nobody says, ComfyStream's own.
DEFAULT_FRAMERATE: Final = 24
DEFAULT_SIZE: Final = (512, 512)

#: Behind by more than this, the clock goes on from now instead of catching up in a burst.
MAX_BEHIND_S: Final = 0.5

_GREY: Final = 128


class Generator:
    """Gives frames until cancelled. `max_framerate` may change at any time."""

    def __init__(
        self,
        size: tuple[int, int] | None,
        max_framerate: int | None,
        on_picture: Callable[[Decoded], Awaitable[None]],
        first_pts: int = 0,
    ) -> None:
        self.max_framerate = max_framerate
        self.rate = Rate()
        self.last_input_at: float | None = None  # loop time
        self._size = size or DEFAULT_SIZE
        self._on_picture = on_picture
        self._first_pts = first_pts

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(self.max_framerate or DEFAULT_FRAMERATE)

    async def run(self) -> None:
        """pts are the time since the beginning, after ``first_pts``."""
        loop = asyncio.get_running_loop()
        width, height = (side & ~1 for side in self._size)
        frame = frame_of(bytes([_GREY]) * planes_size(width, height), width, height)  # nobody writes into it
        began = due = loop.time()
        while True:
            self.last_input_at = loop.time()
            self.rate.tick()
            await self._on_picture(Decoded(frame, self._first_pts + round((due - began) * TICKS), Colour()))
            due += 1 / (self.max_framerate or DEFAULT_FRAMERATE)
            if loop.time() - due > MAX_BEHIND_S:
                due = loop.time()
            await asyncio.sleep(due - loop.time())
