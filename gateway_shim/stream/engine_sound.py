"""The sound of one stream on its way through the engine: what is sent, what comes back, when none is to be had."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from proto import engine_pb2 as pb

from ..engine_session import EngineSession
from ..media.decode import Sound
from ..media.sound import SAMPLE_RATE
from .audio import StreamSound, samples_of
from .av_sync import AudioGate

#: What the decoder gives and the encoder takes; pts are positions in samples.
FORMAT: Final = pb.AudioFormat(
    sample_rate=SAMPLE_RATE, channels=2, time_base=pb.Rational(numerator=1, denominator=SAMPLE_RATE)
)

#: Blocks that may wait for an engine that does not read; the oldest goes. 20 ms each, that is 10 s.
MAX_BLOCKS: Final = 500

#: Time for a run of the graph beyond the length of its buffer, before the input's sound goes out instead.
RUN_S: Final = 0.5


class EngineSound:
    """`out` is what the output takes. Sound goes to the engine while its graph takes some."""

    def __init__(self, gate: AudioGate[Sound]) -> None:
        self.out = StreamSound(gate)
        self._taken = False
        self._blocks: deque[pb.AudioBlock] = deque(maxlen=MAX_BLOCKS)
        self._changed = asyncio.Event()

    def put(self, sound: Sound, due: float) -> None:
        """Of the input. ``due``: loop time at which it has to go out without any graph."""
        position = self.out.put(sound, due)
        if self._taken:
            self._blocks.append(pb.AudioBlock(pts=position, samples=samples_of(sound)))
            self._changed.set()

    def opened(self, message: pb.SessionOpened) -> None:
        """A session runs, or its workflow takes or gives something else from here on."""
        self._taken = message.audio_input
        if not self._taken:
            self._blocks.clear()
        if message.HasField("audio_output"):
            self.out.expect(message.audio_output.block_samples / SAMPLE_RATE + RUN_S)
        else:
            self.out.give_up()

    def lost(self) -> None:
        """The session is gone, and what it had with it."""
        self._taken = False
        self._blocks.clear()
        self.out.give_up()

    def answer(self, batch: pb.AudioBatch) -> None:
        """The graph's sound."""
        for block in batch.blocks:
            self.out.replace(block.pts, block.samples)

    async def send(self, session: EngineSession) -> None:
        """Until cancelled. Raises EngineGone."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            blocks = list(self._blocks)
            self._blocks.clear()
            if blocks:
                await session.send_sound(blocks)
