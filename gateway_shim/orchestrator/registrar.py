"""Keeps us registered: when ready, again while idle, for ever, and gone at the end.

An orchestrator keeps registrations in memory, forgets them when it restarts, drops ours after a 401, and tells
nobody. Registering again sets its count of our running streams to zero, so that is done only while there are none
(protocol.md 3.1, 3.2).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from proto.tasks import ended

from .byoc import Registration, RegistrationFailed, RegistrationRefused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegistrarTiming:
    """Seconds."""

    again_s: float = 60.0  # between registrations while idle: how long a restarted orchestrator goes without us
    first_retry_s: float = 1.0
    longest_retry_s: float = 30.0
    refused_retry_s: float = 60.0  # only people change what was refused
    dropped_s: float = 5.0  # after a 401; whoever makes us answer it must not make us flood the orchestrator
    unregister_s: float = 2.0  # at shutdown
    settle_s: float = 3.0  # for an orchestrator to see the end of a stream, before a registration resets its count


class RegistrationState(StrEnum):
    WAITING = "waiting"  # for the engine
    REGISTERED = "registered"
    FAILING = "failing"  # nobody answers, or wrongly
    REFUSED = "refused"  # a setting is wrong
    ENDED = "ended"


class Registrar:
    """Owns one task that registers. ``look`` wakes it when ``ready`` or ``idle`` may have changed."""

    def __init__(
        self,
        registration: Registration,
        *,
        ready: Callable[[], bool],
        idle: Callable[[], bool],
        timing: RegistrarTiming | None = None,
        jitter: Callable[[], float] = random.random,
        known: bool = False,
    ) -> None:
        """jitter: gives 0..1; workers that lost the same orchestrator must not come back as one.

        known: a predecessor of ours, which was killed, has probably registered and its streams are counted.
        """
        self.state = RegistrationState.WAITING
        self.last_error = ""
        self._registration = registration
        self._ready = ready
        self._idle = idle
        self._timing = timing or RegistrarTiming()
        self._jitter = jitter
        self._wake = asyncio.Event()
        self._moved = asyncio.Event()
        self._due_at = 0.0
        self._settled_at = asyncio.get_running_loop().time() + self._timing.settle_s if known else 0.0
        self._attempted = known
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="registrar")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await ended(self._task)
        self._become(RegistrationState.ENDED)
        if self._attempted:  # also after a failure: the answer may have been lost, not the request
            await self._unregister()

    def look(self) -> None:
        """Something changed that readiness or idleness depend on."""
        self._wake.set()

    def again(self) -> None:
        """The orchestrator has probably dropped us, as it does after a 401: register soon, once no stream runs."""
        self._due_at = min(self._due_at, asyncio.get_running_loop().time() + self._timing.dropped_s)
        self._wake.set()

    async def reached(self, state: RegistrationState) -> None:
        """Wait until ``state`` holds."""
        while self.state is not state:
            await self._moved.wait()

    def _become(self, state: RegistrationState) -> None:
        self.state = state
        self._moved.set()
        self._moved = asyncio.Event()  # wakes every waiter once

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            # The first registration can reset no count; every later one waits until no stream runs, and until the
            # orchestrator knows that too: it would count the end of a stream that it has forgotten.
            busy = self._attempted and not self._idle()
            if busy:
                self._settled_at = loop.time() + self._timing.settle_s
            if busy or not self._ready():
                await self._woken(None)
                continue
            wait_s = max(self._due_at, self._settled_at) - loop.time()
            if wait_s > 0:
                await self._woken(wait_s)
                continue
            failures, pause_s = await self._attempt(failures)
            self._due_at = loop.time() + pause_s

    async def _woken(self, timeout_s: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        self._wake.clear()

    async def _attempt(self, failures: int) -> tuple[int, float]:
        """Register once. Gives the failures in a row and the seconds until the next attempt."""
        timing = self._timing
        self._attempted = True
        try:
            await self._registration.register()
        except RegistrationRefused as exc:
            self._failed(RegistrationState.REFUSED, f"{exc} (check ORCH_SECRET and CAPABILITY_*)")
            return failures + 1, timing.refused_retry_s * (0.75 + 0.5 * self._jitter())
        except RegistrationFailed as exc:
            self._failed(RegistrationState.FAILING, str(exc))
            backoff_s = min(timing.longest_retry_s, timing.first_retry_s * 2 ** min(failures, 16))
            return failures + 1, backoff_s * (0.75 + 0.5 * self._jitter())
        if self.state is not RegistrationState.REGISTERED:
            logger.info("registered %s", self._registration.name)
        self.last_error = ""
        self._become(RegistrationState.REGISTERED)
        return 0, timing.again_s * (0.75 + 0.5 * self._jitter())

    def _failed(self, state: RegistrationState, message: str) -> None:
        # Once for each reason: this goes on for ever.
        if (state, message) != (self.state, self.last_error):
            level = logging.ERROR if state is RegistrationState.REFUSED else logging.WARNING
            logger.log(level, "cannot register %s: %s; will go on trying", self._registration.name, message)
        self.last_error = message
        self._become(state)

    async def _unregister(self) -> None:
        try:
            async with asyncio.timeout(self._timing.unregister_s):
                await self._registration.unregister()
        except (RegistrationFailed, TimeoutError) as exc:
            logger.warning("could not unregister %s: %s", self._registration.name, exc or "no answer in time")
        else:
            logger.info("unregistered %s", self._registration.name)
