"""Fairness and failure of the scheduler, without gRPC and without threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from engine.backend import GraphFailed, RunResult
from engine.scheduler import Scheduler


@dataclass
class FakeBatch:
    source: FakeSource
    inline: bool
    error: Exception | None

    def run(self) -> RunResult:
        if self.error is not None:
            raise self.error
        return RunResult([])


class FakeSource:
    def __init__(self, name: str, log: list[str], batches: int, inline: bool = False) -> None:
        self.name = name
        self.log = log
        self.inline = inline
        self.waiting: deque[Exception | None] = deque([None] * batches)
        self.done = asyncio.Event()
        self.taken = 0

    def take(self) -> FakeBatch | None:
        assert self.taken == 0, "asked for another batch while one runs"
        if not self.waiting:
            return None
        self.taken = 1
        return FakeBatch(self, self.inline, self.waiting.popleft())

    def has_waiting(self) -> bool:
        return bool(self.waiting)

    def finish(self, batch: FakeBatch, result: RunResult, /) -> None:
        self._settle(self.name)

    def fail(self, batch: FakeBatch, error: GraphFailed, /) -> None:
        self._settle(f"{self.name}!{error.code}")

    def _settle(self, entry: str) -> None:
        self.taken = 0
        self.log.append(entry)
        if not self.waiting:
            self.done.set()


class Gate:
    """Stands for the executor: runs each batch when the test opens it."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.entered = asyncio.Event()
        self.busy = 0

    def __call__(self, run):  # type: ignore[no-untyped-def]
        async def later() -> RunResult:
            self.busy += 1
            self.entered.set()
            assert self.busy == 1, "two graph runs at once"
            try:
                await self.open.wait()
                return run()
            finally:
                self.busy -= 1

        return asyncio.ensure_future(later())


@contextlib.asynccontextmanager
async def running(scheduler: Scheduler) -> AsyncIterator[None]:
    task = asyncio.create_task(scheduler.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_sources_take_turns() -> None:
    log: list[str] = []
    gate = Gate()
    scheduler = Scheduler(gate)
    sources = [FakeSource(name, log, count) for name, count in (("a", 3), ("b", 3), ("c", 1))]
    async with running(scheduler):
        for source in sources:
            scheduler.wake(source)
        gate.open.set()
        for source in sources:
            await source.done.wait()
    assert log == ["a", "b", "c", "a", "b", "a", "b"]


async def test_waking_twice_gives_no_second_turn() -> None:
    log: list[str] = []
    gate = Gate()
    scheduler = Scheduler(gate)
    greedy, modest = FakeSource("greedy", log, 2), FakeSource("modest", log, 1)
    async with running(scheduler):
        for source in (greedy, greedy, greedy, modest):
            scheduler.wake(source)
        gate.open.set()
        await greedy.done.wait()
    assert log == ["greedy", "modest", "greedy"]


async def test_inline_source_runs_while_the_executor_is_busy() -> None:
    log: list[str] = []
    gate = Gate()
    scheduler = Scheduler(gate)
    slow, quick = FakeSource("slow", log, 1), FakeSource("quick", log, 2, inline=True)
    async with running(scheduler):
        scheduler.wake(slow)
        await gate.entered.wait()
        scheduler.wake(quick)
        assert log == ["quick", "quick"]
        gate.open.set()
        await slow.done.wait()


@pytest.mark.parametrize(
    ("error", "entry"),
    [
        (GraphFailed("x", code="out_of_memory"), "a!out_of_memory"),
        (KeyError("a bug"), "a!node_failed"),
    ],
)
async def test_failed_run_does_not_stop_the_next(error: Exception, entry: str) -> None:
    log: list[str] = []
    gate = Gate()
    gate.open.set()
    scheduler = Scheduler(gate)
    source = FakeSource("a", log, 2)
    source.waiting[0] = error
    async with running(scheduler):
        scheduler.wake(source)
        await source.done.wait()
    assert log == [entry, "a"]


async def test_removed_source_is_not_asked() -> None:
    log: list[str] = []
    gate = Gate()
    scheduler = Scheduler(gate)
    first, gone, last = (FakeSource(name, log, 1) for name in ("first", "gone", "last"))
    async with running(scheduler):
        for source in (first, gone, last):
            scheduler.wake(source)
        scheduler.remove(gone)
        gate.open.set()
        await last.done.wait()
    assert log == ["first", "last"]
