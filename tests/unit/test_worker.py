"""The thread of a codec: order, failure, cancellation, end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from gateway_shim.stream.worker import Worker


async def test_steps_run_in_order_on_one_thread() -> None:
    worker = Worker("decode test")
    ran: list[tuple[int, str]] = []
    steps = [worker.run(lambda at: ran.append((at, threading.current_thread().name)), at) for at in range(20)]
    await asyncio.gather(*steps)
    assert ran == [(at, "decode test") for at in range(20)]
    await worker.close()


async def test_a_step_that_raises_leaves_the_thread_alive() -> None:
    worker = Worker("w")
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 / 0)
    assert await worker.run(lambda: 7) == 7
    await worker.close()


async def test_a_step_that_is_cancelled_before_it_begins_does_not_run() -> None:
    worker = Worker("w")
    begun, go, ran = asyncio.Event(), threading.Event(), []
    loop = asyncio.get_running_loop()

    def hold() -> None:
        loop.call_soon_threadsafe(begun.set)
        go.wait(10)

    held = worker.run(hold)
    await begun.wait()
    other = worker.run(ran.append, 1)
    other.cancel()
    held.cancel()  # runs on; nobody waits for it any more
    go.set()
    assert await worker.run(lambda: list(ran)) == []
    await worker.close()


async def test_close_waits_for_the_step_that_runs_and_ends_the_thread() -> None:
    worker = Worker("ends")
    done = threading.Event()
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow() -> None:
        loop.call_soon_threadsafe(begun.set)
        done.wait(0.05)
        done.set()

    step = worker.run(slow)
    await begun.wait()
    await worker.close()
    assert done.is_set()
    assert all(thread.name != "ends" for thread in threading.enumerate())
    await step
    with pytest.raises(RuntimeError, match="closed"):
        worker.run(slow)


async def test_a_worker_that_never_ran_closes() -> None:
    await Worker("idle").close()


async def test_nothing_of_a_step_is_kept_after_it() -> None:
    class Picture:
        pass

    worker = Worker("w")
    picture = Picture()
    seen = weakref.ref(picture)
    await worker.run(lambda _: None, picture)
    del picture
    await worker.run(lambda: None)
    gc.collect()
    assert seen() is None
    await worker.close()
