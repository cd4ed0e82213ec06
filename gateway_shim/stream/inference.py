"""The engine's part in one stream: opens a session, and another one whenever the engine is lost.

What goes to and fro while a session is open is `Traffic`. Here is which engine is tried and when, what its death or
a refusal of the workflow leads to, and what callers are told meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from proto import WIRE_VERSION
from proto import engine_pb2 as pb

from ..deaths import Death
from ..engine_choice import first_ready, pick
from ..engine_client import EngineClient, EngineState
from ..engine_session import EngineSession
from ..errors import EngineGone, HeadraceError, InvalidRequest, NoSuchStream, NotReady, WorkflowRefused
from ..garbage import collect_soon
from ..media.colour import Colour
from ..media.overlay import Notice
from .engine_sound import FORMAT, EngineSound
from .events import Events
from .failures import Failures
from .loading import Loading
from .mailbox import Mailbox
from .pacing import TICKS
from .parameters import Parameters
from .traffic import Traffic
from .vain_deaths import VAIN_DEATHS, VainDeaths

logger = logging.getLogger(__name__)

#: How long an update waits for a session that is being opened before the caller is told to come back.
UPDATE_WAIT_S = 3.0

REOPEN_FIRST_S = 0.1
REOPEN_MAX_S = 2.0

#: Silence of an engine that has frames after which its client looks whether it answers at all; and how often that is
#: looked at. With `SUSPECT_TIMEOUT_S` a hang is noticed within five seconds, where keepalive takes nine.
SUSPECT_S = 2.0
SUSPECT_EVERY_S = 1.0

#: Wait before a workflow is loaded again for which there was no memory, longer each time: every try takes turns from
#: the streams that run.
MEMORY_FIRST_S = 2.0
MEMORY_MAX_S = 30.0

#: How often a stream whose workflow was refused looks whether the engine is another one.
LOOK_AGAIN_S = 2.0

_MATRICES = {"bt601": pb.Colour.MATRIX_BT601, "bt709": pb.Colour.MATRIX_BT709}


class Inference:
    """Runs until cancelled. `parameters` is what the stream's engine session runs, or will run."""

    def __init__(
        self,
        stream_id: str,
        engines: Sequence[EngineClient],
        mailbox: Mailbox,
        events: Events,
        workflow: dict[str, Any] | None,
        *,
        budget_s: float,
        sound: EngineSound,
        on_text: Callable[[pb.TextItem], None] = lambda _: None,
        version: int = 1,
    ) -> None:
        self._stream_id = stream_id
        self._engines = engines
        self._mailbox = mailbox
        self._events = events
        self._sound = sound
        self._loading = Loading(events)
        self._vain_deaths = VainDeaths()
        self._format: pb.VideoFormat | None = None
        self._format_known = asyncio.Event()
        self._opened = asyncio.Event()
        self._finishing = False
        self._finished = asyncio.Event()  # the engine has answered everything, or is gone
        self._decided = asyncio.Event()  # a session opened, or the workflow was refused
        self._engine: EngineClient | None = None
        self._session: EngineSession | None = None
        self._attempts = 0
        self._proven = False  # a session opened with these parameters, or with what they were changed from
        self.failures = Failures(stream_id, events)
        self.parameters = Parameters(
            engines,
            workflow,
            self._open_session,
            waits_for_input=lambda: not self._format_known.is_set(),
            version=version,
        )
        self.traffic = Traffic(
            stream_id,
            mailbox,
            self.parameters,
            budget_s=budget_s,
            sound=sound,
            loading=self._loading,
            failures=self.failures,
            vain_deaths=self._vain_deaths,
            on_text=on_text,
        )
        self.reopened = 0
        self.last_death: Death | None = None  # why the engine ended before the session was opened again
        self.last_reopen_at: float | None = None  # loop time

    @property
    def lane(self) -> str | None:
        """How planes travel to the engine now: "shared_memory" or "bytes"; None without a session."""
        return self._session.lane if self._session is not None else None

    @property
    def is_open(self) -> bool:
        return self._session is not None

    @property
    def refused(self) -> HeadraceError | None:
        """Why the workflow cannot run, while that lasts."""
        return self.parameters.refused

    def notice(self) -> Notice:
        """What to tell viewers who see no picture of the graph. In words of ours: errors of nodes name files."""
        if self.refused is not None:
            return Notice("The workflow does not run")
        if self._session is not None:
            return Notice("The graph gives no picture")
        if pick(self._engines) is None:
            return Notice("The engine is being restarted" if self._attempts else "The engine is starting")
        return self._loading.notice()

    def set_format(self, width: int, height: int, colour: Colour) -> None:
        """Say what the frames look like; the session opens with the first picture."""
        self._format = pb.VideoFormat(
            width=width,
            height=height,
            time_base=pb.Rational(numerator=1, denominator=TICKS),
            pixel_format=pb.PIXEL_FORMAT_I420,
            colour=pb.Colour(
                matrix=_MATRICES[colour.matrix],
                range=pb.Colour.RANGE_FULL if colour.full_range else pb.Colour.RANGE_LIMITED,
            ),
        )
        self._format_known.set()

    # ---- the session's life

    async def run(self) -> None:
        """Open the session, and open it again whenever the engine is lost, with the last good parameters."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self.parameters.run(), name=f"updates {self._stream_id}")
            both.create_task(self._stay_usable(), name=f"pictures {self._stream_id}")
            both.create_task(self._keep_open(), name=f"engine session {self._stream_id}")

    async def _stay_usable(self) -> None:
        """The engine takes a picture that no encoder can have for a good one, and does not go back by itself."""
        while True:
            await self.traffic.unusable.wait()
            if await self.parameters.restore_good():
                text = "the pictures of the last update cannot be shown; what worked before holds again"
                self.failures.tell("update_reverted", text)
            self.traffic.unusable.clear()

    async def _keep_open(self) -> None:
        await self._format_known.wait()
        pause_s, memory_pause_s = REOPEN_FIRST_S, MEMORY_FIRST_S
        failed: set[EngineClient] = set()  # since the last pause
        while True:
            if pick(self._engines) is None:
                self._mailbox.refuse("engine_gone" if self._attempts else "loading")
            # Another engine takes over at once; its restart takes seconds, its loss may not be noticed yet.
            engine = pick(self._engines, self._stream_id, failed) or await first_ready(self._engines, self._stream_id)
            failed.add(engine)
            attempts, pid = self._attempts, engine.info.pid if engine.info is not None else 0
            self._vain_deaths.begin()
            try:
                await self._run_session(engine)
                failed.discard(engine)  # a workflow that came meanwhile is what it has to open now
            except (WorkflowRefused, InvalidRequest) as exc:
                if self.parameters.replaced.is_set():  # what was refused is not wanted any more
                    failed.discard(engine)
                    memory_pause_s = MEMORY_FIRST_S
                    continue
                self._mailbox.refuse("workflow_refused")
                if not self._proven and pick(self._engines, self._stream_id, failed) is not None:
                    continue  # another engine may have the nodes or the memory that this one lacks
                again_s = memory_pause_s if not self._proven and _is_for_memory(exc) else None
                findings = [each.as_json() for each in exc.violations]
                text = exc.message if again_s is None else f"{exc.message}; it is tried again in {again_s:.0f} s"
                self.failures.tell("workflow_refused", text, errors=findings)
                if self._proven:
                    # It ran before, so what is in the way may pass: memory that the dead engine still holds.
                    pause_s = await self._pause(failed, pause_s)
                    continue
                self.parameters.refused = exc
                self._decided.set()
                await self._another_chance(failed, again_s)
                pause_s, memory_pause_s = REOPEN_FIRST_S, min(2 * memory_pause_s, MEMORY_MAX_S)
            except (EngineGone, NotReady, NoSuchStream) as exc:
                reason = "engine_busy" if isinstance(exc, NotReady) else "engine_gone"
                self._mailbox.refuse(reason)
                self.failures.tell(reason, f"{exc.message}; the stream goes on and the session is opened again")
                if isinstance(exc, EngineGone) and await self._died_of_it(engine, pid):
                    continue
                if self._attempts > attempts:
                    failed, pause_s, memory_pause_s = {engine}, REOPEN_FIRST_S, MEMORY_FIRST_S
                pause_s = await self._pause(failed, pause_s)

    async def _died_of_it(self, engine: EngineClient, pid: int) -> bool:
        """Whether the stream's own workflow seems to kill the engine (process ``pid``); then what helps is done."""
        if self.parameters.replaced.is_set():  # it died of one that is not wanted any more
            self._vain_deaths.died(pid)  # or the same process, asked once more, would count against the new one
            self._vain_deaths.forgive()
            return True
        self._vain_deaths.died(pid)
        deaths = self._vain_deaths.in_a_row
        if deaths < VAIN_DEATHS:
            return False
        if self.parameters.back_to_good():
            self._vain_deaths.forgive()
            text = "the engine died twice of the last update; what worked before holds"
            self.failures.tell("update_reverted", text)
            return True
        if deaths == VAIN_DEATHS:
            return False
        pause_s = self._vain_deaths.pause_s
        death = engine.death
        why = f" ({death.reason})" if death is not None else ""
        text = f"the engine died {deaths} times of this workflow{why}; next try in {pause_s:.0f} s"
        self.failures.tell("workflow_kills_engine", text)
        self.parameters.refused = WorkflowRefused(text)
        self._decided.set()
        replaced = asyncio.create_task(self.parameters.replaced.wait(), name=f"workflow of {self._stream_id}")
        pause = asyncio.create_task(self._next_try(engine, pid, pause_s), name=f"pause of {self._stream_id}")
        try:
            await asyncio.wait((replaced, pause), return_when=asyncio.FIRST_COMPLETED)
            if replaced.done():
                self._vain_deaths.forgive()
        finally:
            for task in (replaced, pause):
                task.cancel()
            await asyncio.wait((replaced, pause))
        return True

    async def _next_try(self, engine: EngineClient, pid: int, pause_s: float) -> None:
        """``pause_s`` from when the engine is another process than ``pid``, or another one can take the stream.

        Its start may take longer than the pause: counted from its death, all streams that died with it would come
        back in the same moment and die together again.
        """
        while pick(self._engines, self._stream_id, {engine}) is None:
            if engine.state is EngineState.READY and engine.info is not None and engine.info.pid != pid:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await engine.changed()
        await asyncio.sleep(pause_s)

    async def _pause(self, failed: set[EngineClient], pause_s: float) -> float:
        """Wait before the next try, unless there is another engine for it; gives the wait before the one after it."""
        if pick(self._engines, self._stream_id, failed) is not None:
            return pause_s
        failed.clear()
        await asyncio.sleep(pause_s)
        return min(pause_s * 2, REOPEN_MAX_S)

    async def _another_chance(self, failed: set[EngineClient], within_s: float | None) -> None:
        """Wait for another workflow, for another engine, or for a moment, when other streams may have left memory.

        An engine that was restarted may have what it lacked, and is none of the ``failed`` any more.
        """
        restarts = {engine: engine.restarts for engine in failed}
        loop = asyncio.get_running_loop()
        until = None if within_s is None else loop.time() + within_s
        replaced = asyncio.create_task(self.parameters.replaced.wait(), name=f"workflow of {self._stream_id}")
        try:
            while not replaced.done():
                failed -= {engine for engine, count in restarts.items() if engine.restarts != count}
                if pick(self._engines, self._stream_id, failed) is not None:
                    break
                if until is not None and loop.time() >= until:
                    break
                left_s = LOOK_AGAIN_S if until is None else until - loop.time()
                await asyncio.wait({replaced}, timeout=min(left_s, LOOK_AGAIN_S))
            if replaced.done() or pick(self._engines, self._stream_id, failed) is None:
                failed.clear()  # all of them, with another workflow or with more memory
            self._proven = False
        finally:
            replaced.cancel()
            await asyncio.gather(replaced, return_exceptions=True)

    async def _run_session(self, engine: EngineClient) -> None:
        """Until the session is lost; returns where another workflow came while it was being opened."""
        assert self._format is not None
        loop = asyncio.get_running_loop()
        budget_s = self.traffic.budget_s  # it may change while the engine opens the session
        prompt = self.parameters.prompt  # and so may this
        self.parameters.replaced.clear()
        request = pb.OpenSession(
            session_id=self._session_id(),
            wire_version=WIRE_VERSION,
            workflow_json=json.dumps(prompt),
            video=self._format,
            audio=FORMAT,
            latency_budget_ms=round(budget_s * 1000),
        )
        # Frames wait for a session that opens at once; a graph that loads for long must not hold them up.
        self._loading.begin()
        patience = loop.call_later(budget_s, self._mailbox.refuse, "loading")
        try:
            async with engine.open(request, self.traffic.progressed, stream_id=self._stream_id) as session:
                patience.cancel()
                if self.parameters.prompt is prompt:
                    await self._serve(engine, session, budget_s)
        finally:
            patience.cancel()

    def _session_id(self) -> str:
        """Unique for each session, readable in the engine's log, and within what the engine takes, whatever the
        orchestrator calls its streams."""
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", self._stream_id)[:64]
        return f"{readable}.{uuid.uuid4().hex[:8]}"

    async def _serve(self, engine: EngineClient, session: EngineSession, budget_s: float) -> None:
        logger.info("stream %s: engine session %s is open", self._stream_id, session.session_id)
        if self._attempts:
            collect_soon()  # the loss of the session before it is not being told any more
            self.reopened += 1
            self.last_reopen_at = asyncio.get_running_loop().time()
            self.last_death = engine.death
            reason = self.last_death.reason if self.last_death is not None else self.failures.last
            self._events.send("restart", {"restart_count": self.reopened, "reason": reason})
        self._attempts += 1
        self.parameters.opened(session.opened.version)
        self._proven = True
        self._finished.clear()
        self.traffic.begin(session.opened, budget_s)
        self._engine, self._session = engine, session
        self._mailbox.accept()
        self._opened.set()
        self._decided.set()
        sides = [
            asyncio.create_task(self.traffic.send(session), name=f"send {self._stream_id}"),
            asyncio.create_task(self._read(session), name=f"read {self._stream_id}"),
            asyncio.create_task(self._sound.send(session), name=f"send sound {self._stream_id}"),
            asyncio.create_task(self._until_gone(engine), name=f"engine of {self._stream_id}"),
        ]
        try:
            # Not a TaskGroup: cancelled from outside, it would raise the loss that a side then reports in place of
            # the cancellation. Whichever side notices the end first says why.
            done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            for side in done:
                side.result()
        finally:
            self._opened.clear()
            self._engine = self._session = None
            self._finished.set()
            self._sound.lost()
            for side in sides:
                side.cancel()
            await asyncio.gather(*sides, return_exceptions=True)

    async def _read(self, session: EngineSession) -> None:
        await self.traffic.read(session)
        if self._finishing:
            self._finished.set()
            await asyncio.Event().wait()  # the stream cancels what is left of us
        raise EngineGone("the engine ended the session")

    async def _until_gone(self, engine: EngineClient) -> None:
        """A hung engine keeps its connections open; its client notices that it answers nothing."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SUSPECT_EVERY_S):
                    await engine.gone()
                    raise EngineGone("the engine does not answer")
            if self.traffic.silent_s > SUSPECT_S and not self.parameters.is_updating:
                engine.suspect()

    async def finish(self) -> None:
        """No frame follows: wait until the engine has said everything, text above all. Cancel `run` afterwards."""
        if self._session is None:
            return
        self._finishing = True
        with contextlib.suppress(HeadraceError):
            await self._session.end_input()
            await self._finished.wait()

    # ---- parameters

    async def _open_session(self) -> tuple[EngineClient, EngineSession]:
        if pick(self._engines) is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(UPDATE_WAIT_S):
                    await self._opened.wait()
        if self._engine is None or self._session is None:
            if not self._format_known.is_set():
                raise NotReady("the stream has no picture yet, with which its graph is loaded; ask again when it has")
            raise NotReady("the engine is loading or being restarted; the stream goes on, ask again in a moment")
        return self._engine, self._session

    @property
    def may_open(self) -> bool:
        """Whether a session is open or an engine is there to open one."""
        return self._session is not None or pick(self._engines) is not None

    async def answerable(self) -> None:
        """Wait until an update can be answered: a session is open, will be with the first frame, or the workflow does
        not run."""
        if not self._format_known.is_set():
            await first_ready(self._engines)
            return
        while self.refused is None and not self._opened.is_set():
            self._decided.clear()
            await self._decided.wait()


def _is_for_memory(error: HeadraceError) -> bool:
    return any(violation.reason == "out_of_memory" for violation in error.violations)
