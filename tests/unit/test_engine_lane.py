"""The shim's slots: who may send, and who waits for whom."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from gateway_shim.engine_lane import REPLY_SLOTS, REQUEST_SLOTS, EngineLane
from proto.results import Picture

SIZE = (64, 48)


@pytest.fixture
def lane():
    lane = EngineLane(*SIZE)
    yield lane
    lane.close()


def test_frames_take_room_until_they_are_answered(lane: EngineLane) -> None:
    rows = [np.zeros(shape, np.uint8) for shape in ((48, 64), (24, 32), (24, 32))]
    assert lane.room == REQUEST_SLOTS
    for number in range(REQUEST_SLOTS):
        assert lane.put(number, rows)
    assert lane.room == 0
    assert lane.put(99, rows) == 0
    lane.answered(0)
    assert lane.room == 1


async def test_pictures_that_the_encoder_holds_take_room_until_it_lets_go(lane: EngineLane) -> None:
    held = [lane.picture(Picture(slot=slot, width=SIZE[0], height=SIZE[1])) for slot in range(1, REPLY_SLOTS + 1)]
    assert lane.room == 0
    waiting = asyncio.create_task(lane.freed())
    await asyncio.sleep(0)
    held.pop()
    await asyncio.sleep(0.01)
    assert not waiting.done(), "one is not worth a message"

    def let_go() -> None:
        held.clear()

    thread = threading.Thread(target=let_go)  # the encoder's
    thread.start()
    await asyncio.wait_for(waiting, 5)
    thread.join()
    assert lane.room == REQUEST_SLOTS
    assert sorted(lane.released()) == list(range(1, REPLY_SLOTS + 1))
    await asyncio.wait_for(lane.freed(), 1)


def test_large_pictures_have_fewer_slots() -> None:
    lane = EngineLane(1920, 1080)
    assert 0 < lane.room < REQUEST_SLOTS
    lane.close()
