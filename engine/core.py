"""The engine without a socket: ComfyUI's life, the sessions, and what may be asked of them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Final

from proto import WIRE_VERSION
from proto import engine_pb2 as pb
from proto.frames import Frame
from proto.ring import RingRefused

from . import wire
from .audio import SoundFeed, audio_format
from .backend import Backend, Overrides
from .builder import Builder
from .config import Settings
from .ends import NO_VIDEO, opened_message, require_ends
from .errors import (
    EngineError,
    InvalidRequest,
    NoSuchSession,
    SessionExists,
    SessionsFull,
    Stopping,
    VersionConflict,
    Violation,
    WireMismatch,
)
from .executor import Executor
from .graph.schema import NodeDefinition
from .graph.workflow import Finding, Prompt
from .lane import Lane
from .loading import Loading, LoadState
from .logs import current_session
from .outbox import Outbox
from .parameters import Parameters, links_of
from .profile import MOST_FRAMES, MOST_TIMEOUT_MS, USUAL_FRAMES, USUAL_TIMEOUT_MS
from .run import Run
from .run_clock import RunClock
from .scheduler import Scheduler
from .session import Session
from .starts import Starts

logger = logging.getLogger(__name__)

#: How long an update waits for the first frame made with it, before it is answered without the frame's pts.
EFFECT_TIMEOUT_S: Final = 1.0

#: How often a graph that fails has the device looked at, at the most: it may fail with every frame.
DEVICE_LOOK_S: Final = 1.0

_SESSION_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Engine:
    """Owns the executor thread, the scheduler and the sessions. Everything runs on one event loop.

    ``backend`` None: no ComfyUI is configured, only pass-through runs. ``on_settled``: ComfyUI is loaded, or is not
    going to be.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Backend | None,
        on_settled: Callable[[LoadState], None] = lambda state: None,
    ) -> None:
        self.settings = settings
        self.started_at_ms = int(time.time() * 1000)
        self.sessions: dict[str, Session] = {}
        path = settings.socket_path
        starts = Starts(path.with_suffix(".starts") if path is not None else None)
        self._loading = Loading(backend, settings.comfyui_dir, on_settled, starts)
        self._executor = Executor()
        self._loader = Executor("loader")
        self._scheduler = Scheduler(
            self._executor.submit, on_failure=self._graph_failed, on_broken=self._session_broke
        )
        self._device_look: asyncio.Task[None] | None = None
        self._builder = Builder(
            self._executor,
            self._loader,
            self._loading,
            max_nodes=settings.max_workflow_nodes,
            quiet=self._scheduler.quiet,
            in_use=lambda: bool(self.sessions),
            on_failure=self._graph_failed,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._opening: set[str] = set()
        self._stopping = False
        #: Set when the engine has lost a part of itself and has to be restarted.
        self.broken = asyncio.Event()

    # ---- life

    def start(self) -> None:
        """Begin to load ComfyUI and to schedule; returns at once."""
        self._executor.start()
        self._loader.start()
        scheduler = asyncio.create_task(self._scheduler.run(), name="scheduler")
        scheduler.add_done_callback(self._scheduler_ended)
        self._tasks.append(scheduler)
        self._tasks.append(asyncio.create_task(self._loading.run(self._executor), name="load ComfyUI"))

    def _scheduler_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            logger.critical("the scheduler died; the engine cannot go on", exc_info=task.exception())
            self.broken.set()
        elif not self._stopping:
            logger.critical("the scheduler was cancelled; the engine cannot go on")
            self.broken.set()

    def _session_broke(self, session: Session, error: Exception) -> None:
        logger.error("what the graph gave could not be told to session %r", session.session_id, exc_info=error)
        self.close(session, EngineError("the engine failed internally over what the graph gave; its log says how"))

    def _graph_failed(self) -> None:
        if self._device_look is None or self._device_look.done():
            self._device_look = asyncio.create_task(self._look_at_device(), name="look at the device")

    async def _look_at_device(self) -> None:
        """After an illegal access in a kernel every call of this process to its GPU fails, of whatever graph."""
        if self._loading.state is LoadState.READY:
            if await self._executor.submit(self._loading.ready().device_is_lost):
                logger.critical("the device answers nothing any more; only another process can use it")
                self.broken.set()
            await asyncio.sleep(DEVICE_LOOK_S)

    def end_sessions(self) -> None:
        """Refuse further sessions and end those that run; their calls end with UNAVAILABLE."""
        self._stopping = True
        self._loading.stop()
        for session in list(self.sessions.values()):
            self.close(session, Stopping("the engine stops"))

    async def stop(self, deadline_s: float) -> bool:
        """End everything. False: a graph still runs on the executor thread, which only the process's end can stop."""
        self.end_sessions()
        if self._loading.state is LoadState.READY:
            self._loading.ready().interrupt()
        if self._device_look is not None:
            self._tasks.append(self._device_look)
        for task in self._tasks:
            task.cancel()
        self._builder.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        ended = await asyncio.gather(self._executor.stop(deadline_s), self._loader.stop(deadline_s))
        return all(ended)

    # ---- server

    def info(self) -> pb.ServerInfo:
        """All but what the service knows itself (versions, limits of the transport)."""
        return pb.ServerInfo(
            started_at_ms=self.started_at_ms,
            device=self._loading.device(),
            comfyui=self._loading.message(),
            sessions=len(self.sessions) + len(self._opening),
            busy=self._executor.busy.share,
        )

    async def definitions(self, prefix: str) -> Sequence[NodeDefinition]:
        """Of the loaded ComfyUI's nodes, by class."""
        backend = self._loading.ready()
        known = await self._executor.submit(backend.definitions)
        return [definition for definition in known if definition.class_type.startswith(prefix)]

    @property
    def preparing(self) -> bool:
        """Whether ComfyUI or a workflow is being loaded, by code that may hold the interpreter for seconds."""
        return self._loading.state is LoadState.LOADING or self._builder.busy

    @property
    def run_clock(self) -> RunClock | None:
        """Of the run that has, or waits for, the executor thread."""
        running = self._scheduler.running
        return running.clock if isinstance(running, Run) else None

    @property
    def step_ms(self) -> int:
        """Since the longest job under way began that is no run of a session: a step of a build, a check, an end. 0:
        there is none, or ComfyUI itself is being loaded."""
        clock = self.run_clock
        of_a_run = clock is not None and clock.run_ms > 0
        mine = 0 if of_a_run or self._loading.state is LoadState.LOADING else self._executor.job_ms
        return max(mine, self._loader.job_ms)

    async def check(
        self, workflow_json: str, overrides: Sequence[Overrides] = ()
    ) -> tuple[list[Finding], Prompt | None]:
        """Everything that is wrong with a workflow, and the prompt that would run. Raises NotReady while ComfyUI
        loads, and as ``update`` where ``overrides`` do not fit the workflow."""
        if overrides:
            workflow = await self._builder.workflow(workflow_json, lambda _: None)
            workflow_json = json.dumps(await self._builder.override(workflow.prompt, overrides))
        return await self._builder.findings(workflow_json)

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
        audio = audio_format(request.audio) if request.HasField("audio") else None
        video = NO_VIDEO
        if request.HasField("video"):
            video = wire.video_format(request.video, self.settings.max_width, self.settings.max_height)
        overrides = wire.overrides(request.overrides)
        workflow = await self._builder.workflow(request.workflow_json, outbox.progress)
        require_ends(workflow, video)
        if not workflow.is_pass_through or overrides:
            await self._loading.wait(outbox.progress)
        prompt = workflow.prompt
        if overrides:
            prompt = await self._builder.override(prompt, overrides)
        graph = await self._builder.build(prompt, video, outbox.progress)
        lane, carried = _lane(request, video)
        session = Session(
            session_id,
            video,
            Parameters(prompt, graph, self._builder.discard),
            outbox,
            latency_budget_ms=request.latency_budget_ms,
            max_batch=request.max_batch,
            run_limit_s=self.settings.run_limit_s,
            sound=SoundFeed(audio, has_video=bool(video.width), latency_budget_ms=request.latency_budget_ms)
            if audio is not None
            else None,
            lane=lane,
        )
        if self._stopping:
            session.close()
            raise Stopping("the engine stops")
        self.sessions[session_id] = session
        session.opened(opened_message(session_id, session.parameters.current, video, audio))
        logger.info(
            "session open: %dx%d %s, runner %s, %d nodes; planes by %s",
            video.width,
            video.height,
            video.pixel_format,
            graph.runner,
            len(prompt),
            carried,
        )
        return session

    def frames(self, session: Session, frames: Sequence[Frame]) -> None:
        """Frames of a client, in order."""
        session.accept(frames)
        if session.has_waiting():
            self._scheduler.wake(session)

    def sound(self, session: Session, blocks: Sequence[pb.AudioBlock]) -> None:
        """Sound of a client, in order."""
        session.hear(blocks)
        if session.has_waiting():
            self._scheduler.wake(session)

    def end_input(self, session: Session) -> None:
        """Nothing follows of a client; what is left runs."""
        session.end_input()
        if session.has_waiting():
            self._scheduler.wake(session)

    def close(self, session: Session, error: EngineError | None = None) -> None:
        """End a session and free what it held; safe to call twice."""
        if session.closed:
            return
        self._scheduler.remove(session)
        if self.sessions.get(session.session_id) is session:
            del self.sessions[session.session_id]
        session.close(error)
        books = session.books
        logger.info(
            "session closed: %d frames received, %d processed, %d failed, %d late, %d dropped otherwise",
            books.received,
            books.processed,
            books.failed,
            books.dropped_late,
            books.dropped_other,
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
        overrides: Sequence[Overrides],
        *,
        dry_run: bool = False,
        expected_version: int = 0,
    ) -> tuple[int, int | None]:
        """All or nothing; returns (version in force, pts of the first frame made with it or None)."""
        session = self.get(session_id)
        current_session.set(session_id)
        async with session.parameters.updating:
            self._check_version(session, expected_version)
            revision = session.parameters.current
            prompt, graph = revision.prompt, revision.graph
            if workflow_json.strip():
                prompt = (await self._builder.workflow(workflow_json, session.outbox.progress)).prompt
                if overrides:
                    prompt = await self._builder.override(prompt, overrides)
                if dry_run:
                    await self._builder.check(prompt)
                else:
                    graph = await self._builder.build(prompt, session.video, session.outbox.progress)
            elif overrides:
                prompt = await self._builder.override(prompt, overrides)
                if not dry_run and links_of(prompt) != links_of(revision.prompt):
                    graph = await self._builder.build(prompt, session.video, session.outbox.progress)
            try:
                if session.closed:
                    raise NoSuchSession(f"session {session_id!r} ended during the update")
                # The graph may have failed meanwhile and its parameters been reverted.
                self._check_version(session, revision.version)
            except EngineError:
                if graph is not revision.graph:
                    self._builder.discard(graph)
                raise
            if dry_run or (prompt is revision.prompt and graph is revision.graph):
                return revision.version, None
            version = session.parameters.adopt(prompt, graph)
            logger.info(
                "parameters version %d, %s graph", version, "another" if graph is not revision.graph else "same"
            )
        return version, await session.parameters.effective_pts(version, EFFECT_TIMEOUT_S)

    async def profile(self, session_id: str, frames: int, timeout_ms: int) -> pb.SessionProfile:
        """Stage and node times of the session's next frames; 0 of either: the usual. Raises InvalidRequest."""
        wrong = [
            Violation(name, f"{value} is above {most}", "out_of_range")
            for name, value, most in (("frames", frames, MOST_FRAMES), ("timeout_ms", timeout_ms, MOST_TIMEOUT_MS))
            if value > most
        ]
        if wrong:
            raise InvalidRequest("a profile takes longer than it may", wrong)
        session = self.get(session_id)
        found = await session.profile(frames or USUAL_FRAMES, (timeout_ms or USUAL_TIMEOUT_MS) / 1000)
        if not found.frames and session.closed:
            raise NoSuchSession(f"session {session_id!r} ended before a frame ran")
        return found.message()

    async def describe(self, session_id: str) -> pb.SessionDescription:
        """The live parameters of a session."""
        session = self.get(session_id)
        known = {}
        if self._loading.state is LoadState.READY:
            definitions = await self._executor.submit(self._loading.ready().definitions)
            known = {definition.class_type: definition for definition in definitions}
        revision = session.parameters.current
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

    @staticmethod
    def _check_version(session: Session, expected: int) -> None:
        if expected and session.parameters.current.version != expected:
            raise VersionConflict(
                f"the parameters are at version {session.parameters.current.version}, not {expected}"
            )


def _lane(request: pb.OpenSession, video: wire.VideoFormat) -> tuple[Lane | None, str]:
    """The shared memory that the client offers, if it can be used; and how planes travel, for the log."""
    if not request.HasField("shared_memory"):
        return None, "messages"
    try:
        lane = Lane.attach(request.shared_memory, video)
    except RingRefused as exc:
        return None, f"messages, because {exc}"
    return lane, str(lane)
