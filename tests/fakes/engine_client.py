"""A client of the engine built from the generated code alone, and engines of the test's own process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc.aio

from engine.backend import Backend
from engine.config import Settings
from engine.core import Engine
from engine.service import Server
from proto import MAX_MESSAGE_BYTES, engine_pb2_grpc
from proto import engine_pb2 as pb

# grpc.aio has one poller thread per process, which otherwise starts inside the first test that uses it, and would
# look like a thread that the test left running.
grpc.aio.init_grpc_aio()

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


def settings_for(directory: Path, **changes: Any) -> Settings:
    """Of an engine under ``directory``, without ComfyUI unless the test says otherwise."""
    values: dict[str, Any] = {"address": f"unix:{directory / 'engine.sock'}", "comfyui_dir": None, "grace_s": 2.0}
    return Settings(**values | changes)


@contextlib.asynccontextmanager
async def running_engine(settings: Settings, backend: Backend | None = None) -> AsyncIterator[Server]:
    """A real server in this process."""
    server = Server(lambda on_settled: Engine(settings, backend, on_settled), settings.max_message_bytes)
    server.bind(settings.address)
    await server.start()
    try:
        yield server
    finally:
        assert await server.stop(settings.grace_s), "the executor thread did not end"


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    """Wait until ``check`` holds; the test's own timeout bounds it."""
    while not await check():  # noqa: ASYNC110  # what is waited for is in another process, or says nothing
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        yield Client(channel)


class Client:
    """``stub`` for the unary calls, ``open`` for sessions."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub: Any = engine_pb2_grpc.EngineStub(channel)

    def process(self) -> Process:
        return Process(self.stub.Process())

    async def open(self, width: int = 64, height: int = 48, **fields: Any) -> Process:
        """A session that is open; keywords are fields of OpenSession."""
        process = self.process()
        fields.setdefault("video", pb.VideoFormat(width=width, height=height))
        await process.send(pb.ProcessRequest(open=pb.OpenSession(**fields)))
        await process.until("opened")
        return process


class Process:
    """One call of Process. Keeps what it read: ``results`` by frame id, ``faults``, ``texts``, ``progress``."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.opened: pb.SessionOpened | None = None
        self.credits = 0
        self.results: dict[int, pb.FrameResult] = {}
        self.order: list[int] = []
        self.faults: list[pb.Fault] = []
        self.texts: list[pb.TextItem] = []
        self.sounds: list[pb.AudioBlock] = []
        self.progress: list[pb.Progress] = []
        self.ended = False

    @property
    def session_id(self) -> str:
        assert self.opened is not None
        return self.opened.session_id

    async def send(self, request: pb.ProcessRequest) -> None:
        await self.call.write(request)

    async def frames(self, frames: Iterable[pb.Frame]) -> None:
        batch = pb.FrameBatch(frames=list(frames))
        self.credits -= len(batch.frames)
        await self.send(pb.ProcessRequest(frames=batch))

    async def frame(self, frame_id: int, planes: bytes, pts: int | None = None, age_ms: int = 0) -> None:
        pts = frame_id * 3000 if pts is None else pts
        await self.frames([pb.Frame(frame_id=frame_id, pts=pts, planes=planes, age_ms=age_ms)])

    async def end_input(self) -> None:
        await self.send(pb.ProcessRequest(end_of_input=pb.EndOfInput()))

    async def read(self) -> pb.ProcessResponse | None:
        """The next response; None after the last. Raises grpc.aio.AioRpcError when the call failed."""
        response = await self.call.read()
        if response is grpc.aio.EOF:
            self.ended = True
            code = await self.call.code()
            if code is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code,
                    await self.call.initial_metadata(),
                    await self.call.trailing_metadata(),
                    await self.call.details(),
                )
            return None
        self.credits += response.credits
        match response.WhichOneof("message"):
            case "opened":
                self.opened = response.opened
            case "results":
                for result in response.results.results:
                    assert result.frame_id not in self.results, f"frame {result.frame_id} has two results"
                    self.results[result.frame_id] = result
                    self.order.append(result.frame_id)
            case "fault":
                self.faults.append(response.fault)
            case "audio":
                self.sounds.extend(response.audio.blocks)
            case "text":
                self.texts.extend(response.text.items)
            case "progress":
                self.progress.append(response.progress)
        return response

    async def until(self, kind: str) -> pb.ProcessResponse:
        """Read up to the next message of ``kind``."""
        while (response := await self.read()) is not None:
            if response.WhichOneof("message") == kind:
                return response
        raise AssertionError(f"the call ended without {kind}")

    async def result(self, frame_id: int) -> pb.FrameResult:
        """Read up to the result of that frame."""
        while frame_id not in self.results:
            assert await self.read() is not None, f"the call ended without a result of frame {frame_id}"
        return self.results[frame_id]

    async def to_end(self) -> None:
        while await self.read() is not None:
            pass


def grey(width: int, height: int, level: int) -> bytes:
    """An I420 picture of one grey level."""
    return bytes([level]) * (width * height) + b"\x80" * (width * height // 2)
