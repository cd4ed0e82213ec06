"""The engine over gRPC: ``headrace.engine.v1.Engine``, health and reflection. All of grpc but the status table."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final, TypeAlias, TypeVar

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import cext
from proto import VERSION, WIRE_VERSION, engine_pb2_grpc
from proto import engine_pb2 as pb
from proto.frames import FrameBatch, parse_request
from proto.results import encode_response
from proto.tasks import ended

from . import wire
from .core import Engine
from .errors import EngineError, InvalidRequest, Violation, status_of
from .loading import LoadState
from .outbox import Outbox
from .session import Session

logger = logging.getLogger(__name__)

#: Health names: "" is the process, the second the contract's service (ComfyUI settled, whether there is one or not),
#: the third says whether workflows other than pass-through run.
SERVICE: Final = pb.DESCRIPTOR.services_by_name["Engine"].full_name
COMFYUI: Final = "comfyui"

#: Time for the statuses of calls that have ended to leave.
LAST_WORDS_S: Final = 0.2

Request: TypeAlias = pb.ProcessRequest | FrameBatch

Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


def _refusing(method: Method) -> Method:
    """Any exception of a call becomes its status; cancellation stays cancellation."""

    @functools.wraps(method)
    async def call(self: EngineService, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        with self.counted():
            try:
                return await method(self, request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as exc:  # the client gets a status; what is unexpected is in the log
                await context.abort_with_status(status_of(exc))

    return call  # type: ignore[return-value]


class EngineService(engine_pb2_grpc.EngineServicer):  # type: ignore[misc]  # generated without types
    """Translates; what a call means is in ``core`` and ``session``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """A call is under way inside."""
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if self._calls == 0:
                self._idle.set()

    async def idle(self, timeout_s: float) -> None:
        """Until no call is under way, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    @_refusing
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.ServerInfo:
        settings = self._engine.settings
        info = self._engine.info()
        info.version, info.wire_version, info.pid = VERSION, WIRE_VERSION, os.getpid()
        info.pixel_backend = cext.BACKEND
        info.limits.max_sessions = settings.max_sessions
        info.limits.max_message_bytes = settings.max_message_bytes
        info.limits.max_width = settings.max_width
        info.limits.max_height = settings.max_height
        info.limits.max_workflow_nodes = settings.max_workflow_nodes
        return info

    @_refusing
    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        definitions = await self._engine.definitions(request.class_prefix)
        return pb.ListNodesResponse(nodes=[wire.definition_message(definition) for definition in definitions])

    @_refusing
    async def CheckWorkflow(self, request: pb.CheckWorkflowRequest, context: Any) -> pb.CheckWorkflowResponse:
        if request.HasField("video"):
            wire.video_format(request.video, self._engine.settings.max_width, self._engine.settings.max_height)
        found, prompt = await self._engine.check(request.workflow_json, wire.overrides(request.overrides))
        findings = [wire.finding_message(finding) for finding in found]
        runnable = all(finding.severity != pb.Finding.SEVERITY_ERROR for finding in findings)
        workflow_json = json.dumps(prompt) if prompt is not None else ""
        return pb.CheckWorkflowResponse(runnable=runnable, findings=findings, workflow_json=workflow_json)

    @_refusing
    async def UpdateSession(self, request: pb.UpdateSessionRequest, context: Any) -> pb.UpdateSessionResponse:
        version, effective_pts = await self._engine.update(
            request.session_id,
            request.workflow_json,
            wire.overrides(request.overrides),
            dry_run=request.dry_run,
            expected_version=request.expected_version,
        )
        return pb.UpdateSessionResponse(version=version, effective_pts=effective_pts)

    @_refusing
    async def DescribeSession(self, request: pb.DescribeSessionRequest, context: Any) -> pb.SessionDescription:
        return await self._engine.describe(request.session_id)

    @_refusing
    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:
        states = [session.state() for session in self._engine.sessions.values()]
        answer = pb.ListSessionsResponse(sessions=states, preparing=self._engine.preparing)
        if (clock := self._engine.run_clock) is not None:
            answer.run_ms, answer.run_limit_ms = clock.run_ms, clock.limit_ms
        answer.step_ms = self._engine.step_ms
        answer.step_limit_ms = round(self._engine.settings.step_limit_s * 1000)
        return answer

    @_refusing
    async def ProfileSession(self, request: pb.ProfileSessionRequest, context: Any) -> pb.SessionProfile:
        return await self._engine.profile(request.session_id, request.frames, request.timeout_ms)

    @_refusing
    async def Process(self, requests: AsyncIterator[Request], context: Any) -> None:
        outbox = Outbox()
        writer = asyncio.create_task(_write(outbox, context), name="write responses")
        session: Session | None = None
        try:
            session = await self._open(requests, outbox)
            reader = asyncio.create_task(self._read(requests, session), name=f"read {session.session_id}")
            try:
                await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    reader.result()  # what the client did wrong, if anything
                    await writer
                else:
                    writer.result()
            finally:
                await _cancelled(reader)
            if session.end_error is not None:
                raise session.end_error
        except EngineError as exc:
            # What was answered before the end still reaches the client.
            if session is not None:
                self._engine.close(session, exc)
            outbox.close()
            await writer
            raise
        finally:
            # Before anything that waits: the client's cancellation may come here too, when its end was seen first.
            if session is not None:
                self._engine.close(session)
            await _cancelled(writer)

    async def _open(self, requests: AsyncIterator[Request], outbox: Outbox) -> Session:
        first = await anext(requests, None)
        if not isinstance(first, pb.ProcessRequest) or first.WhichOneof("message") != "open":
            raise InvalidRequest("the first message of Process has to be open", [Violation("open", "missing")])
        return await self._engine.open(first.open, outbox)

    async def _read(self, requests: AsyncIterator[Request], session: Session) -> None:
        """Until the client ends its input, in words or by half-closing the call."""
        async for request in requests:
            if isinstance(request, FrameBatch):
                session.release(request.released_slots)
                self._engine.frames(session, request.frames)
                await session.outbox.room()
                continue
            match request.WhichOneof("message"):
                case "end_of_input":
                    break
                case "open":
                    raise InvalidRequest("the session is open already; one call is one session")
                case "audio":
                    self._engine.sound(session, request.audio.blocks)
                    await session.outbox.room()
                case "latency_budget_ms":
                    session.set_latency_budget(request.latency_budget_ms)
                case _:  # a message of a later contract
                    pass
        self._engine.end_input(session)


async def _write(outbox: Outbox, context: Any) -> None:
    while (response := await outbox.take()) is not None:
        await context.write(response)


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Its outcome was looked at, or does not matter any more."""
    with contextlib.suppress(Exception):
        await ended(task)


class Server:
    """The gRPC server around an engine, with health that follows it."""

    def __init__(self, engine_of: Callable[[Callable[[LoadState], None]], Engine], max_message_bytes: int) -> None:
        self._health = health.aio.HealthServicer()
        self._updates: set[asyncio.Task[None]] = set()
        self.engine = engine_of(self._on_settled)
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                # Two engines on one port would share its clients by chance.
                ("grpc.so_reuseport", 0),
                # Clients ping to notice an engine that hangs; gRPC's default answers that with GOAWAY. Our own pings
                # find the client whose machine is gone, and free its session.
                ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
            ]
        )
        self._service = EngineService(self.engine)
        engine_pb2_grpc.add_EngineServicer_to_server(self._service, self._server)
        # In place of the generated handler: the same messages without its copies (see proto.fields).
        process = grpc.stream_stream_rpc_method_handler(self._service.Process, parse_request, encode_response)
        self._server.add_registered_method_handlers(SERVICE, {"Process": process})
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    def bind(self, address: str) -> int:
        """Take the address; returns the port (of TCP). Raises RuntimeError when it is taken."""
        port: int = self._server.add_insecure_port(address)
        return port

    async def start(self) -> None:
        """Serve, then begin to load."""
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", serving)
        await self._health.set(SERVICE, not_serving)
        await self._health.set(COMFYUI, not_serving)
        await self._server.start()
        self.engine.start()

    async def stop(self, grace_s: float) -> bool:
        """Say so, end the sessions, end the calls. False: a graph still runs on the executor thread."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        await self._health.enter_graceful_shutdown()
        self.engine.end_sessions()
        await self._service.idle(grace_s)
        # Our calls are over; whoever still watches health would hold the server up for the whole grace.
        await self._server.stop(LAST_WORDS_S)
        await asyncio.gather(*self._updates)
        return await self.engine.stop(max(deadline - loop.time(), 0.0))

    def _on_settled(self, state: LoadState) -> None:
        update = asyncio.create_task(self._set_health(state), name="health")
        self._updates.add(update)
        update.add_done_callback(self._updates.discard)

    async def _set_health(self, state: LoadState) -> None:
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        if state is LoadState.READY:
            await self._health.set(COMFYUI, health_pb2.HealthCheckResponse.SERVING)
