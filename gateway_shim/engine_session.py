"""One session on an engine, as the shim sees it: one ``Process`` call, its credits, and the lane of its planes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from proto import engine_pb2 as pb
from proto.frames import Frame, FrameBatch
from proto.results import Results

from .engine_errors import error_from
from .engine_lane import EngineLane
from .errors import EngineGone
from .media.rows import Rows, planes_for_message

#: Frames of one message that carries slot numbers: what the engine runs in one visit.
MAX_BATCH = 8


class EngineSession:
    """One open ``Process`` call. Owned by one sender and one reader task; ends with `close`."""

    def __init__(self, call: Any, opened: pb.SessionOpened, credits: int, lane: EngineLane | None = None) -> None:
        self._call = call
        self._lane = lane
        self._credits = credits
        self._granted = asyncio.Event()
        self._writing = asyncio.Lock()  # gRPC takes one message of a call at a time
        if credits:
            self._granted.set()
        self.opened = opened
        self.session_id: str = opened.session_id

    @property
    def credits(self) -> int:
        """Frames that may be sent now."""
        return self._credits

    async def credit(self) -> None:
        """Wait until at least one frame may be sent."""
        await self._granted.wait()
        if self._lane is not None:
            await self._lane.freed()

    @property
    def lane(self) -> str:
        """How planes travel: "shared_memory" or "bytes"."""
        return "bytes" if self._lane is None else "shared_memory"

    @property
    def batch(self) -> int:
        """Frames that go well in one message now. With planes in it, batches cost more (hot-path.md section 4)."""
        return 1 if self._lane is None else max(1, min(MAX_BATCH, self._lane.room))

    def load(self, frame: Frame, rows: Rows) -> Frame:
        """Give a frame its planes: copied into a slot, or as pieces of ``rows`` themselves."""
        if self._lane is not None:
            frame.slot = self._lane.put(frame.frame_id, rows)
        if not frame.slot:
            frame.planes = planes_for_message(rows)
        return frame

    async def send(self, frames: Sequence[Frame]) -> None:
        """Send one batch; spends a credit for each frame. Raises EngineGone."""
        self._credits -= len(frames)
        if self._credits <= 0:
            self._granted.clear()
        await self._write(FrameBatch(frames, self._lane.released() if self._lane is not None else ()))

    async def send_sound(self, blocks: Sequence[pb.AudioBlock]) -> None:
        """Sound needs no credit. Raises EngineGone."""
        await self._write(pb.ProcessRequest(audio=pb.AudioBatch(blocks=blocks)))

    async def set_latency_budget(self, budget_s: float) -> None:
        """Of what is sent from here on. Raises EngineGone."""
        await self._write(pb.ProcessRequest(latency_budget_ms=round(budget_s * 1000)))

    async def end_input(self) -> None:
        """Say that no frame follows; the engine answers what it holds and ends the call."""
        await self._write(pb.ProcessRequest(end_of_input=pb.EndOfInput()))

    async def _write(self, request: pb.ProcessRequest | FrameBatch) -> None:
        try:
            async with self._writing:
                await self._call.write(request)
        except asyncio.InvalidStateError as exc:
            raise EngineGone("the engine ended the session") from exc
        except grpc.aio.AioRpcError as exc:
            raise error_from(exc) from exc

    async def responses(self) -> AsyncIterator[pb.ProcessResponse | Results]:
        """Everything the engine says, until it ends the call. Raises EngineGone or what it refused."""
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                if response is None:  # gRPC's way to say that it could not be parsed
                    raise EngineGone("the engine sent what is no message of the contract")
                if self._lane is not None and isinstance(response, Results):
                    _take_slots(self._lane, response)
                self._grant(response.credits)
                yield response
        except grpc.aio.AioRpcError as exc:
            raise error_from(exc) from exc

    def _grant(self, credits: int) -> None:
        self._credits += credits
        if self._credits > 0:
            self._granted.set()

    def close(self) -> None:
        self._call.cancel()


def _take_slots(lane: EngineLane, results: Results) -> None:
    """Frames that were answered leave their slots; pictures get their planes."""
    for result in results.results:
        lane.answered(result.frame_id)
        if result.picture is not None and result.picture.slot:
            try:
                result.picture.planes = lane.picture(result.picture).data
            except ValueError as exc:
                result.picture = None
                result.failed = pb.Fault(code="bad_picture", message=f"the engine's picture cannot be shown: {exc}")
