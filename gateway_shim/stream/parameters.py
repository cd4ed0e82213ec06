"""The parameters of one stream: what runs, and the updates on their way to the engine.

One update is on its way at a time. Overrides that wait meanwhile go together in one: every value is checked, the last
one of each input wins, and all callers hear of the version that holds theirs. When the engine refuses such a joint
update, its parts go one by one, so that only the bad ones are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proto import engine_pb2 as pb

from ..engine_choice import pick
from ..engine_client import EngineClient, overrides_of
from ..engine_session import EngineSession
from ..errors import (
    HeadraceError,
    InvalidRequest,
    NoSuchStream,
    NotReady,
    VersionConflict,
    WorkflowRefused,
)
from ..keys import is_document
from ..params import Update
from .workflow import PASS_THROUGH, merged, raise_for_findings

logger = logging.getLogger(__name__)

#: How long an update waits for its turn. A workflow that loads holds the others up, which are meant for it.
TURN_TIMEOUT_S = 30.0

#: Silence after which an engine that has an update is given up. While it loads models it says so every second.
SILENCE_S = 30.0

#: Longest build of a workflow, whatever the engine says: the largest models from a slow disk.
BUILD_TIMEOUT_S = 1800.0


#: After so many a prompt is one to come back to: the engine's own probation (engine/parameters.py).
PROVEN_PICTURES = 15


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """``effective_pts``: input pts (90 kHz) of the first frame made with it; None until a frame came."""

    version: int
    effective_pts: int | None


#: Reads an update against the workflow that it will change. Raises a HeadraceError.
Read = Callable[[Mapping[str, Any]], Update]


@dataclass(slots=True, eq=False)
class _Waiting:
    """An update whose turn has not come."""

    read: Read
    dry_run: bool
    expected_version: int
    done: asyncio.Future[tuple[Update, UpdateResult]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    update: Update = field(default_factory=Update)

    @property
    def alone(self) -> bool:
        """What it asks does not mix with other updates."""
        return self.dry_run or bool(self.expected_version) or self.update.workflow is not None

    def resolve(self, result: UpdateResult) -> None:
        if not self.done.done():
            self.done.set_result((self.update, result))

    def refuse(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Parameters:
    """``prompt`` and ``version`` are what the stream's engine session runs, or will run.

    session: waits a moment for the open one; raises NotReady. `run` serves the updates until it is cancelled.
    """

    def __init__(
        self,
        engines: Sequence[EngineClient],
        workflow: dict[str, Any] | None,
        session: Callable[[], Awaitable[tuple[EngineClient, EngineSession]]],
        *,
        waits_for_input: Callable[[], bool] = lambda: False,
        version: int = 1,
    ) -> None:
        """version: of ``workflow``, where an earlier shim has counted."""
        self._engines = engines
        self._session = session
        self._waits_for_input = waits_for_input
        self._version_base = version - 1
        self._engine_version = 1
        self._waiting: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._stale = False
        self._silence: asyncio.Timeout | None = None
        self._closed = False
        self._good: dict[str, Any] | None = None  # the last prompt that made pictures for a while
        self._worked: tuple[int, int] = 0, 0  # engine version, and the pictures that it has made
        self.prompt: dict[str, Any] = copy.deepcopy(workflow) if workflow else copy.deepcopy(PASS_THROUGH)
        self.refused: HeadraceError | None = None  # why the workflow cannot run, while that lasts
        self.replaced = asyncio.Event()  # a workflow came in place of a refused one; whoever tries it clears this

    @property
    def version(self) -> int:
        """It goes on over engine restarts."""
        return self._version_base + self._engine_version

    # ---- what the session says

    def opened(self, engine_version: int) -> None:
        """A session was opened with ``prompt``."""
        self._version_base = self.version - engine_version
        self._engine_version = engine_version
        self._worked = 0, 0
        self.refused = None
        if is_document(self.prompt):  # updates are for the prompt that the engine made of it
            self._stale = True
            self._wake.set()

    def heard(self) -> None:
        """The engine says that it works on an update."""
        if self._silence is not None and not self._silence.expired():
            self._silence.reschedule(asyncio.get_running_loop().time() + SILENCE_S)

    @property
    def is_updating(self) -> bool:
        """Whether the engine has an update, for which it may be silent for a while."""
        return self._silence is not None

    def worked(self, engine_version: int) -> None:
        """A picture was made with that version of the session's parameters."""
        if engine_version != self._engine_version:
            return
        version, pictures = self._worked
        self._worked = engine_version, pictures + 1 if version == engine_version else 1
        if self._worked[1] >= PROVEN_PICTURES:
            self._good = self.prompt

    def back_to_good(self) -> bool:
        """The engine dies of ``prompt``: go back to what last made a picture. False: there is nothing better."""
        if self._good is None or self._good == self.prompt:
            return False
        self.prompt = self._good
        self._version_base += 1
        return True

    async def restore_good(self) -> bool:
        """What ``prompt`` makes cannot be shown: run what last could. False: there is nothing better, or somebody
        changed the parameters meanwhile."""
        good = self._good
        if good is None or good == self.prompt:
            return False
        try:
            await self.update(lambda _: Update(workflow=good), expected_version=self.version)
        except HeadraceError as exc:
            logger.info("what worked before could not be restored: %s", exc.message)
            return False
        return True

    def reverted(self) -> None:
        """The engine restored older parameters by itself: take over what runs."""
        self._stale = True
        self._wake.set()

    # ---- what callers ask

    async def update(
        self, read: Read, *, dry_run: bool = False, expected_version: int = 0
    ) -> tuple[Update, UpdateResult]:
        """Apply a workflow and node overrides, all or nothing, between two frames.

        expected_version: 0, or the version that the caller has seen. Raises what ``read`` raises, InvalidRequest,
        WorkflowRefused, VersionConflict, NotReady, EngineGone. After any of them the running graph is what it was.
        """
        if self._closed:
            raise NoSuchStream("the stream has ended")
        waiting = _Waiting(read, dry_run, expected_version)
        self._waiting.append(waiting)
        self._wake.set()
        try:
            await asyncio.wait({waiting.done}, timeout=TURN_TIMEOUT_S)
        finally:
            waits = waiting in self._waiting
            if waits:
                self._waiting.remove(waiting)
        if waits:
            raise NotReady(
                f"another update is still being loaded after {TURN_TIMEOUT_S:.0f} s; send this one again later"
            )
        return await waiting.done

    async def describe(self) -> pb.SessionDescription:
        """The live parameters. Raises NotReady or EngineGone while the engine is away."""
        engine, session = await self._session()
        return await engine.describe(session.session_id)

    def outer_version(self, engine_version: int) -> int:
        """A version of the engine's session, as callers know it."""
        return self._version_base + engine_version

    # ---- one at a time

    async def run(self) -> None:
        """Serve updates until cancelled; those that wait then are refused."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                if self._stale:
                    await self._read_back()
                while self._waiting:
                    if is_document(self.prompt):
                        await self._read_back()
                    await self._serve(self._next_batch())
        finally:
            self._closed = True
            while self._waiting:
                self._waiting.popleft().refuse(NoSuchStream("the stream ended before the update"))

    def _next_batch(self) -> list[_Waiting]:
        """The next update, and what can go with it; what cannot be read is refused here."""
        batch: list[_Waiting] = []
        while self._waiting:
            waiting = self._waiting[0]
            try:
                waiting.update = waiting.read(self.prompt)
            except Exception as exc:  # whatever it is, it is the caller's answer
                self._waiting.popleft().refuse(exc)
                continue
            if batch and (waiting.alone or self.refused is not None):
                break
            batch.append(self._waiting.popleft())
            if waiting.alone:
                break
        return batch

    async def _serve(self, batch: list[_Waiting]) -> None:
        """Answer every update of a batch."""
        if not batch:
            return
        try:
            result = await self._apply(batch)
        except (InvalidRequest, WorkflowRefused) as exc:
            if len(batch) == 1:
                batch[0].refuse(exc)
            else:
                await self._serve_singly(batch)
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.refuse(NoSuchStream("the stream ended during the update"))
            raise
        except Exception as exc:  # a bug of ours is the callers' answer, not the end of the stream
            for waiting in batch:
                waiting.refuse(exc)
        else:
            for waiting in batch:
                waiting.resolve(result)

    async def _serve_singly(self, batch: Sequence[_Waiting]) -> None:
        try:
            for waiting in batch:
                await self._serve([waiting])
        finally:
            for waiting in batch:  # whoever has an answer keeps it
                waiting.refuse(NoSuchStream("the stream ended during the update"))

    async def _apply(self, batch: Sequence[_Waiting]) -> UpdateResult:
        """All updates of a batch as one; a batch of several has overrides only."""
        first = batch[0]
        if first.expected_version and first.expected_version != self.version:
            raise VersionConflict(f"the parameters are at version {self.version}, not {first.expected_version}")
        workflow = first.update.workflow
        if workflow is None and not any(waiting.update.overrides for waiting in batch):
            return UpdateResult(self.version, None)
        if self.refused is not None and (instead := await self._replace_refused(first)) is not None:
            return instead
        if self._waits_for_input() and (ahead := await self._apply_ahead(batch)) is not None:
            return ahead
        engine, session = await self._session()
        request = pb.UpdateSessionRequest(
            session_id=session.session_id,
            workflow_json=json.dumps(workflow) if workflow is not None else "",
            overrides=[message for waiting in batch for message in overrides_of(waiting.update.overrides)],
            dry_run=first.dry_run,
        )
        if first.expected_version:
            # Asked again there: the engine may have restored older parameters meanwhile.
            request.expected_version = max(first.expected_version - self._version_base, 0) or 2**63
        try:
            async with asyncio.timeout(SILENCE_S) as self._silence:
                answer = await engine.update(request, BUILD_TIMEOUT_S)
        except TimeoutError:
            self._stale = True  # it may have taken effect all the same
            raise NotReady(f"the engine said nothing of the update for {SILENCE_S:.0f} s") from None
        finally:
            self._silence = None
        if not first.dry_run:
            self._engine_version = answer.version
            if workflow is not None and is_document(workflow):
                self.prompt = copy.deepcopy(workflow)
                await self._read_back()
            else:
                for waiting in batch:
                    self._merge(waiting.update)
        effective = answer.effective_pts if answer.HasField("effective_pts") else None
        return UpdateResult(self._version_base + answer.version, effective)

    async def _apply_ahead(self, batch: Sequence[_Waiting]) -> UpdateResult | None:
        """Before the first frame, which may come minutes after the start, there is no session to update: check what
        it will open with. None: the frame came meanwhile, and a session opens with what was before."""
        engine = pick(self._engines)
        if engine is None:
            raise NotReady("the engine is loading or being restarted; send the update again")
        ahead = before = batch[0].update.workflow or self.prompt
        for waiting in batch:
            ahead = await self._changed(engine, ahead, waiting.update)
        # The overrides as such, as a session takes them: ComfyUI itself lets inputs pass that no node has.
        overrides = [waiting.update.overrides for waiting in batch]
        raise_for_findings(await engine.check(before, overrides=overrides))
        if batch[0].dry_run:
            return UpdateResult(self.version, None)
        if not self._waits_for_input():
            return None
        self.prompt = ahead
        self._engine_version += 1
        return UpdateResult(self.version, None)

    def _merge(self, update: Update) -> None:
        """Keep what was accepted, for the next session after an engine's death."""
        self.prompt = merged(self.prompt, update)

    @staticmethod
    async def _changed(engine: EngineClient, prompt: dict[str, Any], update: Update) -> dict[str, Any]:
        """As ``merged``; what ComfyUI's editor saves has no inputs to change before the engine has converted it."""
        workflow = prompt if update.workflow is None else update.workflow
        if is_document(workflow) and update.overrides:
            workflow = await engine.converted(workflow)
        return merged(workflow, replace(update, workflow=None))

    async def _replace_refused(self, waiting: _Waiting) -> UpdateResult | None:
        """A whole workflow in place of one that never ran. None: it runs after all by now, and is to be updated."""
        why = self.refused
        assert why is not None
        if waiting.update.workflow is None:
            raise WorkflowRefused(
                f"the workflow does not run, so its nodes cannot be changed: {why.message}. "
                "Send a whole workflow as `prompts`.",
                why.violations,
            )
        engine = pick(self._engines)
        if engine is None:
            raise NotReady("the engine is loading or being restarted; send the workflow again")
        raise_for_findings(await engine.check(waiting.update.workflow, overrides=[waiting.update.overrides]))
        changed = await self._changed(engine, waiting.update.workflow, waiting.update)
        if not waiting.dry_run:
            if self.refused is None:
                return None
            self.prompt = changed
            self.refused = None
            self.replaced.set()
        return UpdateResult(self.version, None)

    async def _read_back(self) -> None:
        self._stale = False
        with contextlib.suppress(HeadraceError):  # the session is gone: the next one gets what we have
            description = await self.describe()
            self.prompt = json.loads(description.workflow_json)
            self._engine_version = description.version
