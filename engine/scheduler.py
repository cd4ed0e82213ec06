"""Whose frames run next, one run at a time; who that is, is decided by ``fair_share``.

A run's cost is the time that it had the executor thread. A session whose frames can all no longer be in time gives
them up when it is asked for its due time, so they cost no device time and win no turn.

Everything here happens on the event loop; only the run itself is on the executor thread. Between two runs the
executor also does what else was submitted (checks, steps of builds), so an update waits for one run at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from .backend import GraphFailed, RunResult
from .fair_share import FairShare

logger = logging.getLogger(__name__)

#: How long a step of a build stands back for frames: with a graph that is busy all the time, a build still ends, and
#: takes one frame time of four.
BUILD_PATIENCE_S: Final = 0.1

#: A traceback of one kind of exception is logged this often at most.
TRACE_EVERY_S: Final = 1.0

#: Hands a function to the executor thread.
Submit = Callable[[Callable[[], Sequence[RunResult | Exception]]], Awaitable[Sequence[RunResult | Exception]]]

#: Sessions in one shared run at most.
MAX_SHARED: Final = 16


class Batch(Protocol):
    """Frames of one run, with the graph and the parameters that they run with."""

    @property
    def inline(self) -> bool:
        """Runs on the event loop."""

    def run(self) -> RunResult:
        """On the executor thread, or on the loop when ``inline``. Raises GraphFailed."""

    def run_with(self, others: Sequence[Any], /) -> Sequence[RunResult | Exception]:
        """On the executor thread, with batches of sources that are ``alike``: what each gave or raised."""


@dataclass(slots=True)
class _Job:
    """A batch on the executor thread, and how long it had it; what was submitted before is not its cost."""

    batch: Batch
    others: Sequence[Batch]
    clock: Callable[[], float]
    seconds: float = 0.0

    def __call__(self) -> Sequence[RunResult | Exception]:
        began = self.clock()
        try:
            return self.batch.run_with(self.others) if self.others else (self.batch.run(),)
        finally:
            self.seconds = self.clock() - began


B = TypeVar("B", bound=Batch)


class Source(Protocol[B]):
    """What the scheduler needs of a session. ``take`` is followed by exactly one ``finish`` or ``fail``. Hashable."""

    @property
    def inline(self) -> bool:
        """Whether the batches that ``take`` would give are inline."""

    @property
    def alike(self) -> Hashable | None:
        """Sources with an equal one may run as one; None: it runs alone."""

    def due_at(self) -> float | None:
        """When its next run should be over, ``time.monotonic()`` seconds; infinite if nobody waits for it.

        Frames that cannot be in time are dropped first. None: nothing is left to run.
        """

    def take(self) -> B | None:
        """The next frames to run, after dropping those that are too late; None: there are none."""

    def has_waiting(self) -> bool:
        """Whether frames wait that ``take`` did not take."""

    def finish(self, batch: B, /, result: RunResult) -> None:
        """The run gave this."""

    def fail(self, batch: B, /, error: GraphFailed) -> None:
        """The run raised this."""


class Scheduler:
    """Call ``wake`` whenever a source got frames. A source that has a batch running is never asked for another."""

    def __init__(
        self,
        submit: Submit,
        clock: Callable[[], float] = time.perf_counter,
        on_failure: Callable[[], None] = lambda: None,
        on_broken: Callable[[Any, Exception], None] | None = None,
    ) -> None:
        """on_broken: called with a source that raised when it was told of its run, which no source should. It is
        removed then; without it the scheduler ends, and everybody's streams with it."""
        self._submit = submit
        self._on_broken = on_broken
        self._on_failure = on_failure
        self._clock = clock
        self._share: FairShare[Source[Any]] = FairShare()
        self._running: Source[Any] | None = None
        self.running: Batch | None = None  # on the executor thread, or next there; its session may have ended
        self._wakeup = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._traced_at: dict[str, float] = {}  # monotonic seconds by exception class

    async def quiet(self) -> None:
        """Until no frame waits for the executor thread, BUILD_PATIENCE_S at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BUILD_PATIENCE_S):
                await self._quiet.wait()

    def wake(self, source: Source[Any]) -> None:
        """``source`` has frames; asking twice changes nothing.

        What is inline runs at once: it must not wait for somebody else's graph, or for a model that loads.
        """
        if source is self._running or source in self._share:
            return
        if source.inline:
            while (batch := source.take()) is not None:
                self._now(source, batch)
        else:
            self._share.enter(source)
            self._wakeup.set()
            self._quiet.clear()

    def remove(self, source: Source[Any]) -> None:
        """Forget a source that closes. Its running batch, if any, still gets its ``finish`` or ``fail``."""
        self._share.forget(source)

    async def run(self) -> None:
        """Until cancelled. A run that is under way then gets no ``finish``; its source is closing as well."""
        while True:
            while (source := self._next()) is None:
                self._wakeup.clear()
                self._quiet.set()
                await self._wakeup.wait()
            self._running = source
            try:
                batch = source.take()
                if batch is None:
                    pass
                elif batch.inline:
                    self._now(source, batch)
                else:
                    await self._on_executor(source, batch)
            finally:
                self._running = batch = None  # its frames lie in memory of a session that may end before the next run
            if not source.has_waiting():
                self._share.leave(source)

    def _next(self) -> Source[Any] | None:
        """Who has the next turn; those that have nothing to run any more leave."""
        share = self._share
        if not share:
            return None
        due: dict[Source[Any], float] = {}
        for source in share.competing:
            at = source.due_at()
            if at is None:
                self._share.leave(source)
            else:
                due[source] = at
        return self._share.choose(due) if due else None

    def _now(self, source: Source[Any], batch: Batch) -> None:
        result: RunResult | Exception
        try:
            result = batch.run()
        except Exception as exc:  # as below
            result = exc
        self._settle(source, batch, result)

    def _company(self, source: Source[Any]) -> list[tuple[Source[Any], Batch]]:
        """Batches of other sources that run with the one that was just taken of ``source``."""
        alike = source.alike
        company: list[tuple[Source[Any], Batch]] = []
        for other in self._share.competing:
            if other is not source and other.alike == alike and len(company) < MAX_SHARED - 1:
                batch = other.take()
                if batch is not None:
                    company.append((other, batch))
        return company

    async def _on_executor(self, source: Source[Any], batch: Batch) -> None:
        self.running = batch
        company = self._company(source) if source.alike is not None else []
        job = _Job(batch, [each for _, each in company], self._clock)
        try:
            results: Sequence[RunResult | Exception] = await self._submit(job)
        except Exception as exc:  # any node may raise anything: its frames fail, everybody else goes on
            results = [exc] * (1 + len(company))
        finally:
            self.running = None
        if not company:
            self._share.charge(source, job.seconds)
            self._settle(source, batch, results[0])
            return
        cost = job.seconds / len(results)
        for (each, its), result in zip([(source, batch), *company], results, strict=True):
            self._share.charge(each, cost)
            self._settle(each, its, result)
        for each, _ in company:
            if not each.has_waiting():
                self._share.leave(each)

    def _settle(self, source: Source[Any], batch: Batch, result: RunResult | Exception) -> None:
        try:
            if isinstance(result, Exception):
                source.fail(batch, self._failure(result))
            else:
                source.finish(batch, result)
        except Exception as exc:  # what a graph gave can be told to nobody: that ends its session, and no other
            if self._on_broken is None:
                raise
            self._on_broken(source, exc)

    def _failure(self, error: Exception) -> GraphFailed:
        self._on_failure()
        if isinstance(error, GraphFailed):
            return error
        kind = type(error).__name__
        now = time.monotonic()
        if now - self._traced_at.get(kind, float("-inf")) >= TRACE_EVERY_S:
            # It may come on every frame; the counters hold the rest.
            self._traced_at[kind] = now
            logger.error("a graph run raised what its runner did not expect", exc_info=error)
        return GraphFailed("the graph failed unexpectedly; the engine's log says how", exception=kind)
