"""Fairness and failure of the scheduler, without gRPC and without threads."""

from __future__ import annotations

import asyncio
import contextlib
import math
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
        self.source.clock.now += self.source.cost
        if self.error is not None:
            raise self.error
        return RunResult([])

    def run_with(self, others: list[FakeBatch]) -> list[RunResult | Exception]:
        self.source.clock.now += self.source.cost
        self.source.log.append(f"together {1 + len(others)}")
        return [batch.error or RunResult([]) for batch in (self, *others)]


@dataclass
class Clock:
    """Of the executor thread: moves with what runs there."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class FakeSource:
    alike: str | None = None

    def __init__(
        self, name: str, log: list[str], batches: int, inline: bool = False, *, clock: Clock, cost: float = 1.0
    ) -> None:
        self.name = name
        self.clock = clock
        self.cost = cost
        self.due = math.inf
        self.log = log
        self.inline = inline
        self.waiting: deque[Exception | None] = deque([None] * batches)
        self.done = asyncio.Event()
        self.taken = 0

    def due_at(self) -> float | None:
        return self.due if self.waiting else None

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
    scheduler = Scheduler(gate, clock := Clock())
    sources = [FakeSource(name, log, count, clock=clock) for name, count in (("a", 3), ("b", 3), ("c", 1))]
    async with running(scheduler):
        for source in sources:
            scheduler.wake(source)
        gate.open.set()
        for source in sources:
            await source.done.wait()
    assert log == ["a", "b", "c", "a", "b", "a", "b"]


async def test_most_urgent_of_new_sources_goes_first() -> None:
    log: list[str] = []
    gate = Gate()
    scheduler = Scheduler(gate, clock := Clock())
    sources = [FakeSource(name, log, 1, clock=clock) for name in "abc"]
    for source, due in zip(sources, (3.0, 1.0, 2.0), strict=True):
        source.due = due
        scheduler.wake(source)
    async with running(scheduler):
        gate.open.set()
        for source in sources:
            await source.done.wait()
    assert log == ["b", "c", "a"]


async def test_shares_are_of_device_time_not_of_runs() -> None:
    log: list[str] = []
    gate = Gate()
    gate.open.set()
    scheduler = Scheduler(gate, clock := Clock())
    slow, fast = FakeSource("slow", log, 4, clock=clock, cost=10.0), FakeSource("fast", log, 40, clock=clock)
    async with running(scheduler):
        scheduler.wake(slow)
        scheduler.wake(fast)
        await slow.done.wait()
        await fast.done.wait()
    assert log[:22].count("slow") == 2
    assert log[:33].count("slow") == 3


async def test_failed_runs_cost_their_time() -> None:
    log: list[str] = []
    gate = Gate()
    gate.open.set()
    scheduler = Scheduler(gate, clock := Clock())
    failing, fast = FakeSource("failing", log, 3, clock=clock, cost=10.0), FakeSource("fast", log, 30, clock=clock)
    failing.waiting = deque([GraphFailed("x")] * 3)
    async with running(scheduler):
        scheduler.wake(failing)
        scheduler.wake(fast)
        await failing.done.wait()
        await fast.done.wait()
    assert log[:22].count("failing!node_failed") == 2


async def test_source_that_gave_everything_up_has_no_turn() -> None:
    log: list[str] = []
    gate = Gate()
    gate.open.set()
    scheduler = Scheduler(gate, clock := Clock())
    hopeless, fine = FakeSource("hopeless", log, 1, clock=clock), FakeSource("fine", log, 1, clock=clock)
    hopeless.due_at = lambda: None  # type: ignore[method-assign]
    async with running(scheduler):
        scheduler.wake(hopeless)
        scheduler.wake(fine)
        await fine.done.wait()
        await scheduler.quiet()
    assert log == ["fine"]
    assert not scheduler._share


async def test_waking_twice_gives_no_second_turn() -> None:
    log: list[str] = []
    gate = Gate()
    scheduler = Scheduler(gate, clock := Clock())
    greedy, modest = FakeSource("greedy", log, 2, clock=clock), FakeSource("modest", log, 1, clock=clock)
    async with running(scheduler):
        for source in (greedy, greedy, greedy, modest):
            scheduler.wake(source)
        gate.open.set()
        await greedy.done.wait()
    assert log == ["greedy", "modest", "greedy"]


async def test_inline_source_runs_while_the_executor_is_busy() -> None:
    log: list[str] = []
    gate = Gate()
    scheduler = Scheduler(gate, clock := Clock())
    slow, quick = FakeSource("slow", log, 1, clock=clock), FakeSource("quick", log, 2, inline=True, clock=clock)
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
    scheduler = Scheduler(gate, clock := Clock())
    source = FakeSource("a", log, 2, clock=clock)
    source.waiting[0] = error
    async with running(scheduler):
        scheduler.wake(source)
        await source.done.wait()
    assert log == [entry, "a"]


async def test_removed_source_is_not_asked() -> None:
    log: list[str] = []
    gate = Gate()
    scheduler = Scheduler(gate, clock := Clock())
    first, gone, last = (FakeSource(name, log, 1, clock=clock) for name in ("first", "gone", "last"))
    async with running(scheduler):
        for source in (first, gone, last):
            scheduler.wake(source)
        scheduler.remove(gone)
        gate.open.set()
        await last.done.wait()
    assert log == ["first", "last"]


async def test_alike_sources_run_as_one_and_answer_for_themselves() -> None:
    log: list[str] = []
    gate = Gate()
    gate.open.set()
    scheduler = Scheduler(gate, clock := Clock())
    sources = [FakeSource(name, log, 2, clock=clock) for name in "abcd"]
    for source, alike in zip(sources, ("x", "y", "x", None), strict=True):
        source.alike = alike
    sources[2].waiting[0] = GraphFailed("x", code="mine")
    async with running(scheduler):
        for source in sources:
            scheduler.wake(source)
        for source in sources:
            await source.done.wait()
        await scheduler.quiet()
    assert log[:3] == ["together 2", "a", "c!mine"]
    assert sorted(log) == sorted(["together 2", "a", "c!mine", "together 2", "a", "c", "b", "b", "d", "d"])
    assert not scheduler._share


async def test_source_that_stops_being_alike_runs_alone_at_once() -> None:
    log: list[str] = []
    gate = Gate()
    scheduler = Scheduler(gate, clock := Clock())
    one, other = (FakeSource(name, log, 2, clock=clock) for name in "ab")
    one.alike = other.alike = "x"
    async with running(scheduler):
        scheduler.wake(one)
        scheduler.wake(other)
        await gate.entered.wait()
        other.alike = "y"
        gate.open.set()
        await one.done.wait()
        await other.done.wait()
    assert log == ["together 2", "a", "b", "a", "b"]
