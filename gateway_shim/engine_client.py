"""The shim's end of the engine contract: who is there, what it is asked, and the opening of sessions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto import MAX_MESSAGE_BYTES, WIRE_VERSION, engine_pb2_grpc
from proto import engine_pb2 as pb
from proto.frames import encode_request
from proto.results import parse_response
from proto.tasks import ended

from . import deaths
from .deaths import Death
from .engine_errors import error_from, error_of
from .engine_lane import EngineLane
from .engine_session import EngineSession
from .errors import EngineGone, HeadraceError, WorkflowRefused

logger = logging.getLogger(__name__)

SERVICE = "headrace.engine.v1.Engine"

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A stopped or hung process answers no ping; without these its streams would stay open for ever.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # An engine that supervisord restarts is back within a second or two: look often.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

RETRY_S = 0.25  # between two looks at an engine that does not answer
RPC_TIMEOUT_S = 5.0
INFO_EVERY_S = 3.0  # load, device memory and failed packs change while it runs

#: Streams that an engine is known to have served; the longest gone are forgotten.
SERVED_STREAMS = 256
#: Silence of an engine in which a session is being opened, after which that is given up: ComfyUI's packs and models
#: may hold its interpreter for long (the watchdog's LOADING_SILENCE_S, for engines that no watchdog sees).
OPEN_SILENCE_S = 60.0

#: For an engine that a stream suspects: what its event loop needs, many times over.
SUSPECT_TIMEOUT_S = 2.0


class EngineState(StrEnum):
    ABSENT = "absent"  # never answered since the shim started
    LOADING = "loading"  # answers, but cannot run graphs yet
    READY = "ready"
    BROKEN = "broken"  # answers, but its ComfyUI did not load: no workflow can run
    DEAD = "dead"  # answered before, does not now


def overrides_of(overrides: Mapping[str, Mapping[str, Any]]) -> list[pb.NodeOverride]:
    """``{node_id: {input: value}}`` as messages; values as JSON text, which keeps 64-bit seeds exact."""
    return [
        pb.NodeOverride(node_id=node_id, input=name, value_json=json.dumps(value))
        for node_id, inputs in overrides.items()
        for name, value in inputs.items()
    ]


class EngineClient:
    """One engine's address: watches whether it is there and opens sessions on it.

    ``on_change`` is called on the loop whenever `state` or `info` changes.
    """

    def __init__(
        self, address: str, *, share_memory: bool = True, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.address = address
        self._share = share_memory
        self.state = EngineState.ABSENT
        self.info: pb.ServerInfo | None = None
        self.restarts = 0  # times that another process answered than before
        self.sessions = 0  # open ones of this shim
        self._sessions_then = 0  # when `info` was asked for
        self._served: dict[str, float] = {}  # loop time of the open by stream id, oldest first
        self._complaint = ""  # what is wrong with an engine that does answer
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._suspected = asyncio.Event()
        self._channel: grpc.aio.Channel
        self._stub: Any
        self._process: Any
        self._watcher: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self._stub = engine_pb2_grpc.EngineStub(self._channel)
        # As the stub's, with our own hand on the messages that carry pictures (see proto.fields).
        self._process = self._channel.stream_stream(f"/{SERVICE}/Process", encode_request, parse_response)
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.address}")
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await ended(self._watcher)
        finally:
            await self._channel.close()

    # ---- who is there

    async def ready(self) -> None:
        """Wait until the engine can run sessions."""
        while self.state is not EngineState.READY:
            await self._changed.wait()

    async def gone(self) -> None:
        """Wait until the engine answers nothing."""
        while self.state not in (EngineState.ABSENT, EngineState.DEAD):
            await self._changed.wait()

    async def silent(self, seconds: float) -> None:
        """Wait until the engine has answered nothing for so long."""
        while True:
            await self.gone()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while self.state in (EngineState.ABSENT, EngineState.DEAD):
                        await self._changed.wait()
                    continue
            return

    async def changed(self) -> None:
        """Wait until the engine was looked at again; `state` may be what it was."""
        await self._changed.wait()

    def suspect(self) -> None:
        """A stream waits for it in vain: look at once whether it still answers. It is DEAD if it does not."""
        self._suspected.set()

    @property
    def all_sessions(self) -> int:
        """Ours, and those of other clients that it last spoke of."""
        theirs = self.info.sessions - self._sessions_then if self.info is not None else 0
        return self.sessions + max(0, theirs)

    @property
    def load(self) -> float:
        """0 to 1: how busy its graphs' thread, or its GPU by whomever, was lately."""
        if self.info is None:
            return 0.0
        return max(self.info.busy, self.info.device.utilization_compute / 100)

    def served_at(self, stream_id: str) -> float:
        """Loop time at which a session of the stream was opened here last; 0: it never was, as far as is known."""
        return self._served.get(stream_id, 0.0)

    @property
    def death(self) -> Death | None:
        """How its process ended last, if the watchdog of this machine knows."""
        return deaths.read(self.address)

    def as_json(self) -> dict[str, Any]:
        death = self.death
        return {
            "address": self.address,
            "state": self.state.name,
            "reason": self.reason,
            "restarts": self.restarts,
            "sessions": self.all_sessions,
            "busy": round(self.load, 2),
            "device": _device_json(self.info.device) if self.info is not None else None,
            "last_end": death.as_json() if death is not None else None,
        }

    def _become(self, state: EngineState) -> None:
        if state is not self.state:
            logger.info("engine %s: %s -> %s", self.address, self.state, state)
            self.state = state
        self._changed.set()
        self._changed = asyncio.Event()  # wake every waiter once
        self._on_change()

    async def _watch(self) -> None:
        health = health_pb2_grpc.HealthStub(self._channel)
        while True:
            try:
                await self._refresh_info()
                call = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
                try:
                    await self._follow(call)
                finally:
                    call.cancel()
            except (grpc.aio.AioRpcError, HeadraceError) as exc:
                why = exc.details() if isinstance(exc, grpc.aio.AioRpcError) else str(exc)
                if self.state in (EngineState.READY, EngineState.LOADING) or (
                    isinstance(exc, HeadraceError) and why != self._complaint
                ):
                    logger.warning("engine %s does not answer: %s", self.address, why)
                self._complaint = why if isinstance(exc, HeadraceError) else ""
                self._become(EngineState.ABSENT if self.info is None else EngineState.DEAD)
            await asyncio.sleep(RETRY_S)

    async def _follow(self, call: Any) -> None:
        """Follow the health of a living engine until it goes away."""
        read: asyncio.Task[Any] | None = None
        suspicion: asyncio.Task[Any] | None = None
        self._suspected.clear()
        try:
            while True:
                read = read or asyncio.create_task(call.read(), name=f"health {self.address}")
                suspicion = suspicion or asyncio.create_task(self._suspected.wait(), name=f"suspect {self.address}")
                done, _ = await asyncio.wait(
                    {read, suspicion}, timeout=INFO_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                if read not in done:
                    await self._refresh_info(SUSPECT_TIMEOUT_S if done else RPC_TIMEOUT_S)
                    if done:
                        self._suspected.clear()
                        suspicion = None
                    continue
                answer = read.result()
                read = None
                if answer is grpc.aio.EOF:
                    raise EngineGone("the engine ended the health watch")
                await self._refresh_info()
                self._become(self._state_of(answer.status))
        finally:
            for task in (read, suspicion):
                if task is not None:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await ended(task)

    def _state_of(self, health: int) -> EngineState:
        if health != health_pb2.HealthCheckResponse.SERVING:
            return EngineState.LOADING
        failed = self.info is not None and self.info.comfyui.state == pb.ComfyUI.STATE_FAILED
        return EngineState.BROKEN if failed else EngineState.READY

    @property
    def reason(self) -> str:
        """Why it cannot run workflows, for people; empty when it can."""
        if self.info is not None and self.state in (EngineState.BROKEN, EngineState.LOADING):
            return self.info.comfyui.detail
        return self._complaint

    async def _refresh_info(self, timeout_s: float = RPC_TIMEOUT_S) -> None:
        sessions = self.sessions
        info = await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout_s)
        # Whichever the engine saw; one of ours that opened meanwhile must not count as somebody else's too.
        sessions = max(sessions, self.sessions)
        if info.wire_version != WIRE_VERSION:
            raise EngineGone(
                f"the engine at {self.address} speaks contract version {info.wire_version}, "
                f"this shim {WIRE_VERSION}: install the same headrace for both"
            )
        if self.info is not None and (info.pid, info.started_at_ms) != (self.info.pid, self.info.started_at_ms):
            self.restarts += 1
        self.info, self._sessions_then = info, sessions

    # ---- calls

    async def _call(self, method: str, request: Any, timeout_s: float) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            raise error_from(exc) from exc

    async def check(
        self,
        workflow: Mapping[str, Any] | str,
        timeout_s: float = RPC_TIMEOUT_S,
        overrides: Sequence[Mapping[str, Mapping[str, Any]]] = (),
    ) -> list[pb.Finding]:
        """Findings for a workflow, or a text that should hold one; empty when it runs on this engine.

        overrides: applied to it first, one after the other. Raises InvalidRequest where they do not fit.
        """
        text = workflow if isinstance(workflow, str) else json.dumps(workflow)
        messages = [message for each in overrides for message in overrides_of(each)]
        request = pb.CheckWorkflowRequest(workflow_json=text, overrides=messages)
        return list((await self._call("CheckWorkflow", request, timeout_s)).findings)

    async def converted(self, workflow: Mapping[str, Any]) -> dict[str, Any]:
        """The prompt that the engine makes of what ComfyUI's editor saves. Raises WorkflowRefused for none."""
        request = pb.CheckWorkflowRequest(workflow_json=json.dumps(workflow))
        answer = await self._call("CheckWorkflow", request, RPC_TIMEOUT_S)
        if not answer.workflow_json:
            raise WorkflowRefused("the engine makes no prompt of this workflow; send ComfyUI's API format")
        prompt: dict[str, Any] = json.loads(answer.workflow_json)
        return prompt

    async def nodes(self, prefix: str, timeout_s: float = RPC_TIMEOUT_S) -> list[pb.NodeDefinition]:
        """Definitions of the classes whose name begins with ``prefix``."""
        request = pb.ListNodesRequest(class_prefix=prefix)
        return list((await self._call("ListNodes", request, timeout_s)).nodes)

    async def update(self, request: pb.UpdateSessionRequest, timeout_s: float) -> pb.UpdateSessionResponse:
        answer: pb.UpdateSessionResponse = await self._call("UpdateSession", request, timeout_s)
        return answer

    async def describe(self, session_id: str) -> pb.SessionDescription:
        request = pb.DescribeSessionRequest(session_id=session_id)
        answer: pb.SessionDescription = await self._call("DescribeSession", request, RPC_TIMEOUT_S)
        return answer

    @contextlib.asynccontextmanager
    async def open(
        self,
        request: pb.OpenSession,
        on_progress: Callable[[pb.Progress], None] = lambda _: None,
        *,
        stream_id: str = "",
    ) -> AsyncIterator[EngineSession]:
        """Open a session and wait until it takes frames; it ends with the block. ``stream_id`` is remembered.

        Raises WorkflowRefused, InvalidRequest, NotReady (no room) or EngineGone.
        """
        call = self._process()
        self.sessions += 1
        lane: EngineLane | None = None
        try:
            lane = await self._offer(request)
            try:
                await call.write(pb.ProcessRequest(open=request))
                credits = 0
                while True:
                    answer = await self._read_unless_silent(call)
                    if answer is grpc.aio.EOF:
                        raise EngineGone("the engine ended the session before it was open")
                    if not isinstance(answer, pb.ProcessResponse):
                        raise EngineGone("the engine answered frames before the session was open")
                    credits += answer.credits
                    if answer.WhichOneof("message") == "opened":
                        break
                    if answer.WhichOneof("message") == "progress":
                        on_progress(answer.progress)
            except grpc.aio.AioRpcError as exc:
                raise error_from(exc) from exc
            except asyncio.InvalidStateError as exc:
                # The call ended while we wrote; its status says why.
                code, details = await call.code(), await call.details()
                raise error_of(code, details) from exc
            if stream_id:
                self._remember(stream_id)
            if lane is not None and not answer.opened.shared_memory:
                lane.close()
                lane = None
            yield EngineSession(call, answer.opened, credits, lane)
        finally:
            if lane is not None:
                lane.close()
            self.sessions -= 1
            call.cancel()

    async def _read_unless_silent(self, call: Any) -> Any:
        read = asyncio.ensure_future(call.read())
        silent = asyncio.create_task(self.silent(OPEN_SILENCE_S), name=f"silence of {self.address}")
        try:
            await asyncio.wait((read, silent), return_when=asyncio.FIRST_COMPLETED)
            if read.done():
                return read.result()
            raise EngineGone(f"the engine answered nothing for {OPEN_SILENCE_S:g} s while it opened a session")
        finally:
            await ended(silent)
            if not read.done():
                call.cancel()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await ended(read)

    async def _offer(self, request: pb.OpenSession) -> EngineLane | None:
        """Shared memory for a session, where the engine is on this machine; written into ``request``."""
        request.ClearField("shared_memory")
        video = request.video
        if not self._share or not self.address.startswith("unix:") or not video.width:
            return None
        try:
            lane = await asyncio.to_thread(EngineLane, video.width, video.height)
        except OSError as exc:
            logger.warning("no shared memory for a session, its planes travel in messages: %s", exc)
            return None
        request.shared_memory.CopyFrom(lane.offer())
        return lane

    def _remember(self, stream_id: str) -> None:
        self._served.pop(stream_id, None)
        self._served[stream_id] = asyncio.get_running_loop().time()
        if len(self._served) > SERVED_STREAMS:
            del self._served[next(iter(self._served))]


def _device_json(device: pb.Device) -> dict[str, Any]:
    return {
        "type": device.type,
        "name": device.name,
        "uuid": device.uuid,
        "memory_total_bytes": device.memory_total_bytes,
        "memory_free_bytes": device.memory_free_bytes,
    }
