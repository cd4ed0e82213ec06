"""Checks that hold for every test: nothing left running, nothing left open."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator

import pytest
from hypothesis import settings

# A busy machine makes any example slow; pytest's own timeout bounds a test that hangs.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")


ENDING_TURNS = 50


@pytest.fixture(autouse=True)
async def nothing_left_running(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """An async test must end without stray tasks and without threads that it started."""
    if not asyncio.iscoroutinefunction(getattr(request.function, "__wrapped__", request.function)):
        yield
        return
    before = set(threading.enumerate())
    yield
    # What was cancelled needs a turn of the loop or two to end; what was forgotten never does.
    for _ in range(ENDING_TURNS):
        if not (tasks := _tasks()):
            break
        await asyncio.sleep(0.01)
    assert not [task.get_name() for task in tasks], "tasks left running"
    gc.collect()
    # The loop's own threads (default executor, watchers of child processes) and test servers' pools end with it.
    left = [
        thread
        for thread in set(threading.enumerate()) - before
        if thread.is_alive() and not thread.name.startswith(("asyncio", "ThreadPoolExecutor", "Dummy"))
    ]
    assert not [thread.name for thread in left], "threads left running"


def _tasks() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
