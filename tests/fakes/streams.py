"""A stand-in for ``stream.manager.Streams`` and the engine client, for tests of the HTTP surface alone.

It keeps the manager's rules about who may start and who is addressed, and reads updates with the real parser; there
is no media and no engine behind it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from gateway_shim.engine_client import EngineState
from gateway_shim.errors import NoSuchStream, NotReady, StreamConflict, StreamsFull, VersionConflict
from gateway_shim.params import StartRequest, Update, parse_update
from proto import engine_pb2 as pb

PROMPT = {
    "1": {"class_type": "LoadTensor", "inputs": {}},
    "5": {"class_type": "ImageSharpen", "inputs": {"image": ["1", 0], "alpha": 1.0}, "_meta": {"title": "Sharpen"}},
    "9": {"class_type": "SaveTensor", "inputs": {"images": ["5", 0]}},
}


@dataclass
class FakeSession:
    request: StartRequest
    version: int = 1
    updates: list[Update] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        return {"type": "status", "state": "ONLINE", "inference_status": {"fps": 24.5, "last_params": {"5": {}}}}


@dataclass(frozen=True)
class FakeResult:
    version: int
    effective_pts: int | None


class FakeStreams:
    def __init__(self, capacity: int = 1) -> None:
        self.capacity = capacity
        self.active: dict[str, FakeSession] = {}
        self.stops: list[tuple[str | None, str]] = []
        self.ready = True
        self.fails: BaseException | None = None  # raised by the next call
        self.start_gate: asyncio.Event | None = None  # a start waits for it

    async def start(self, request: StartRequest) -> FakeSession:
        self._fail()
        if self.start_gate is not None:
            await self.start_gate.wait()
        running = self.active.get(request.stream_id)
        if running is not None:
            if running.request.channels != request.channels:
                raise StreamConflict("runs already, with other channels")
            return running
        if not self.ready:
            raise NotReady("the engine does not answer")
        if len(self.active) >= self.capacity:
            raise StreamsFull("all streams are in use")
        self.active[request.stream_id] = FakeSession(request)
        return self.active[request.stream_id]

    async def stop(self, stream_id: str | None, reason: str) -> bool:
        self._fail()
        self.stops.append((stream_id, reason))
        if stream_id is None and len(self.active) == 1:
            stream_id = next(iter(self.active))
        return self.active.pop(stream_id or "", None) is not None

    def get(self, stream_id: str | None) -> FakeSession:
        if stream_id is None and len(self.active) == 1:
            return next(iter(self.active.values()))
        if stream_id not in self.active:
            raise NoSuchStream(f"stream {stream_id} is not running here")
        return self.active[stream_id]

    async def update(
        self, stream_id: str | None, body: Any, *, dry_run: bool = False, expected_version: int = 0
    ) -> FakeResult:
        self._fail()
        session = self.get(stream_id)
        update = parse_update(body, PROMPT)
        if expected_version not in (0, session.version):
            raise VersionConflict(f"the parameters are at version {session.version}")
        if not dry_run:
            session.version += 1
            session.updates.append(update)
        return FakeResult(session.version, 90_000)

    async def schema(self, stream_id: str | None) -> dict[str, Any]:
        self._fail()
        session = self.get(stream_id)
        return {"stream_id": session.request.stream_id, "version": session.version, "parameters": []}

    def _fail(self) -> None:
        if self.fails is not None:
            failure, self.fails = self.fails, None
            raise failure


@dataclass
class FakeEngine:
    state: EngineState = EngineState.READY
    info: pb.ServerInfo | None = None

    def as_json(self) -> dict[str, Any]:
        return {"address": "unix:/fake", "state": self.state.name, "reason": "", "restarts": 0, "last_end": None}
