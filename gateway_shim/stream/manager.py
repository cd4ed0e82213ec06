"""All streams of this worker: who may start, who is addressed, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Self

from ..engine_choice import pick
from ..engine_client import EngineClient, EngineState
from ..errors import EngineGone, InvalidRequest, NoSuchStream, NotReady, StreamConflict, StreamsFull, Violation
from ..garbage import collect_soon
from ..params import StartRequest
from .journal import Journal, Kept
from .parameters import UpdateResult
from .resume import hand_over, why_not
from .session import StreamSession
from .settings import StreamSettings
from .workflow import raise_for_findings

logger = logging.getLogger(__name__)

#: Times within a start, which the orchestrator gives up after 5 s in all (protocol.md 4.4): for a stream that is
#: ending to make room, and for the engine to look at the workflow.
ENDING_WAIT_S = 1.5
CHECK_TIMEOUT_S = 1.5

#: A stream ends within this after it was told to, or is cut off: two drains, the farewell, and closing channels that
#: take nothing (session.py, channels.py). With ``drain_s`` before it this stays below supervisord's stopwaitsecs
#: of 30 s.
END_S = 8.0
CUT_OFF_S = 8.0


class Streams:
    """Owns every stream's task. Streams share nothing but the engines."""

    def __init__(
        self,
        engines: Sequence[EngineClient],
        *,
        capacity: int,
        settings: StreamSettings,
        default_workflow: dict[str, Any] | None = None,
        on_change: Callable[[], None] = lambda: None,
        journal: Journal | None = None,
    ) -> None:
        self.capacity = capacity
        self.on_change = on_change
        self._engines = engines
        self._settings = settings
        self._default_workflow = default_workflow
        self._journal = journal
        self._sessions: dict[str, StreamSession] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._handing_over: dict[str, asyncio.Task[None]] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain(0.0)

    @property
    def active(self) -> Mapping[str, StreamSession]:
        return MappingProxyType(self._sessions)

    # ---- start and stop

    async def start(self, request: StartRequest) -> StreamSession:
        """Start a stream; returns at once, models load while frames pass through.

        The same request again (same id, same channels) gives the running stream. Raises StreamConflict, StreamsFull,
        NotReady when no engine answers, WorkflowRefused with every finding.
        """
        if (task := self._handing_over.get(request.stream_id)) is not None:
            await asyncio.wait({task})  # its last act is to remove the record that this stream would write
        await self._ending_made_room(request.stream_id)
        if (running := self._sessions.get(request.stream_id)) is not None:
            if running.request.channels == request.channels and not running.ending:
                return running
            raise StreamConflict(f"stream {request.stream_id} runs already, with other channels; stop it first")
        self._check_room()
        if request.workflow is None and self._default_workflow is not None:
            request = replace(request, workflow=self._default_workflow)
        await self._check_workflow(request)
        # The check took time: another start may have come first.
        if request.stream_id in self._sessions:
            return await self.start(request)
        self._check_room()
        record = self._journal.record(request.stream_id) if self._journal is not None else None
        session = StreamSession(request, self._engines, self._settings, record=record)
        self._begin(session)
        logger.info("stream %s: started, %d of %d", request.stream_id, len(self._sessions), self.capacity)
        self.on_change()
        return session

    def _begin(self, session: StreamSession) -> None:
        self._sessions[session.stream_id] = session
        self._idle.clear()
        self._tasks[session.stream_id] = asyncio.create_task(self._run(session), name=f"stream {session.stream_id}")

    def take_up(self, left: Sequence[Kept], within_s: float) -> None:
        """Go on with streams that a killed shim left, and hand over those that cannot; returns at once.

        within_s: silence that a stream may have had. Call before anybody can start a stream.
        """
        for kept in left:
            request = kept.facts.request
            reason, session = why_not(kept, within_s), None
            if reason is None:
                try:
                    session = StreamSession(request, self._engines, self._settings, record=kept.record, kept=kept)
                except Exception as exc:  # another version may have written anything; the shim starts in any case
                    reason = f"its record makes no stream: {exc}"
            if session is None:
                logger.warning("stream %s: left by a killed shim, handed over: %s", request.stream_id, reason)
                task = asyncio.create_task(hand_over(kept), name=f"hand over {request.stream_id}")
                self._handing_over[request.stream_id] = task
                task.add_done_callback(partial(self._handed_over, request.stream_id))
                continue
            logger.warning("stream %s: left by a killed shim, resumed after %.1f s", request.stream_id, kept.silent_s)
            self._begin(session)
        self.on_change()

    def _handed_over(self, stream_id: str, _: asyncio.Task[None]) -> None:
        del self._handing_over[stream_id]

    async def _ending_made_room(self, stream_id: str) -> None:
        """Wait a moment for streams on their way out that stand in the way of this start."""
        full = len(self._sessions) >= self.capacity
        ending = {
            self._tasks[each.stream_id]
            for each in self._sessions.values()
            if each.ending and (each.stream_id == stream_id or full)
        }
        if ending:
            await asyncio.wait(ending, timeout=ENDING_WAIT_S, return_when=asyncio.FIRST_COMPLETED)

    def _check_room(self) -> None:
        if self._draining:
            raise NotReady("this worker is shutting down and takes no stream")
        if len(self._sessions) >= self.capacity:
            raise StreamsFull(f"insufficient capacity: all {self.capacity} streams are in use")
        ready = [engine.info for engine in self._engines if engine.state is EngineState.READY and engine.info]
        if ready and len(self._sessions) >= (room := sum(info.limits.max_sessions for info in ready)):
            raise StreamsFull(f"insufficient capacity: all {room} sessions of the engine are in use")
        if not any(engine.state in (EngineState.READY, EngineState.LOADING) for engine in self._engines):
            why = next((engine.reason for engine in self._engines if engine.reason), "")
            raise NotReady(why or "the engine does not answer; supervisord restarts it, try again in a few seconds")

    async def _check_workflow(self, request: StartRequest) -> None:
        engine = pick(self._engines, request.stream_id)
        if engine is not None and engine.info is not None:
            _check_size(request, engine.info.limits.max_width, engine.info.limits.max_height)
        if request.workflow is None or engine is None:
            return  # an engine that is loading says later what it thinks of it, as an error event
        try:
            raise_for_findings(await engine.check(request.workflow, CHECK_TIMEOUT_S))
        except EngineGone as exc:
            logger.warning("stream %s: the workflow could not be checked: %s", request.stream_id, exc)

    async def _run(self, session: StreamSession) -> None:
        try:
            await session.run()
        finally:
            self._sessions.pop(session.stream_id, None)
            self._tasks.pop(session.stream_id, None)
            if not self._sessions:
                self._idle.set()
            self.on_change()
            collect_soon()

    async def stop(self, stream_id: str | None, reason: str) -> bool:
        """Tell one stream to end and wait for that, ``END_S`` at most; with no id the only one. False when there is
        no such stream: a late duplicate of a stop is no error (protocol.md 3.5)."""
        if stream_id is None and len(self._sessions) == 1:
            stream_id = next(iter(self._sessions))
        session = self._sessions.get(stream_id or "")
        if session is None:
            return False
        task = self._tasks[session.stream_id]
        session.stop(reason)
        await asyncio.wait({task}, timeout=END_S)
        return True

    async def drain(self, deadline_s: float) -> None:
        """Take no stream any more, let the running ones end by themselves until ``deadline_s``, then end them."""
        self._draining = True
        self.on_change()
        tasks = list(self._tasks.values())
        if tasks and deadline_s > 0:
            await asyncio.wait(tasks, timeout=deadline_s)
        for session in list(self._sessions.values()):
            session.stop("this worker is shutting down", abandon_output=True)
        if left := list(self._tasks.values()):
            _, late = await asyncio.wait(left, timeout=END_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=CUT_OFF_S)
        if self._handing_over:
            await asyncio.wait(self._handing_over.values())

    async def wait_idle(self) -> None:
        """Wait until no stream runs."""
        await self._idle.wait()

    # ---- the running ones

    def get(self, stream_id: str | None) -> StreamSession:
        """A running stream by its id; with no id the only one. Raises NoSuchStream."""
        if stream_id is None:
            if len(self._sessions) == 1:
                return next(iter(self._sessions.values()))
            if not self._sessions:
                raise NoSuchStream("no stream is running")
            raise NoSuchStream(f"say which stream (X-Stream-Id, or in the path): {', '.join(self._sessions)}")
        if (session := self._sessions.get(stream_id)) is not None:
            return session
        raise NoSuchStream(f"stream {stream_id} is not running here")

    async def update(
        self, stream_id: str | None, body: Any, *, dry_run: bool = False, expected_version: int = 0
    ) -> UpdateResult:
        """Apply an update to one stream; see `StreamSession.update`."""
        return await self.get(stream_id).update(body, dry_run=dry_run, expected_version=expected_version)

    async def schema(self, stream_id: str | None) -> dict[str, Any]:
        """The live parameters of one stream; see `StreamSession.schema`."""
        return await self.get(stream_id).schema()


def _check_size(request: StartRequest, max_width: int, max_height: int) -> None:
    """Raises InvalidRequest for a size that no session of the engine has."""
    sides = {"width": (request.width, max_width), "height": (request.height, max_height)}
    wrong = tuple(
        Violation(f"params.{name}", f"is {side}", f"at most {most}")
        for name, (side, most) in sides.items()
        if side is not None and most and side > most
    )
    if wrong:
        raise InvalidRequest(f"{wrong[0].path} {wrong[0].message}; the engine takes {wrong[0].allowed}", wrong)
