"""What waits for a client that does not read: bounded, and in messages that it can read once it does."""

from __future__ import annotations

import asyncio

import pytest

from engine.outbox import OUTBOX_LIMIT, Outbox
from proto.fields import MAX_ITEMS
from proto.results import FrameResult, Results


def refused(first: int, count: int) -> Results:
    """Results of frames that were no good."""
    return Results([FrameResult(frame_id) for frame_id in range(first, first + count)], count)


async def has_room(outbox: Outbox) -> bool:
    room = asyncio.ensure_future(outbox.room())
    await asyncio.sleep(0)
    return room.done() or not room.cancel()


@pytest.mark.parametrize("count", [1, 100, MAX_ITEMS])
async def test_bad_frames_of_a_client_that_never_reads_fill_the_outbox(count: int) -> None:
    outbox = Outbox()
    sent = 0
    while await has_room(outbox):
        assert sent <= OUTBOX_LIMIT * MAX_ITEMS, "it would grow for ever"
        outbox.put(refused(sent, count))
        sent += count
    outbox.close()
    taken = [taken for _ in range(OUTBOX_LIMIT) if isinstance(taken := await outbox.take(), Results)]
    assert await outbox.take() is None
    assert max(len(results.results) for results in taken) <= MAX_ITEMS
    assert [result.frame_id for results in taken for result in results.results] == list(range(sent))
    assert sum(results.credits for results in taken) == sent


async def test_small_results_travel_together() -> None:
    outbox = Outbox()
    for number in range(MAX_ITEMS):
        outbox.put(refused(number, 1))
    outbox.close()
    taken = await outbox.take()
    assert isinstance(taken, Results)
    assert (len(taken.results), taken.credits) == (MAX_ITEMS, MAX_ITEMS)
    assert await outbox.take() is None
