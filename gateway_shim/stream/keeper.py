"""Keeps one stream's record in the journal true, from start to end, so that it may be killed at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import Any, Protocol

from ..media.colour import Colour
from ..media.settings import EncoderSettings
from ..params import StartRequest
from ..trickle.wire import SEQ_CURRENT
from .control import ControlUpdates
from .events import Events
from .generate import DEFAULT_FRAMERATE, Generator
from .intake import Intake
from .journal import Facts, Kept, Position, Record, Shape
from .pacing import TICKS

#: How often the record says that we live, and is looked through for what changed by itself.
LOOK_EVERY_S = 0.25
#: After a write that failed.
WRITE_AGAIN_S = 2.0


class _Parameters(Protocol):
    prompt: dict[str, Any]

    @property
    def version(self) -> int: ...


class Keeper:
    """Reads the parts of a stream, which it is given as they are made. Without a record it does nothing."""

    def __init__(self, request: StartRequest, record: Record | None, kept: Kept | None) -> None:
        self.intake: Intake | Generator | None = None
        self.control: ControlUpdates | None = None
        self.parameters: _Parameters | None = None
        self.kept = kept
        self._request = request
        self._record = record
        self._shape = kept.facts.shape if kept is not None else None
        self._resumed_at = (*kept.facts.resumed_at, time.time()) if kept is not None else ()
        self._position = kept.position if kept is not None else Position(time.time())
        self._facts: Facts | None = None
        self._writing = asyncio.Lock()
        self._write_after = 0.0  # loop time; a disk that takes nothing is not asked four times a second
        self._look = asyncio.Event()

    # ---- what a predecessor left

    @property
    def position(self) -> Position | None:
        """How far the predecessor was, if there was one."""
        return None if self.kept is None else self.kept.position

    @property
    def is_shaped(self) -> bool:
        """Whether viewers have seen pictures of this stream, whose size and tracks hold for ever."""
        return self._shape is not None

    @property
    def first_pts(self) -> int:
        """Where the clock of a stream without input begins."""
        if self.kept is None or self.kept.position.pts is None:
            return 0
        return self.kept.position.pts + round((self.kept.silent_s + 1 / DEFAULT_FRAMERATE) * TICKS)

    @property
    def control_start(self) -> int:
        """First segment to read of the control channel: a message that the predecessor has applied must not take back
        what came by HTTP after it."""
        done_seq = None if self.kept is None else self.kept.position.control_seq
        return SEQ_CURRENT if done_seq is None else done_seq + 1

    def announce(self, events: Events) -> None:
        """Say that the stream begins here, or goes on."""
        if self.kept is None:
            events.trace("runner_receive_stream_request")
        else:
            facts = {"version": self.kept.facts.version, "silent_s": round(self.kept.silent_s, 2)}
            events.send("stream_resumed", facts)

    # ---- what a successor will need

    def shaped(self, settings: EncoderSettings) -> EncoderSettings:
        """The form of the output, which is the predecessor's if there was one. Called on the encoder's thread."""
        colour = settings.colour
        if self._shape is None:
            self._shape = Shape(settings.width, settings.height, settings.audio, colour.matrix, colour.full_range)
        shape = self._shape
        colour = Colour(shape.matrix, shape.full_range)  # type: ignore[arg-type]  # one of ours
        return replace(settings, width=shape.width, height=shape.height, audio=shape.audio, colour=colour)

    def before_pictures(self, pts: int) -> None:
        """Bytes of pictures up to this one are about to go out."""
        if self._facts is None or self._facts.shape is None:
            self._look.set()  # from now on viewers know the shape: a successor must keep it
        self._reached(pts)

    def asked(self, **values: Any) -> None:
        """Fields of the start request that a client has changed; the next `keep` writes them."""
        self._request = replace(self._request, **values)

    async def taken_up(self) -> None:
        """Returns when a successor would know that the stream was taken up here, or will never hear of it. Await it
        before anything of the stream runs: one that kills its shim at once would be taken up for ever, and no other
        stream would live."""
        if self.kept is not None and not await self._write():
            self.forget()

    async def run(self) -> None:
        """Until cancelled."""
        while self._record is not None:
            await self.keep()
            self._reached(self._position.pts)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._look.wait()
            self._look.clear()

    async def keep(self) -> None:
        """Write what changed; returns when a successor would find it."""
        if await self._write():
            # With it the place in the control channel: what was applied before this must not come again after it.
            self._reached(self._position.pts)

    async def _write(self) -> bool:
        """Whether what changed is in the journal now; False too where nothing has."""
        loop = asyncio.get_running_loop()
        if self._record is None or self.parameters is None or loop.time() < self._write_after:
            return False
        async with self._writing:
            request = self._request
            if self.intake is not None:
                request = replace(request, max_framerate=self.intake.max_framerate)
            parameters = self.parameters
            facts = Facts(request, parameters.prompt, parameters.version, self._shape, self._resumed_at)
            before = self._facts
            # Prompts are replaced, never changed; comparing megabytes four times a second would be too much.
            if (
                before is not None
                and before.prompt is facts.prompt
                and replace(before, prompt={}) == replace(facts, prompt={})
            ):
                return False
            if await asyncio.to_thread(self._record.write, facts):
                self._facts = facts
                return True
            self._write_after = loop.time() + WRITE_AGAIN_S
            return False

    def forget(self) -> None:
        """The stream is over."""
        if self._record is not None:
            self._record.remove()
            self._record = None

    def _reached(self, pts: int | None) -> None:
        if self._record is None:
            return
        before = self._position
        source, offset, input_seq = before.source, before.offset, before.input_seq
        if isinstance(self.intake, Intake) and (place := self.intake.place) is not None:
            source, offset, input_seq = place
        control_seq = self.control.done_seq if self.control is not None else None
        if control_seq is None:
            control_seq = before.control_seq
        self._position = Position(time.time(), pts, source, offset, input_seq, control_seq)
        self._record.reached(self._position)
