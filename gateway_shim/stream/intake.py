"""From the input channel to decoded frames: subscriber, access units, decoder, in the order of arrival."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from fractions import Fraction

import av

from ..media.decode import Colour, Decoder, DecoderSettings, Picture, Sound
from ..media.fit import Fitter
from ..media.settings import MAX_SIDE, MIN_SIDE
from ..media.ts import AccessUnit, TsReader
from ..trickle.subscriber import Subscriber
from .journal import Position
from .ledger import Rate
from .pacing import TICKS
from .worker import Worker

logger = logging.getLogger(__name__)

#: Access units decoded in one hop to the decoder thread. A hop costs 60 us (hot-path.md section 6), but a still one
#: of 720p has a few hundred bytes, and 1.4 MB decoded: without a bound one segment of them is 400 MB at once.
UNITS_PER_HOP = 8

#: Longest segment that may be read once more when a stream is taken up again. protocol.md 2.1: 1 to 15 s.
MAX_AGAIN = 60 * TICKS


@dataclass(frozen=True, slots=True)
class Decoded:
    """One picture, ready for the engine and for the encoder; pts as it came.

    ``frame``: yuv420p of even size. Its samples belong to the decoder, for which they are references: read-only.
    ``colour``: the stream's, the same for all.
    """

    frame: av.VideoFrame
    pts: int
    colour: Colour


class Intake:
    """Reads one channel until it is over.

    on_picture is awaited for each `Decoded` in display order, on_sound called for each `Sound`. The size of the first
    picture, or the one that was asked for, is the stream's size; every other picture is scaled to it. Where that is
    none that can be encoded, it is the nearest that can.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        *,
        size: tuple[int, int] | None,
        on_picture: Callable[[Decoded], Awaitable[None]],
        on_sound: Callable[[Sound], None],
        on_first_segment: Callable[[], None] = lambda: None,
        moved: Callable[[], int] = lambda: 0,
        decoder: DecoderSettings | None = None,
        resumed: Position | None = None,
        name: str = "",
    ) -> None:
        """moved: ticks that are added to the stamps of what is handed on.

        resumed: how far the stream was when an earlier shim had it.
        """
        self._subscriber = subscriber
        self._on_picture = on_picture
        self._on_sound = on_sound
        self._on_first_segment = on_first_segment
        self._moved = moved
        self._worker = Worker(f"decode {name}")
        self._reader = TsReader()
        self._units: deque[AccessUnit] = deque()  # not decoded yet; the decoder thread's between two hops
        self.decoder = Decoder(decoder)
        self._resumed = resumed if resumed is not None and resumed.source is not None else None
        self._size = size
        self._fitter: Fitter | None = None
        self.max_framerate: int | None = None
        self._due_pts: int | None = None  # of the next frame that the cap lets through
        self.skipped_by_rate = 0
        self.rate = Rate()
        self.last_input_at: float | None = None  # loop time of the last bytes

    @property
    def has_audio(self) -> bool:
        """Whether the program declares sound that we can read."""
        return any(track.kind == "audio" for track in self._reader.tracks)

    @property
    def frame_rate(self) -> Fraction | None:
        """Of what is handed on; None while nothing is known."""
        rate = self.decoder.frame_rate
        return rate if rate is None or self.max_framerate is None else min(rate, Fraction(self.max_framerate))

    @property
    def place(self) -> tuple[int | None, int, int] | None:
        """Where the input is now, as a `Position` has it: source, offset, input_seq. None while nothing was read."""
        seq = self._subscriber.read_seq
        if seq is None or self._resumed is not None:
            return None
        source, offset = self.decoder.position
        return source, offset + self._moved(), seq

    def _resume(self, seq: int) -> None:
        """Before the first byte: a segment of which the earlier shim read a part begins before where that was, any
        later one does not, unless the source was restarted."""
        resumed, self._resumed = self._resumed, None
        if resumed is None or resumed.source is None:
            return
        again = resumed.input_seq is None or seq <= resumed.input_seq + 1
        self._reader.resume(resumed.source)
        self.decoder.resume(resumed.source, resumed.offset, MAX_AGAIN if again else 0)

    async def run(self) -> str:
        """Read until the channel is over; returns why."""
        loop = asyncio.get_running_loop()
        first = True
        async for segment in self._subscriber:
            if segment.gap:
                self._reader.gap()
            self._resume(segment.seq)
            async for data in segment:
                self.last_input_at = loop.time()
                if first:
                    first = False
                    self._on_first_segment()
                await self._decode(self._reader.feed, data)
            if segment.complete:
                await self._decode(self._reader.end_segment)
            else:
                self._reader.gap()
        await self._hand_on(await self._worker.run(self._flush))
        return self._subscriber.closed_reason or "the input channel ended"

    async def _decode(self, read: Callable[..., list[AccessUnit]], *data: bytes) -> None:
        """Bytes to units to frames, as a rule in one hop."""
        await self._hand_on(await self._worker.run(self._decode_first, read, *data))
        while self._units:
            await self._hand_on(await self._worker.run(self._decode_some))

    async def _hand_on(self, frames: list[Decoded | Sound]) -> None:
        for frame in frames:
            if isinstance(frame, Sound):
                self._on_sound(frame)
            else:
                self.rate.tick()
                await self._on_picture(frame)

    async def close(self) -> None:
        """End the decoder thread; call when `run` has ended or was cancelled. Waits for a hop that runs."""
        await self._worker.close()

    # ---- on the decoder thread

    def _decode_first(self, read: Callable[..., list[AccessUnit]], *data: bytes) -> list[Decoded | Sound]:
        self._units.extend(read(*data))
        return self._decode_some()

    def _decode_some(self) -> list[Decoded | Sound]:
        units = [self._units.popleft() for _ in range(min(UNITS_PER_HOP, len(self._units)))]
        return self._ready(self.decoder.feed(units)) if units else []

    def _flush(self) -> list[Decoded | Sound]:
        units = self._reader.end_segment()
        return self._ready([*self.decoder.feed(units), *self.decoder.flush()])

    def _ready(self, frames: list[Picture | Sound]) -> list[Decoded | Sound]:
        ready: list[Decoded | Sound] = []
        for frame in frames:
            if isinstance(frame, Sound):
                ready.append(frame)
            elif self._is_due(frame.pts):
                ready.append(self._fitted(frame))
            else:
                self.skipped_by_rate += 1
        return ready

    def _is_due(self, pts: int) -> bool:
        """Whether a cap on the frame rate keeps this frame."""
        if self.max_framerate is None:
            return True
        interval = TICKS // self.max_framerate
        if self._due_pts is None or not -interval <= self._due_pts - pts <= interval:
            self._due_pts = pts  # the first frame, a jump, or a pause
        # A tenth of an interval of slack: a 30 fps input with jitter passes a cap of 30 whole. The schedule goes on
        # in whole intervals, so that 24 out of 30 are 24 and not every second frame.
        if pts < self._due_pts - interval // 10:
            return False
        self._due_pts += interval
        return True

    def _fitted(self, picture: Picture) -> Decoded:
        if self._fitter is None:
            sides = self._size or (picture.width, picture.height)
            width, height = (min(max(side & ~1, MIN_SIDE), MAX_SIDE) for side in sides)
            self._fitter = Fitter(width, height, picture.colour)
        # The engine's session and the encoder have the colour of the first picture for good.
        return Decoded(self._fitter.fit(picture.frame, picture.colour), picture.pts, self._fitter.colour)
