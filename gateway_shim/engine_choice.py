"""Which of several engines a stream goes to."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Final

from .engine_client import EngineClient, EngineState

#: An engine whose device was busy for more than this share of the last seconds has no time for another stream.
OVERLOADED: Final = 0.85


def pick(
    engines: Sequence[EngineClient], stream_id: str = "", avoid: Collection[EngineClient] = ()
) -> EngineClient | None:
    """The ready engine for a stream, or None: where it ran before, else where there is most room.

    A stream that comes back finds its models and caches there, so it goes back unless that engine is full or
    overloaded. Room is judged by sessions, not by load alone: what several streams that start at once will need
    cannot be seen yet. ``avoid``: engines that just failed it.
    """
    ready = [engine for engine in engines if engine.state is EngineState.READY and engine not in avoid]
    before = max(ready, key=lambda engine: engine.served_at(stream_id), default=None)
    if before is not None and before.served_at(stream_id) and not _is_full(before) and before.load <= OVERLOADED:
        return before
    return min(ready, key=_room, default=None)


def _room(engine: EngineClient) -> tuple[bool, bool, int, float, int]:
    """Less is better."""
    free_bytes = engine.info.device.memory_free_bytes if engine.info is not None else 0
    return _is_full(engine), engine.load > OVERLOADED, engine.all_sessions, round(engine.load, 1), -free_bytes


def _is_full(engine: EngineClient) -> bool:
    return engine.info is not None and engine.all_sessions >= engine.info.limits.max_sessions


async def first_ready(engines: Sequence[EngineClient], stream_id: str = "") -> EngineClient:
    """Wait until one of ``engines`` can run sessions; the best of those that can."""
    while (engine := pick(engines, stream_id)) is None:
        waits = [asyncio.ensure_future(engine.ready()) for engine in engines]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
    return engine
