"""The executor thread: order, results, errors, its own loop, and its end."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from engine.executor import Executor


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    executor = Executor()
    executor.start()
    yield executor
    assert await executor.stop(10)


async def test_jobs_run_in_order_on_one_thread(executor: Executor) -> None:
    seen: list[int] = []
    names = await asyncio.gather(
        *(executor.submit(lambda n: (seen.append(n), threading.current_thread().name)[1], n) for n in range(20))
    )
    assert seen == list(range(20))
    assert set(names) == {"executor"}


async def test_job_may_drive_coroutines(executor: Executor) -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    def job() -> int:
        return asyncio.get_event_loop().run_until_complete(answer())

    assert await executor.submit(job) == 42
    assert await executor.submit(answer) == 42


@pytest.mark.parametrize(("raised", "arrives"), [(ValueError("x"), ValueError), (SystemExit(3), RuntimeError)])
async def test_exception_reaches_the_caller_and_the_thread_lives(
    executor: Executor, raised: BaseException, arrives: type[Exception]
) -> None:
    def job() -> None:
        raise raised

    with pytest.raises(arrives):
        await executor.submit(job)
    assert await executor.submit(lambda: 1) == 1


async def test_cancelled_job_does_not_run(executor: Executor) -> None:
    gate = threading.Event()
    ran: list[str] = []
    blocker = executor.submit(gate.wait, 60)
    cancelled = executor.submit(ran.append, "cancelled")
    cancelled.cancel()
    after = executor.submit(ran.append, "after")
    gate.set()
    await blocker
    await after
    assert ran == ["after"]


async def test_stop_waits_for_what_was_submitted_and_refuses_more() -> None:
    executor = Executor()
    executor.start()
    ran: list[int] = []
    executor.submit(ran.append, 1)
    assert await executor.stop(10)
    assert ran == [1]
    late = executor.submit(ran.append, 2)
    assert late.cancelled()


async def test_stop_gives_up_on_a_hung_job_at_the_deadline() -> None:
    executor = Executor()
    executor.start()
    gate = threading.Event()
    hung = executor.submit(gate.wait, 60)
    assert not await executor.stop(0.05)
    gate.set()
    with contextlib.suppress(asyncio.CancelledError):
        await hung
    assert await executor.stop(10)
