"""The end of tasks, whatever else ends meanwhile."""

import asyncio

import pytest

from proto.tasks import ended


async def test_the_callers_own_cancellation_goes_on():
    stubborn = asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await stubborn.wait()

    inner = asyncio.create_task(slow_to_end())
    outer = asyncio.create_task(ended(inner))
    for _ in range(2):
        await asyncio.sleep(0)
    assert inner.cancelling()
    outer.cancel()
    stubborn.set()
    with pytest.raises(asyncio.CancelledError):
        await outer
    with pytest.raises(asyncio.CancelledError):
        await inner


async def test_both_in_one_turn_of_the_loop():
    inner = asyncio.create_task(asyncio.Event().wait())
    outer = asyncio.create_task(ended(inner))
    await asyncio.sleep(0)
    outer.cancel()
    await asyncio.wait((inner, outer))
    assert outer.cancelled()


async def test_what_the_task_raised_is_raised():
    async def broken() -> None:
        raise LookupError("told to")

    inner = asyncio.create_task(broken())
    await asyncio.wait((inner,))
    with pytest.raises(LookupError):
        await ended(inner)


async def test_a_task_that_is_over_or_ends_is_no_error():
    inner = asyncio.create_task(asyncio.Event().wait())
    await asyncio.sleep(0)
    await ended(inner)
    assert inner.cancelled()
    await ended(inner)
