"""Connections of callers: how many there may be, and how long one may say nothing.

aiohttp bounds neither the time that a request takes to come nor the connections: a few thousand half requests, for
which nobody needs a token, take every descriptor, and then no orchestrator gets through.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

from aiohttp import web

#: Seconds without a whole request, longer than orchestrators keep a connection that they do not use.
IDLE_S: Final = 75.0
#: Half of the descriptors that supervisord insists on; streams, engines and files need the rest.
MOST: Final = 2048
LOOK_EVERY_S: Final = 0.5


class Connections:
    """Closes connections that wait for their caller: after ``idle_s``, and the longest waiting ones over ``most``."""

    def __init__(
        self, *, idle_s: float = IDLE_S, most: int = MOST, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._idle_s = idle_s
        self._most = most
        self._clock = clock
        # By connection, of those that are there: a look drops the others.
        self._waits_since: dict[Any, float] = {}
        self._serving: dict[Any, int] = {}

    @contextlib.contextmanager
    def serving(self, protocol: Any) -> Iterator[None]:
        """A request came and is being answered."""
        self._serving[protocol] = self._serving.get(protocol, 0) + 1
        try:
            yield
        finally:
            if protocol in self._serving:  # else it was closed meanwhile
                self._serving[protocol] -= 1
                self._waits_since[protocol] = self._clock()

    def look(self, protocols: list[Any]) -> int:
        """Close what has waited for too long, of these; returns how many."""
        now = self._clock()
        there = set(protocols)
        for known in (self._waits_since, self._serving):
            for gone in known.keys() - there:
                del known[gone]
        waiting = [each for each in protocols if not self._serving.get(each, 0)]
        waiting.sort(key=lambda each: self._waits_since.setdefault(each, now))
        over = max(0, len(protocols) - self._most)
        closed = [
            each
            for number, each in enumerate(waiting)
            if number < over or now - self._waits_since[each] > self._idle_s
        ]
        for protocol in closed:
            protocol.force_close()
        return len(closed)

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        with self.serving(request.protocol):
            return await handler(request)

    @contextlib.asynccontextmanager
    async def watched(self, runner: web.AppRunner) -> AsyncIterator[None]:
        """Look now and then while ``runner`` serves."""

        async def watch() -> None:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                if runner.server is not None:
                    self.look(runner.server.connections)

        task = asyncio.create_task(watch(), name="connections")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
