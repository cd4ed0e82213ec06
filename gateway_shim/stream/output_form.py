"""What a stream's output looks like. The first picture that goes out fixes it: players and the gateway keep that."""

from __future__ import annotations

import asyncio
import contextlib

from ..media.settings import EncoderSettings
from ..params import StartRequest
from .generate import Generator
from .inference import Inference
from .intake import Intake
from .keeper import Keeper
from .mailbox import Entry
from .settings import StreamSettings

#: Longest wait for the size of the graph's pictures, from when the first one is due: what comes meanwhile waits too,
#: and goes out with it. A graph that loads for longer has its pictures scaled to the input's size.
SIZE_WAIT_S = 2.0


class OutputForm:
    """Reads the request, the input and the graph. `source` is given when it is made, before the first picture."""

    def __init__(self, request: StartRequest, settings: StreamSettings, inference: Inference, keeper: Keeper) -> None:
        self.source: Intake | Generator | None = None
        self._is_asked = request.width is not None
        self._settings = settings
        self._inference = inference
        self._keeper = keeper

    async def size_known(self) -> None:
        """Before the first picture goes out: give an engine that opens our session the time to say its size."""
        if not self._is_asked and not self._keeper.is_shaped and self._inference.may_open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SIZE_WAIT_S):
                    await self._inference.answerable()

    def encoder_settings(self, entry: Entry) -> EncoderSettings:
        """By the first picture that goes out; a graph that scales decides the size if the engine was ready. Called on
        the encoder's thread."""
        width, height = entry.frame.width, entry.frame.height
        if not self._is_asked:
            if entry.result is not None:
                width, height = entry.result.width, entry.result.height
            elif self._inference.traffic.picture_size is not None:
                width, height = self._inference.traffic.picture_size
        source = self.source
        settings = EncoderSettings(
            width=width,
            height=height,
            frame_rate=source.frame_rate if source is not None else None,
            bit_rate=self._settings.bit_rate,
            codec=self._settings.codecs.encoder,
            threads=self._settings.codec_threads,
            streams=self._settings.capacity,
            preset=self._settings.preset,  # type: ignore[arg-type]  # checked by config
            segment_s=self._settings.segment_s,
            audio=isinstance(source, Intake) and source.has_audio,
            colour=entry.colour,
        )
        return self._keeper.shaped(settings)
