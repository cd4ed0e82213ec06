"""From the input channel to decoded frames: subscriber, access units, decoder, in the order of arrival."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..media.decode import Colour, Decoder, DecoderSettings, Picture, Sound
from ..media.fit import Fitter
from ..media.planes import planes_of
from ..media.ts import TsReader
from ..trickle.subscriber import Subscriber
from .ledger import Rate
from .pacing import TICKS

logger = logging.getLogger(__name__)

#: Bytes collected before they go to the decoder thread. One hop costs 60 us (hot-path.md section 6), so what is
#: already here goes together; nothing is ever waited for.
MAX_FEED_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Decoded:
    """One picture, ready for the engine and for the encoder. ``planes``: I420 without padding; pts as it came."""

    planes: bytes
    width: int
    height: int
    pts: int
    colour: Colour


class Intake:
    """Reads one channel until it is over.

    on_picture is awaited for each `Decoded` in display order, on_sound called for each `Sound`. The size of the first
    picture, or the one that was asked for, is the stream's size; every other picture is scaled to it.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        *,
        size: tuple[int, int] | None,
        on_picture: Callable[[Decoded], Awaitable[None]],
        on_sound: Callable[[Sound], None],
        on_first_segment: Callable[[], None] = lambda: None,
        name: str = "",
    ) -> None:
        self._subscriber = subscriber
        self._on_picture = on_picture
        self._on_sound = on_sound
        self._on_first_segment = on_first_segment
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"decode {name}")
        self._reader = TsReader()
        self._decoder = Decoder(DecoderSettings())
        self._size = size
        self._fitter: Fitter | None = None
        self.max_framerate: int | None = None
        self._last_kept: int | None = None
        self.skipped_by_rate = 0
        self.rate = Rate()
        self.last_input_at: float | None = None  # loop time of the last bytes

    @property
    def has_audio(self) -> bool:
        """Whether the program declares sound that we can read."""
        return any(track.kind == "audio" for track in self._reader.tracks)

    async def run(self) -> str:
        """Read until the channel is over; returns why."""
        loop = asyncio.get_running_loop()
        first = True
        async for segment in self._subscriber:
            if segment.gap:
                await self._decode(self._lost)
            async for data in segment:
                self.last_input_at = loop.time()
                if first:
                    first = False
                    self._on_first_segment()
                await self._decode(self._feed, data)
            await self._decode(self._end_segment if segment.complete else self._lost)
        await self._decode(self._flush)
        return self._subscriber.closed_reason or "the input channel ended"

    async def _decode(self, step: Callable[..., list[Decoded | Sound]], *arguments: Any) -> None:
        frames = await asyncio.get_running_loop().run_in_executor(self._worker, step, *arguments)
        for frame in frames:
            if isinstance(frame, Sound):
                self._on_sound(frame)
            else:
                self.rate.tick()
                await self._on_picture(frame)

    def close(self) -> None:
        """End the decoder thread; call when `run` has ended or was cancelled."""
        self._worker.shutdown(wait=True)

    # ---- on the decoder thread

    def _feed(self, data: bytes) -> list[Decoded | Sound]:
        return self._ready(self._decoder.feed(self._reader.feed(data)))

    def _end_segment(self) -> list[Decoded | Sound]:
        return self._ready(self._decoder.feed(self._reader.end_segment()))

    def _lost(self) -> list[Decoded | Sound]:
        self._reader.gap()
        return []

    def _flush(self) -> list[Decoded | Sound]:
        units = self._reader.end_segment()
        return self._ready([*self._decoder.feed(units), *self._decoder.flush()])

    def _ready(self, frames: list[Picture | Sound]) -> list[Decoded | Sound]:
        ready: list[Decoded | Sound] = []
        for frame in frames:
            if isinstance(frame, Sound):
                ready.append(frame)
            elif self._is_due(frame.pts):
                ready.append(self._copy_out(frame))
            else:
                self.skipped_by_rate += 1
        return ready

    def _is_due(self, pts: int) -> bool:
        """Whether a cap on the frame rate keeps this frame."""
        if self.max_framerate is None:
            return True
        # 10 % of an interval of slack: a 30 fps input with jitter must pass a cap of 30 whole.
        if self._last_kept is not None and 0 <= pts - self._last_kept < 0.9 * TICKS / self.max_framerate:
            return False
        self._last_kept = pts
        return True

    def _copy_out(self, picture: Picture) -> Decoded:
        if self._fitter is None:
            width, height = self._size or (picture.width, picture.height)
            self._fitter = Fitter(width & ~1, height & ~1, picture.colour)
        frame = self._fitter.fit(picture.frame)
        # The only copy of the pixels on this side: out of the decoder's padded buffers, which are freed at once.
        return Decoded(planes_of(frame), frame.width, frame.height, picture.pts, picture.colour)
