"""From outcomes to the output channel: fallback, encoder, segments."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import av

from ..media.decode import Sound
from ..media.encode import Chunk, Encoder
from ..media.settings import EncoderSettings
from ..trickle.publisher import OutgoingSegment, Publisher
from ..trickle.wire import ChannelClosed, ChannelError
from .audio import StreamSound
from .fallback import Fallback, Shown
from .ledger import Ledger, Outcome, Rate
from .mailbox import Entry, Mailbox
from .timing import OutputTiming
from .worker import Worker

logger = logging.getLogger(__name__)

#: A frame that is this much past its due time when its turn comes is not encoded at all: the encoder cannot keep up
#: and a viewer is better served by the next one.
OVERLOAD_S = 1.0

#: Pictures encoded in one hop to the encoder thread, where so many wait, and the time after which none is begun: the
#: first one leaves with the last. Small pictures, for which a hop is dear, are quick enough for several.
PICTURES_PER_HOP = 8
HOP_S = 0.012

#: What a picture needs from the mailbox to its way out, learned: quick to grow and slow to shrink, and never more of
#: the budget than this, or an encoder that cannot keep up would leave the graph no time at all.
LEAD_GROWS, LEAD_SHRINKS = 0.2, 0.02
MAX_LEAD_S = 0.05

#: How often sound without a picture is looked for.
AUDIO_TICK_S = 0.1

#: Distance of the pictures that stand in while the input has none. The encoder's rate control takes more than half a
#: second for a pause and keeps its frame rate (`media.bit_rate`); a segment has four of them, of some hundred bytes.
STILL_EVERY_S = 0.6

#: How long a finished segment may take to arrive while the next one is already open.
SEGMENT_CLOSE_S = 5.0


class Output:
    """Takes frames from the mailbox in order and publishes until the mailbox is closed and empty."""

    def __init__(
        self,
        publisher: Publisher | None,
        mailbox: Mailbox,
        sound: StreamSound,
        ledger: Ledger,
        *,
        settings: Callable[[Entry], EncoderSettings],
        fallback: Fallback | None = None,
        before_first: Callable[[], Awaitable[None]],
        on_first_segment: Callable[[], None] = lambda: None,
        before_pictures: Callable[[int], None] = lambda _: None,
        missing: Callable[[float], int | None] = lambda _: None,
        name: str = "",
    ) -> None:
        """before_pictures: called with the last pts of some pictures before any of their bytes goes out.

        missing: pts of a picture that the input does not have and that is overdue at a loop time; the last one goes
        out again in its place.
        """
        self._publisher = publisher
        self._mailbox = mailbox
        self._sound = sound
        self._before_first = before_first
        self._started_at: float | None = None  # loop time of the first picture
        self._ledger = ledger
        self._settings = settings
        self._on_first_segment = on_first_segment
        self._before_pictures = before_pictures
        self._missing = missing
        self._last: av.VideoFrame | None = None  # the latest picture that went out
        self._worker = Worker(f"encode {name}")
        self._encoder: Encoder | None = None
        self._segment: OutgoingSegment | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self.fallback = fallback or Fallback()
        self.rate = Rate()
        self.timing = OutputTiming()
        self.segments = 0
        self.lost_segments = 0  # that the channel did not take
        self.last_output_at: float | None = None  # loop time

    @property
    def encoder(self) -> Encoder | None:
        """None before the first picture."""
        return self._encoder

    async def run(self) -> None:
        """Raises ChannelClosed when the orchestrator ended the output channel."""
        async with asyncio.TaskGroup() as both:
            sound = both.create_task(self._release_overdue(), name="overdue sound")
            stills = both.create_task(self._repeat_last(), name="stills")
            while (entry := await self._mailbox.pop()) is not None:
                await self._show([entry, *self._mailbox.settled(PICTURES_PER_HOP - 1)])
            await self._finish()
            sound.cancel()
            stills.cancel()

    async def _show(self, entries: Sequence[Entry]) -> None:
        """Pictures that go out now, one behind another."""
        loop = asyncio.get_running_loop()
        if self._started_at is None:
            await self._before_first()
            self._started_at = loop.time()
        now = loop.time()
        shown: list[tuple[Entry, Shown]] = []
        for entry in entries:
            # What waited for the first picture to go out is not late for that.
            if now - max(entry.due, self._started_at) > OVERLOAD_S:
                self._ledger.settle(Outcome.DROPPED, "output_overload")
                continue
            shown.append((entry, self.fallback.choose(entry)))
            self._settle(*shown[-1])
        if not shown:
            return
        if self._publisher is not None:  # otherwise the graph's text is all that is wanted
            async with self._writing:
                left = shown
                while left:
                    encoded = await self._worker.run(self._encode, left)
                    done, left = left[: len(encoded)], left[len(encoded) :]
                    self._before_pictures(done[-1][0].pts)
                    for chunks in encoded:
                        if await self._write(chunks):
                            self._ledger.published += 1
                await self._write_sound(self._sound.release(shown[-1][0].pts))
        self._last = shown[-1][1].frame
        self.last_output_at = loop.time()
        self._learn_lead(self.last_output_at - now)
        for entry, _ in shown:
            self.rate.tick()
            self.timing.picture(self.last_output_at - entry.arrived_at)

    def _learn_lead(self, took_s: float) -> None:
        more = min(took_s, MAX_LEAD_S) - self._mailbox.lead_s
        self._mailbox.lead_s += more * (LEAD_GROWS if more > 0 else LEAD_SHRINKS)

    def _settle(self, entry: Entry, shown: Shown) -> None:
        """The ledger tells what the viewer saw, not what was planned."""
        assert entry.outcome is not None
        outcome = entry.outcome
        if shown.repeated:
            self._ledger.repeated += 1
            if outcome is Outcome.PASSED_THROUGH:
                outcome = Outcome.DROPPED
        elif outcome is Outcome.DROPPED:
            outcome = Outcome.PASSED_THROUGH
        self._ledger.settle(outcome, entry.reason)

    async def _release_overdue(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(AUDIO_TICK_S)
            async with self._writing:
                await self._write_sound(self._sound.overdue(loop.time()))

    async def _repeat_last(self) -> None:
        """The last picture again while the input has none: segments end only where a picture begins another."""
        while True:
            await asyncio.sleep(STILL_EVERY_S)
            await self._repeat_if_missing()

    async def _repeat_if_missing(self) -> None:
        # Not in the loop above: its picture would stay in a frame that the traceback of a cancellation keeps, and so
        # would the shared memory of the engine, until the garbage collector comes by.
        loop = asyncio.get_running_loop()
        encoder, last = self._encoder, self._last
        if self._publisher is None or encoder is None or last is None:
            return
        # What waits for the encoder or for the channel is on its way; nothing is missing.
        if len(self._mailbox) or self._writing.locked() or (pts := self._missing(loop.time())) is None:
            return
        async with self._writing:
            chunks = await self._worker.run(encoder.video, last, pts)
            self._before_pictures(pts)
            if await self._write(chunks):
                self._ledger.published += 1
                self._ledger.repeated += 1
            await self._write_sound(self._sound.release(pts))
        self.last_output_at = loop.time()
        self.rate.tick()

    # ---- on the encoder thread

    def _encode(self, pictures: Sequence[tuple[Entry, Shown]]) -> list[list[Chunk]]:
        """The chunks of the first of them, one at least, as many as there is time for."""
        encoder = self._encoder
        if encoder is None:
            encoder = self._encoder = Encoder(self._settings(pictures[0][0]))
        until = time.monotonic() + HOP_S
        encoded = []
        for _, shown in pictures:
            encoded.append(encoder.video(shown.frame, shown.pts))
            if time.monotonic() > until:
                break
        return encoded

    def _encode_sound(self, blocks: list[Sound]) -> list[Chunk]:
        if self._encoder is None:
            return []
        chunks = []
        for block in blocks:
            chunks += self._encoder.audio(block.frame, block.pts)
            self.timing.sound(block.late + self._encoder.sound_late)
        return chunks

    def _begin_segment(self) -> list[Chunk]:
        if self._encoder is not None:
            self._encoder.begin_segment()
        return []

    def _flush(self) -> list[Chunk]:
        return self._encoder.flush() if self._encoder is not None else []

    # ---- segments

    async def _write_sound(self, blocks: Iterable[Sound]) -> None:
        if waiting := list(blocks):
            await self._write(await self._worker.run(self._encode_sound, waiting))

    async def _write(self, chunks: list[Chunk]) -> bool:
        """Whether the channel took them all. A segment that it did not take is followed by another at once."""
        if self._publisher is None:
            return True
        taken = True
        for chunk in chunks:
            try:
                if chunk.starts_segment:
                    await self._next_segment(self._publisher)
                if self._segment is None:
                    taken = False  # the rest of a segment that was lost: of no use without its beginning
                    continue
                await self._segment.write(chunk.data)
            except ChannelClosed:
                raise
            except ChannelError as exc:
                taken = False
                self.lost_segments += 1
                self._segment = None
                if self._encoder is not None:
                    await self._worker.run(self._begin_segment)
                logger.warning("an output segment was lost: %s", exc)
        return taken

    async def _next_segment(self, publisher: Publisher) -> None:
        if self._segment is not None:
            # Awaiting the answer here would hold up the first frames of the next segment by a round trip.
            closing = asyncio.create_task(self._close_segment(self._segment), name="close segment")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._segment = None
        self._segment = await publisher.open_segment()
        self.segments += 1
        if self.segments == 1:
            self._on_first_segment()

    async def _close_segment(self, segment: OutgoingSegment) -> None:
        try:
            async with asyncio.timeout(SEGMENT_CLOSE_S):
                await segment.close()
        except (ChannelError, TimeoutError) as exc:
            # A channel that is over says so at the next write too; a lost end of one segment is a gap.
            self.lost_segments += 1
            logger.info("an output segment did not end cleanly: %s", exc or "no answer")

    async def _finish(self) -> None:
        async with self._writing:
            await self._write_sound(self._sound.rest())
            await self._write(await self._worker.run(self._flush))
            if self._segment is not None:
                await self._close_segment(self._segment)
                self._segment = None

    async def close(self) -> None:
        """End the encoder thread and what is still closing; call when `run` has ended or was cancelled."""
        if self._segment is not None:
            await self._close_segment(self._segment)
            self._segment = None
        if self._closing:
            await asyncio.wait(self._closing, timeout=SEGMENT_CLOSE_S)
        for task in self._closing:
            task.cancel()
        await self._worker.close()
        self.fallback.forget()
        self._last = None
        if self._encoder is not None:
            self._encoder.close()
