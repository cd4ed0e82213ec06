"""The engine's part in one stream: keeps a session open, feeds it, takes its answers, survives its death."""

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
from proto.frames import Frame
from proto.results import FrameResult, Picture, Results

from ..deaths import Death
from ..engine_choice import first_ready, pick
from ..engine_client import EngineClient
from ..engine_session import EngineSession
from ..errors import EngineGone, HeadraceError, InvalidRequest, NoSuchStream, NotReady, WorkflowRefused
from ..garbage import collect_soon
from ..media.overlay import Notice
from ..media.planes import frame_of, rows_of
from .engine_sound import FORMAT, EngineSound
from .estimate import Estimate
from .events import Events
from .ledger import Outcome, Rate
from .loading import Loading
from .mailbox import Entry, Mailbox
from .pacing import TICKS
from .parameters import Parameters
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

#: How often a stream whose workflow was refused looks whether the engine is another one.
LOOK_AGAIN_S = 2.0

ERROR_EVERY_S = 1.0

_DROP_REASONS = {
    pb.Dropped.REASON_LATE: "late",
    pb.Dropped.REASON_NO_OUTPUT: "no_output",
    pb.Dropped.REASON_NO_CREDIT: "no_credit",
    pb.Dropped.REASON_CLOSED: "closed",
}


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
        self.budget_s = budget_s  # may change at any time
        self._on_text = on_text
        self._loading = Loading(events)
        self._sound = sound
        self.picture_size: tuple[int, int] | None = None  # of the graph's pictures, when the engine has said it
        self.gives_pictures = True
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
        self._logged_at: dict[str, float] = {}  # loop time by reason
        self.estimate = Estimate()
        self._answered = asyncio.Event()  # frames came back
        self._opened_budget_s = budget_s  # what the engine's session counts ages against
        self._heard_at = 0.0  # loop time of the session's last message
        self._vain_deaths = VainDeaths()
        self.last_death: Death | None = None  # why the engine ended before the session was opened again
        self.parameters = Parameters(
            engines,
            workflow,
            self._open_session,
            waits_for_input=lambda: not self._format_known.is_set(),
            version=version,
        )
        self.rate = Rate()
        self.reopened = 0
        self.ever_processed = False
        self.last_error: str | None = None
        self.last_error_at: float | None = None  # loop time
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

    def set_format(self, width: int, height: int, colour: pb.Colour) -> None:
        """Say what the frames look like; the session opens with the first picture."""
        self._format = pb.VideoFormat(
            width=width,
            height=height,
            time_base=pb.Rational(numerator=1, denominator=TICKS),
            pixel_format=pb.PIXEL_FORMAT_I420,
            colour=colour,
        )
        self._format_known.set()

    # ---- the session's life

    async def run(self) -> None:
        """Open the session, and open it again whenever the engine is lost, with the last good parameters."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self.parameters.run(), name=f"updates {self._stream_id}")
            both.create_task(self._keep_open(), name=f"engine session {self._stream_id}")

    async def _keep_open(self) -> None:
        await self._format_known.wait()
        pause_s = REOPEN_FIRST_S
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
            except (WorkflowRefused, InvalidRequest) as exc:
                self._mailbox.refuse("workflow_refused")
                self._failed("workflow_refused", exc.message, errors=[each.as_json() for each in exc.violations])
                if self._proven:
                    # It ran before, so what is in the way may pass: memory that the dead engine still holds.
                    pause_s = await self._pause(failed, pause_s)
                    continue
                self.parameters.refused = exc
                self._decided.set()
                await self._another_chance(engine)
                pause_s = REOPEN_FIRST_S
            except (EngineGone, NotReady, NoSuchStream) as exc:
                reason = "engine_busy" if isinstance(exc, NotReady) else "engine_gone"
                self._mailbox.refuse(reason)
                self._failed(reason, f"{exc.message}; the stream goes on and the session is opened again")
                if isinstance(exc, EngineGone) and await self._died_of_it(engine, pid):
                    continue
                if self._attempts > attempts:
                    failed, pause_s = {engine}, REOPEN_FIRST_S
                pause_s = await self._pause(failed, pause_s)

    async def _died_of_it(self, engine: EngineClient, pid: int) -> bool:
        """Whether the stream's own workflow seems to kill the engine (process ``pid``); then what helps is done."""
        self._vain_deaths.died(pid)
        deaths = self._vain_deaths.in_a_row
        if deaths < VAIN_DEATHS:
            return False
        if self.parameters.back_to_good():
            self._vain_deaths.forgive()
            self._failed("update_reverted", "the engine died twice of the last update; what worked before holds")
            return True
        if deaths == VAIN_DEATHS:
            return False
        pause_s = self._vain_deaths.pause_s
        death = engine.death
        why = f" ({death.reason})" if death is not None else ""
        text = f"the engine died {deaths} times of this workflow{why}; next try in {pause_s:.0f} s"
        self._failed("workflow_kills_engine", text)
        self.parameters.refused = WorkflowRefused(text)
        self._decided.set()
        self.parameters.replaced.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self.parameters.replaced.wait()
                self._vain_deaths.forgive()
        return True

    async def _pause(self, failed: set[EngineClient], pause_s: float) -> float:
        """Wait before the next try, unless there is another engine for it; gives the wait before the one after it."""
        if pick(self._engines, self._stream_id, failed) is not None:
            return pause_s
        failed.clear()
        await asyncio.sleep(pause_s)
        return min(pause_s * 2, REOPEN_MAX_S)

    async def _another_chance(self, engine: EngineClient) -> None:
        """Wait for another workflow, or for another engine: one that was restarted may have what this one lacks."""
        restarts = engine.restarts
        self.parameters.replaced.clear()
        replaced = asyncio.create_task(self.parameters.replaced.wait(), name=f"workflow of {self._stream_id}")
        try:
            while not replaced.done() and engine.restarts == restarts:
                await asyncio.wait({replaced}, timeout=LOOK_AGAIN_S)
            self._proven = False
        finally:
            replaced.cancel()
            await asyncio.gather(replaced, return_exceptions=True)

    def _failed(self, reason: str, message: str, **facts: Any) -> None:
        self.last_error = message
        self.last_error_at = asyncio.get_running_loop().time()
        self._events.error(reason, message, **facts)
        # A graph that fails does so on every frame; the ledger counts them, one line a second is enough here.
        if self.last_error_at - self._logged_at.get(reason, -ERROR_EVERY_S) >= ERROR_EVERY_S:
            self._logged_at[reason] = self.last_error_at
            logger.warning("stream %s: %s: %s", self._stream_id, reason, message)

    async def _run_session(self, engine: EngineClient) -> None:
        assert self._format is not None
        loop = asyncio.get_running_loop()
        self._opened_budget_s = self.budget_s
        request = pb.OpenSession(
            session_id=self._session_id(),
            wire_version=WIRE_VERSION,
            workflow_json=json.dumps(self.parameters.prompt),
            video=self._format,
            audio=FORMAT,
            latency_budget_ms=round(self._opened_budget_s * 1000),
        )
        # Frames wait for a session that opens at once; a graph that loads for long must not hold them up.
        self._loading.begin()
        patience = loop.call_later(self.budget_s, self._mailbox.refuse, "loading")
        try:
            async with engine.open(request, self._on_progress, stream_id=self._stream_id) as session:
                patience.cancel()
                await self._serve(engine, session)
        finally:
            patience.cancel()

    def _session_id(self) -> str:
        """Unique for each session, readable in the engine's log, and within what the engine takes, whatever the
        orchestrator calls its streams."""
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", self._stream_id)[:64]
        return f"{readable}.{uuid.uuid4().hex[:8]}"

    async def _serve(self, engine: EngineClient, session: EngineSession) -> None:
        logger.info("stream %s: engine session %s is open", self._stream_id, session.session_id)
        if self._attempts:
            collect_soon()  # the loss of the session before it is not being told any more
            self.reopened += 1
            self.last_reopen_at = asyncio.get_running_loop().time()
            self.last_death = engine.death
            reason = self.last_death.reason if self.last_death is not None else self.last_error
            self._events.send("restart", {"restart_count": self.reopened, "reason": reason})
        self._attempts += 1
        self.parameters.opened(session.opened.version)
        self._proven = True
        self._finished.clear()
        self._take_ends(session.opened)
        self._engine, self._session = engine, session
        self.estimate.reset()
        self._heard_at = asyncio.get_running_loop().time()
        self._mailbox.accept()
        self._opened.set()
        self._decided.set()
        sides = [
            asyncio.create_task(self._send(session), name=f"send {self._stream_id}"),
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

    async def _until_gone(self, engine: EngineClient) -> None:
        """A hung engine keeps its connections open; its client notices that it answers nothing."""
        now = asyncio.get_running_loop().time
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SUSPECT_EVERY_S):
                    await engine.gone()
                    raise EngineGone("the engine does not answer")
            if self.estimate.waiting_s(now(), self._heard_at) > SUSPECT_S and not self.parameters.is_updating:
                engine.suspect()

    def _take_ends(self, opened: pb.SessionOpened) -> None:
        """What the workflow takes and gives."""
        size = opened.video_output.width, opened.video_output.height
        self.picture_size = size if all(size) else None
        self.gives_pictures = opened.HasField("video_output")
        self._sound.opened(opened)

    def _on_progress(self, progress: pb.Progress) -> None:
        self.parameters.heard()
        self._loading.heard(progress)

    # ---- frames out and in

    async def _send(self, session: EngineSession) -> None:
        now = asyncio.get_running_loop().time
        while True:
            await session.credit()
            while not self.estimate.room_for_another(self.budget_s, now()):
                self._answered.clear()
                await self._answered.wait()
            await session.send(await self._batch(session))

    async def _batch(self, session: EngineSession) -> list[Frame]:
        """The oldest frame that can be in time, and those that wait behind it as far as one message takes them.

        Not in the loop above: when the engine dies a traceback keeps that loop, with it the last entry, the picture
        that it got and the session's shared memory, until the garbage collector comes by.
        """
        now = asyncio.get_running_loop().time
        needed_s = self.estimate.needed_s
        batch: list[Frame] = []
        entry = await self._mailbox.take(needed_s)
        most = min(session.batch, session.credits)
        while True:
            self.estimate.sent(entry.frame_id, now())
            batch.append(session.load(_frame(entry, now(), self._opened_budget_s), rows_of(entry.frame)))
            if len(batch) >= most or not self.estimate.room_for_another(self.budget_s, now()):
                return batch
            waiting = self._mailbox.take_waiting(needed_s)
            if waiting is None:
                return batch
            entry = waiting

    async def _read(self, session: EngineSession) -> None:
        now = asyncio.get_running_loop().time
        async for response in session.responses():
            self._heard_at = now()
            if isinstance(response, Results):
                for result in response.results:
                    self._settle(result)
                self._answered.set()
                continue
            match response.WhichOneof("message"):
                case "audio":
                    self._sound.answer(response.audio)
                case "opened":
                    self._take_ends(response.opened)
                case "text":
                    for item in response.text.items:
                        self._on_text(item)
                case "fault":
                    self._failed(response.fault.code, _sentence(response.fault), node_id=response.fault.node_id)
                    if response.fault.code == "update_reverted":
                        self.parameters.reverted()
                case "progress":
                    self._on_progress(response.progress)
        if self._finishing:
            self._finished.set()
            await asyncio.Event().wait()  # the stream cancels what is left of us
        raise EngineGone("the engine ended the session")

    async def finish(self) -> None:
        """No frame follows: wait until the engine has said everything, text above all. Cancel `run` afterwards."""
        if self._session is None:
            return
        self._finishing = True
        with contextlib.suppress(HeadraceError):
            await self._session.end_input()
            await self._finished.wait()

    def _settle(self, result: FrameResult) -> None:
        self.estimate.answered(result, asyncio.get_running_loop().time())
        if result.picture is not None:
            self._show(result, result.picture)
        elif result.failed is not None:
            self._mailbox.resolve(result.frame_id, Outcome.FAILED, result.failed.code)
            self._failed(
                result.failed.code or "node_failed",
                _sentence(result.failed),
                node_id=result.failed.node_id,
                class_type=result.failed.class_type,
            )
        else:
            number = result.dropped.reason if result.dropped is not None else pb.Dropped.REASON_UNSPECIFIED
            reason = _DROP_REASONS.get(number, "dropped")
            self._mailbox.resolve(result.frame_id, Outcome.DROPPED, reason)
            if reason == "no_output" and not self.gives_pictures:
                self.ever_processed = True  # that is all it can say of a frame
                self._worked()
                self.rate.tick()

    def _show(self, result: FrameResult, picture: Picture) -> None:
        assert not isinstance(picture.planes, tuple), "what was read is one piece"
        try:
            frame = frame_of(picture.planes, picture.width, picture.height)
            picture.planes = b""  # the frame alone holds a slot: the last response stays here until the next comes
        except ValueError as exc:
            self._mailbox.resolve(result.frame_id, Outcome.FAILED, "bad_picture")
            self._failed("bad_picture", f"the engine's picture cannot be shown: {exc}")
            return
        self._mailbox.resolve(result.frame_id, Outcome.PROCESSED, "", frame)
        self._worked()
        self.parameters.worked(result.version)
        if not self.ever_processed:
            self.ever_processed = True
            logger.info("stream %s: first processed picture", self._stream_id)
        self.rate.tick()

    def _worked(self) -> None:
        self._vain_deaths.worked(asyncio.get_running_loop().time())

    # ---- parameters

    async def _open_session(self) -> tuple[EngineClient, EngineSession]:
        if pick(self._engines) is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(UPDATE_WAIT_S):
                    await self._opened.wait()
        if self._engine is None or self._session is None:
            raise NotReady("the engine is loading or being restarted; the stream goes on, send the update again")
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


def _frame(entry: Entry, now: float, budget_s: float) -> Frame:
    return Frame(
        frame_id=entry.frame_id,
        pts=entry.pts,
        # Measured against the due time, not the arrival: the last frame of a burst has waited long and is not late.
        age_ms=max(0, round((budget_s - (entry.due - now)) * 1000)),
    )


def _sentence(fault: pb.Fault) -> str:
    where = f"node {fault.node_id} ({fault.class_type}): " if fault.node_id else ""
    return f"{where}{fault.message}"
