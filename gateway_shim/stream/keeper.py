"""Keeps one stream's record in the journal true, from start to end, so that it may be killed at any moment."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any, Protocol

from ..media.settings import EncoderSettings
from ..params import StartRequest
from .control import ControlUpdates
from .generate import Generator
from .intake import Intake
from .journal import Facts, Kept, Position, Record, Shape

#: How often the record says that we live, and is looked through for what changed by itself.
LOOK_EVERY_S = 0.25


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
        self._request = request
        self._record = record
        self._shape = kept.facts.shape if kept is not None else None
        self._resumed_at = (*kept.facts.resumed_at, time.time()) if kept is not None else ()
        self._position = kept.position if kept is not None else Position(time.time())
        self._facts: Facts | None = None
        self._writing = asyncio.Lock()

    def shaped(self, settings: EncoderSettings) -> None:
        """The output got its form. Called on the encoder's thread."""
        colour = settings.colour
        self._shape = Shape(settings.width, settings.height, settings.audio, colour.matrix, colour.full_range)

    def before_picture(self, pts: int) -> None:
        """Bytes of this picture are about to go out."""
        self._reached(pts)

    async def run(self) -> None:
        """Until cancelled."""
        while self._record is not None:
            await self.keep()
            self._reached(self._position.pts)
            await asyncio.sleep(LOOK_EVERY_S)

    async def keep(self) -> None:
        """Write what changed; returns when a successor would find it."""
        if self._record is None or self.parameters is None:
            return
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
                return
            self._facts = facts
            await asyncio.to_thread(self._record.write, facts)

    def forget(self) -> None:
        """The stream is over."""
        if self._record is not None:
            self._record.remove()
            self._record = None

    def _reached(self, pts: int | None) -> None:
        if self._record is None:
            return
        position = replace(self._position, at=time.time(), pts=pts)
        if isinstance(self.intake, Intake):
            position = self.intake.position(position)
        if self.control is not None and (seq := self.control.done_seq) is not None:
            position = replace(position, control_seq=seq)
        self._position = position
        self._record.reached(position)
