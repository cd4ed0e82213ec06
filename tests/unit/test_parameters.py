"""The updates of one stream on their way to the engine."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_shim.errors import InvalidRequest, NoSuchStream
from gateway_shim.params import Update
from gateway_shim.stream.parameters import Parameters


async def test_every_update_has_an_answer_when_the_stream_ends_while_they_go_one_by_one() -> None:
    alone = asyncio.Event()

    async def update(request: Any, _: float) -> None:
        if len(request.overrides) > 1:
            raise InvalidRequest("one of them is wrong")
        alone.set()
        await asyncio.Event().wait()

    async def session() -> tuple[Any, Any]:
        return SimpleNamespace(update=update), SimpleNamespace(session_id="cam")

    parameters = Parameters([], None, session)
    callers = [
        asyncio.create_task(parameters.update(lambda _, level=level: Update(overrides={"5": {"level": level}})))
        for level in range(3)
    ]
    await asyncio.sleep(0)
    serving = asyncio.create_task(parameters.run())
    await alone.wait()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    async with asyncio.timeout(10):
        for caller in callers:
            with pytest.raises(NoSuchStream):
                await caller
