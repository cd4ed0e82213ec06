"""The engine without a socket: ComfyUI's life, the sessions, and what may be asked of them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeVar

from proto import WIRE_VERSION
from proto import engine_pb2 as pb

from . import wire
from .backend import HOW_TO_GET_COMFYUI, Backend, ComfyInfo, Graph, GraphFailed, PassThrough, cpu_device
from .config import Settings
from .errors import (
    EngineError,
    InvalidRequest,
    NoSuchSession,
    NotReady,
    NotServed,
    SessionExists,
    SessionsFull,
    Stopping,
    VersionConflict,
    Violation,
    WireMismatch,
    WorkflowRefused,
)
from .executor import Executor
from .graph.overrides import OverrideError
from .graph.workflow import Finding, Prompt, Severity, Workflow, WorkflowError, parse
from .scheduler import Scheduler
from .session import Outbox, Revision, Session

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: The session that the current task works for; the log writes it on every line.
current_session: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("current_session", default="")

#: How long an update waits for the first frame made with it, before it is answered without the frame's pts.
EFFECT_TIMEOUT_S: Final = 1.0

#: How often a client that waits for ComfyUI hears that it still loads; silence looks like a hang.
PROGRESS_INTERVAL_S: Final = 1.0

_SESSION_ID = re.compile(r"[\x21-\x7e]{1,128}")


class LoadState(Enum):
    """Of ComfyUI; the values are those of the contract."""

    ABSENT = pb.ComfyUI.STATE_ABSENT
    LOADING = pb.ComfyUI.STATE_LOADING
    READY = pb.ComfyUI.STATE_READY
    FAILED = pb.ComfyUI.STATE_FAILED


@dataclass(slots=True)
class _Comfy:
    state: LoadState
    info: ComfyInfo = field(default_factory=ComfyInfo)
    detail: str = ""


class Engine:
    """Owns the executor thread, the scheduler and the sessions. Everything runs on one event loop.

    ``backend`` None: no ComfyUI is configured, only pass-through runs. ``on_state`` is called when ComfyUI's state
    changes.
    """

    def __init__(
        self, settings: Settings, backend: Backend | None, on_state: Callable[[LoadState], None] = lambda state: None
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.started_at_ms = int(time.time() * 1000)
        self.sessions: dict[str, Session] = {}
        self._on_state = on_state
        self._comfy = _Comfy(LoadState.LOADING)
        if backend is None:
            self._comfy = _Comfy(LoadState.ABSENT, detail=f"there is no ComfyUI here; {HOW_TO_GET_COMFYUI}")
        self._loaded = asyncio.Event()
        self._executor = Executor()
        self._scheduler = Scheduler(self._executor.submit)
        self._tasks: list[asyncio.Task[None]] = []
        self._opening: set[str] = set()
        self._builds: set[asyncio.Future[Graph]] = set()
        self._stopping = False

    # ---- life

    def start(self) -> None:
        """Begin to load ComfyUI and to schedule; returns at once."""
        self._executor.start()
        self._tasks.append(asyncio.create_task(self._scheduler.run(), name="scheduler"))
        self._tasks.append(asyncio.create_task(self._load(), name="load ComfyUI"))

    def end_sessions(self) -> None:
        """Refuse further sessions and end those that run; their calls end with UNAVAILABLE."""
        self._stopping = True
        self._loaded.set()
        for session in list(self.sessions.values()):
            self.close(session, Stopping("the engine stops"))

    async def stop(self, deadline_s: float) -> bool:
        """End everything. False: a graph still runs on the executor thread, which only the process's end can stop."""
        self.end_sessions()
        if self.backend is not None and self._comfy.state is LoadState.READY:
            self.backend.interrupt()
        for work in (*self._tasks, *self._builds):
            work.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return await self._executor.stop(deadline_s)

    @property
    def state(self) -> LoadState:
        return self._comfy.state

    async def _load(self) -> None:
        if self.backend is not None:
            began = time.monotonic()
            try:
                info = await self._executor.submit(self.backend.load)
            except Exception as exc:  # ComfyUI is anybody's code; without it pass-through still runs
                logger.exception("ComfyUI did not load from %s", self.settings.comfyui_dir)
                text = f"ComfyUI in {self.settings.comfyui_dir} did not load: {type(exc).__name__}: {exc}"
                self._comfy = _Comfy(LoadState.FAILED, detail=f"{text[:400]}; {HOW_TO_GET_COMFYUI}")
            else:
                self._comfy = _Comfy(LoadState.READY, info)
                logger.info(
                    "ComfyUI %s is ready after %.1f s with %d node classes, %d packs failed",
                    info.version,
                    time.monotonic() - began,
                    info.node_classes,
                    len(info.failed_packs),
                )
                await self._executor.submit(_settle_heap)
        else:
            logger.info("%s", self._comfy.detail)
        self._loaded.set()
        self._on_state(self._comfy.state)

    # ---- server

    def info(self) -> pb.ServerInfo:
        """All but what the service knows itself (versions, limits of the transport)."""
        comfy = self._comfy
        device = self.backend.device() if self.backend is not None else cpu_device()
        return pb.ServerInfo(
            started_at_ms=self.started_at_ms,
            device=pb.Device(
                type=device.type,
                name=device.name,
                uuid=device.uuid,
                memory_total_bytes=device.memory_total_bytes,
                memory_free_bytes=device.memory_free_bytes,
                compute_major=device.compute[0],
                compute_minor=device.compute[1],
                utilization_compute=device.utilization_compute,
                utilization_memory=device.utilization_memory,
            ),
            comfyui=pb.ComfyUI(
                state=comfy.state.value,
                version=comfy.info.version,
                directory=str(self.settings.comfyui_dir or ""),
                node_classes=comfy.info.node_classes,
                failed_packs=comfy.info.failed_packs,
                detail=comfy.detail,
            ),
        )

    async def definitions(self, prefix: str) -> Sequence[Any]:
        """Of the loaded ComfyUI's nodes, by class."""
        backend = self._ready_backend()
        known = await self._executor.submit(backend.definitions)
        return [definition for definition in known if definition.class_type.startswith(prefix)]

    async def check(self, workflow_json: str) -> list[Finding]:
        """Everything that is wrong with a workflow. Raises NotReady while ComfyUI loads."""
        try:
            workflow = parse(workflow_json, max_nodes=self.settings.max_workflow_nodes)
        except WorkflowError as exc:
            return list(exc.findings)
        findings = [*workflow.warnings, *_unserved(workflow)]
        if workflow.is_pass_through:
            return findings
        if self._comfy.state in (LoadState.ABSENT, LoadState.FAILED):
            text = self._comfy.detail.removesuffix(f"; {HOW_TO_GET_COMFYUI}")
            return [*findings, Finding(Severity.ERROR, "no_comfyui", text, HOW_TO_GET_COMFYUI)]
        return [*findings, *await self._executor.submit(self._ready_backend().check, workflow)]

    # ---- sessions

    async def open(self, request: pb.OpenSession, outbox: Outbox) -> Session:
        """A session that is ready for frames; ``outbox`` has Progress and then SessionOpened. Raises EngineError."""
        if request.wire_version not in (0, WIRE_VERSION):
            raise WireMismatch(f"this engine speaks wire version {WIRE_VERSION}, the client {request.wire_version}")
        session_id = self._free_id(request.session_id)
        self._opening.add(session_id)
        try:
            return await self._open(session_id, request, outbox)
        finally:
            self._opening.discard(session_id)

    async def _open(self, session_id: str, request: pb.OpenSession, outbox: Outbox) -> Session:
        current_session.set(session_id)
        if request.HasField("audio"):
            raise NotServed("this engine serves no audio yet; leave OpenSession.audio out")
        if not request.HasField("video"):
            text = "a session without pictures is not served; give OpenSession.video"
            raise InvalidRequest(text, [Violation("video", text, "missing")])
        video = wire.video_format(request.video, self.settings.max_width, self.settings.max_height)
        overrides = wire.overrides(request.overrides)
        workflow = self._parse(request.workflow_json)
        if not workflow.is_pass_through or overrides:
            await self._comfy_ready(outbox)
        prompt = workflow.prompt
        if overrides:
            prompt = await self._override(prompt, overrides)
        graph = await self._graph(prompt, video, outbox)
        session = Session(
            session_id,
            video,
            Revision(1, prompt, graph),
            outbox,
            self._discard,
            latency_budget_ms=request.latency_budget_ms,
            max_batch=request.max_batch,
        )
        if self._stopping:
            session.close()
            raise Stopping("the engine stops")
        self.sessions[session_id] = session
        session.opened(
            pb.SessionOpened(
                session_id=session_id,
                version=1,
                video_output=wire.video_message(video)
                if graph.inline
                else wire.video_message(video, width=0, height=0),
                text_output=bool(workflow.text_outputs),
                runner=graph.runner,
                runner_reason=graph.runner_reason,
            )
        )
        logger.info(
            "session open: %dx%d %s, runner %s, %d nodes",
            video.width,
            video.height,
            video.pixel_format,
            graph.runner,
            len(prompt),
        )
        return session

    def frames(self, session: Session, frames: Sequence[pb.Frame]) -> None:
        """Frames of a client, in order."""
        session.accept(frames)
        self._scheduler.wake(session)

    def close(self, session: Session, error: EngineError | None = None) -> None:
        """End a session and free what it held; safe to call twice."""
        if session.closed:
            return
        self._scheduler.remove(session)
        session.close(error)
        if self.sessions.get(session.session_id) is session:
            del self.sessions[session.session_id]
        counters = session.counters
        logger.info(
            "session closed: %d frames received, %d processed, %d failed, %d late, %d dropped otherwise",
            counters.received,
            counters.processed,
            counters.failed,
            counters.dropped_late,
            counters.dropped_other,
        )

    def get(self, session_id: str) -> Session:
        try:
            return self.sessions[session_id]
        except KeyError:
            raise NoSuchSession(f"there is no session {session_id!r}") from None

    async def update(
        self,
        session_id: str,
        workflow_json: str,
        overrides: Mapping[str, Mapping[str, Any]],
        *,
        dry_run: bool = False,
        expected_version: int = 0,
    ) -> tuple[int, int | None]:
        """All or nothing; returns (version in force, pts of the first frame made with it or None)."""
        session = self.get(session_id)
        current_session.set(session_id)
        async with session.updating:
            self._check_version(session, expected_version)
            revision = session.revision
            prompt, graph = revision.prompt, revision.graph
            if workflow_json.strip():
                workflow = self._parse(workflow_json)
                prompt = workflow.prompt
                if overrides:
                    prompt = await self._override(prompt, overrides)
                if dry_run:
                    if not workflow.is_pass_through:
                        _refuse(await self._executor.submit(self._ready_backend().check, workflow))
                else:
                    graph = await self._graph(prompt, session.video, session.outbox)
            elif overrides:
                prompt = await self._override(prompt, overrides)
            if session.closed:
                if graph is not revision.graph:
                    self._discard(graph)
                raise NoSuchSession(f"session {session_id!r} ended during the update")
            try:
                # The graph may have failed meanwhile and its parameters been reverted.
                self._check_version(session, revision.version)
            except VersionConflict:
                if graph is not revision.graph:
                    self._discard(graph)
                raise
            if dry_run or (prompt is revision.prompt and graph is revision.graph):
                return revision.version, None
            version = session.adopt(prompt, graph)
            logger.info("parameters version %d: %d overrides", version, sum(map(len, overrides.values())))
        return version, await session.effective_pts(version, EFFECT_TIMEOUT_S)

    async def describe(self, session_id: str) -> pb.SessionDescription:
        """The live parameters of a session."""
        session = self.get(session_id)
        known = {}
        if self._comfy.state is LoadState.READY:
            definitions = await self._executor.submit(self._ready_backend().definitions)
            known = {definition.class_type: definition for definition in definitions}
        revision = session.revision
        return pb.SessionDescription(
            session_id=session_id,
            version=revision.version,
            workflow_json=json.dumps(revision.prompt),
            parameters=wire.parameters(revision.prompt, known),
            runner=revision.graph.runner,
            runner_reason=revision.graph.runner_reason,
        )

    # ---- parts of the above

    def _free_id(self, wanted: str) -> str:
        if wanted and not _SESSION_ID.fullmatch(wanted):
            text = "session_id may have 1 to 128 printable ASCII characters and no space"
            raise InvalidRequest(text, [Violation("session_id", text, "malformed")])
        if self._stopping:
            raise Stopping("the engine stops")
        if wanted in self.sessions or wanted in self._opening:
            raise SessionExists(f"session {wanted!r} is open already")
        if len(self.sessions) + len(self._opening) >= self.settings.max_sessions:
            raise SessionsFull(f"all {self.settings.max_sessions} sessions of this engine are in use")
        return wanted or uuid.uuid4().hex

    def _parse(self, workflow_json: str) -> Workflow:
        workflow = parse(workflow_json, max_nodes=self.settings.max_workflow_nodes)
        _refuse(_unserved(workflow))
        return workflow

    def _ready_backend(self) -> Backend:
        if self._comfy.state is LoadState.LOADING:
            raise NotReady("ComfyUI is loading; try again in a few seconds")
        if self.backend is None or self._comfy.state is not LoadState.READY:
            raise WorkflowRefused(f"only pass-through runs here: {self._comfy.detail}")
        return self.backend

    async def _comfy_ready(self, outbox: Outbox) -> None:
        while self._comfy.state is LoadState.LOADING and not self._stopping:
            _report(outbox, "loading", "ComfyUI is loading")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._loaded.wait(), PROGRESS_INTERVAL_S)
        if self._stopping:
            raise Stopping("the engine stops")
        self._ready_backend()

    async def _override(self, prompt: Prompt, overrides: Mapping[str, Mapping[str, Any]]) -> Prompt:
        backend = self._ready_backend()
        return await self._executor.submit(backend.override, prompt, overrides)

    async def _graph(self, prompt: Prompt, video: wire.VideoFormat, outbox: Outbox) -> Graph:
        workflow = Workflow(prompt)
        if workflow.is_pass_through:
            return PassThrough(video.width, video.height)
        backend = self._ready_backend()
        _refuse(await self._executor.submit(backend.check, workflow))
        loop = asyncio.get_running_loop()

        def report(stage: str, message: str) -> None:
            loop.call_soon_threadsafe(_report, outbox, stage, message)

        build = self._executor.submit(backend.build, prompt, video, report)
        self._builds.add(build)
        build.add_done_callback(self._builds.discard)
        try:
            # Shielded: a build that runs cannot be cancelled, and its graph would be nobody's.
            return await asyncio.shield(build)
        except asyncio.CancelledError:
            build.add_done_callback(self._abandon)
            raise
        except GraphFailed as exc:
            where = f"node {exc.node_id} ({exc.class_type}): " if exc.node_id else ""
            path = f"nodes.{exc.node_id}" if exc.node_id else "workflow_json"
            text = f"the workflow failed on its first frame: {where}{exc.message}"
            raise WorkflowRefused(text, [Violation(path, exc.message, exc.code)]) from exc

    def _abandon(self, build: asyncio.Future[Graph]) -> None:
        if not build.cancelled() and build.exception() is None:
            self._discard(build.result())

    def _discard(self, graph: Graph) -> None:
        if graph.inline:
            graph.close()
        else:
            self._executor.submit(_close, graph)

    @staticmethod
    def _check_version(session: Session, expected: int) -> None:
        if expected and session.revision.version != expected:
            raise VersionConflict(f"the parameters are at version {session.revision.version}, not {expected}")


def translate(error: BaseException) -> BaseException:
    """What the graph layer raises, as an error of the contract; anything else stays what it is."""
    if isinstance(error, WorkflowError):
        return refusal(error.findings)
    if isinstance(error, OverrideError):
        violations = [Violation(item.path, item.message, "invalid_override") for item in error.violations]
        return InvalidRequest(str(error), violations)
    return error


def refusal(findings: Sequence[Finding]) -> EngineError:
    """FAILED_PRECONDITION when the workflow is sound but this engine lacks something, else INVALID_ARGUMENT."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    violations = [Violation(item.path or "workflow_json", str(item), item.code) for item in errors]
    text = str(WorkflowError(findings))
    if errors and all(item.code in _LACKING for item in errors):
        return WorkflowRefused(text, violations)
    return InvalidRequest(text, violations)


#: Codes of findings that another engine might not have.
_LACKING: Final = frozenset({"unknown_node", "no_comfyui", "audio_not_served", "refused_node", "unknown_choice"})


def _refuse(findings: Sequence[Finding]) -> None:
    if any(finding.severity is Severity.ERROR for finding in findings):
        raise refusal(findings)


def _unserved(workflow: Workflow) -> list[Finding]:
    return [
        Finding(
            Severity.ERROR,
            "audio_not_served",
            "this engine serves no audio yet",
            "use a workflow whose live input and output are pictures",
            path=f"nodes.{node_id}",
            node_id=node_id,
            class_type=workflow.prompt[node_id]["class_type"],
        )
        for node_id in (*workflow.audio_inputs, *workflow.audio_outputs)
    ]


def _report(outbox: Outbox, stage: str, message: str) -> None:
    number = getattr(pb.Progress, f"STAGE_{stage.upper()}")
    outbox.put(pb.ProcessResponse(progress=pb.Progress(stage=number, message=message)))


def _close(graph: Graph) -> None:
    try:
        graph.close()
    except Exception:  # a node's own clean-up may raise; the session is gone all the same
        logger.exception("a graph did not close cleanly")
    gc.collect()


def _settle_heap() -> None:
    """A full collection with ComfyUI loaded takes 200 ms; of a frozen heap 1 ms. The frames to come feel it."""
    gc.collect()
    gc.freeze()
