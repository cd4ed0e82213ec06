"""Whose frames run next: round robin among the sessions that have frames waiting, one run at a time.

Everything here happens on the event loop; only the run itself is on the executor thread. Between two runs the
executor also does what else was submitted (checks, steps of builds), so an update waits for one run at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from .backend import GraphFailed, RunResult

logger = logging.getLogger(__name__)

#: How long a step of a build stands back for frames: with a graph that is busy all the time, a build still ends, and
#: takes one frame time of four.
BUILD_PATIENCE_S: Final = 0.1

#: A traceback of one kind of exception is logged this often at most.
TRACE_EVERY_S: Final = 1.0

#: Hands a function to the executor thread.
Submit = Callable[[Callable[[], RunResult]], "asyncio.Future[RunResult]"]


class Batch(Protocol):
    """Frames of one run, with the graph and the parameters that they run with."""

    @property
    def inline(self) -> bool:
        """Runs on the event loop."""

    def run(self) -> RunResult:
        """On the executor thread, or on the loop when ``inline``. Raises GraphFailed."""


B = TypeVar("B", bound=Batch)


class Source(Protocol[B]):
    """What the scheduler needs of a session. ``take`` is followed by exactly one ``finish`` or ``fail``."""

    @property
    def inline(self) -> bool:
        """Whether the batches that ``take`` would give are inline."""

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

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._ready: deque[Source[Any]] = deque()
        self._running: Source[Any] | None = None
        self.running: Batch | None = None  # on the executor thread, or next there; its session may have ended
        self._wakeup = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._traced_at: dict[str, float] = {}  # monotonic seconds by exception class

    async def quiet(self) -> None:
        """Until no frame waits for the executor thread, BUILD_PATIENCE_S at most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._quiet.wait(), BUILD_PATIENCE_S)

    def wake(self, source: Source[Any]) -> None:
        """``source`` has frames; asking twice changes nothing.

        What is inline runs at once: it must not wait for somebody else's graph, or for a model that loads.
        """
        if source is self._running or source in self._ready:
            return
        if source.inline:
            while (batch := source.take()) is not None:
                self._now(source, batch)
        else:
            self._ready.append(source)
            self._wakeup.set()
            self._quiet.clear()

    def remove(self, source: Source[Any]) -> None:
        """Forget a source that closes. Its running batch, if any, still gets its ``finish`` or ``fail``."""
        if source in self._ready:
            self._ready.remove(source)

    async def run(self) -> None:
        """Until cancelled. A run that is under way then gets no ``finish``; its source is closing as well."""
        while True:
            while not self._ready:
                self._wakeup.clear()
                self._quiet.set()
                await self._wakeup.wait()
            source = self._running = self._ready.popleft()
            try:
                batch = source.take()
                if batch is None:
                    pass
                elif batch.inline:
                    self._now(source, batch)
                else:
                    await self._on_executor(source, batch)
            finally:
                self._running = None
            if source.has_waiting():
                self._ready.append(source)  # behind everybody who waited meanwhile: that is the fairness

    def _now(self, source: Source[Any], batch: Batch) -> None:
        try:
            result = batch.run()
        except Exception as exc:  # as below
            source.fail(batch, self._failure(exc))
        else:
            source.finish(batch, result)

    async def _on_executor(self, source: Source[Any], batch: Batch) -> None:
        self.running = batch
        try:
            result = await self._submit(batch.run)
        except Exception as exc:  # any node may raise anything: its frames fail, everybody else goes on
            source.fail(batch, self._failure(exc))
        else:
            source.finish(batch, result)
        finally:
            self.running = None

    def _failure(self, error: Exception) -> GraphFailed:
        if isinstance(error, GraphFailed):
            return error
        kind = type(error).__name__
        now = time.monotonic()
        if now - self._traced_at.get(kind, float("-inf")) >= TRACE_EVERY_S:
            # It may come on every frame; the counters hold the rest.
            self._traced_at[kind] = now
            logger.error("a graph run raised what its runner did not expect", exc_info=error)
        return GraphFailed("the graph failed unexpectedly; the engine's log says how", exception=kind)
