"""What every handler works with, and the interfaces it needs of the parts behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from aiohttp import web

from ..errors import (
    BodyTooLarge,
    BodyTooSlow,
    InvalidRequest,
    MalformedRequest,
    NoSuchStream,
    NotReady,
    StreamConflict,
    Violation,
)
from ..json_text import read_json
from ..keys import shortened
from ..params import StartRequest, check_hosts
from ..settings import Settings
from ..status import Facts, best_state
from .own_names import own_names

#: A gateway gives up a start after 5 s, its orchestrator does not: a later answer leaves a stream that nobody watches
#: (protocol.md 4.4).
START_DEADLINE_S = 3.5

#: A body of the largest size over a line of 5 Mbit/s.
BODY_S = 30.0


class Session(Protocol):
    @property
    def request(self) -> StartRequest: ...

    def status(self) -> dict[str, Any]: ...


class UpdateAnswer(Protocol):
    @property
    def version(self) -> int: ...

    @property
    def effective_pts(self) -> int | None: ...


class Streams(Protocol):
    """``stream.manager.Streams`` as the routes see it."""

    @property
    def capacity(self) -> int: ...

    @property
    def active(self) -> Mapping[str, Session]: ...

    async def start(self, request: StartRequest, /) -> Session: ...

    async def stop(self, stream_id: str | None, reason: str, /) -> bool: ...

    def get(self, stream_id: str | None, /) -> Session: ...

    async def update(
        self, stream_id: str | None, body: Any, /, *, dry_run: bool = False, expected_version: int = 0
    ) -> UpdateAnswer: ...

    async def schema(self, stream_id: str | None, /) -> dict[str, Any]: ...


class Engine(Protocol):
    """``engine_client.EngineClient`` as the routes see it; ``info`` is a ``proto`` ServerInfo or None."""

    @property
    def state(self) -> Any: ...

    @property
    def info(self) -> Any: ...

    def as_json(self) -> dict[str, Any]: ...


class Context:
    """One per application. Touched on the event loop only."""

    def __init__(
        self,
        settings: Settings,
        streams: Streams,
        engines: Sequence[Engine],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.streams = streams
        self.engines = engines
        self.draining = False
        self.codecs = ""
        self.on_unauthorized: Callable[[], None] = lambda: None
        self.own_names = own_names(settings.listen_host, settings.capability_url)
        self._clock = clock
        self._dead_at: float | None = None

    def facts(self) -> Facts:
        """How things are. Since when the engines are gone counts from the first call that saw them gone; the
        application looks whenever one changes."""
        engine = best_state(engine.state.name for engine in self.engines)
        if engine != "DEAD":
            self._dead_at = None
        elif self._dead_at is None:
            self._dead_at = self._clock()
        dead_s = 0.0 if self._dead_at is None else self._clock() - self._dead_at
        engines = tuple(each.as_json() for each in self.engines)
        return Facts(engine, dead_s, len(self.streams.active), self.streams.capacity, engines, self.codecs)

    async def start(self, request: StartRequest) -> Session:
        """Start a stream in time for the caller. Nothing of it is left when this raises."""
        if self.draining:
            raise NotReady("this worker is shutting down")
        if not request.channels:
            # It could only be ended by hand, and in mode A nobody does.
            missing = Violation("subscribe_url", "is missing, and so is every other channel", "URLs of channels")
            raise InvalidRequest("the start request names no channel", (missing,))
        check_hosts(request, self.settings.channel_hosts)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                return await self.streams.start(request)
        except TimeoutError:
            raise NotReady(f"the stream could not be started within {START_DEADLINE_S} s") from None

    def resolve(self, name: str | None) -> str | None:
        """The id of the stream that callers know as ``name``: its id or one of its aliases; None stays None.

        Raises NoSuchStream, or StreamConflict where several are called so.
        """
        if name is None or name in self.streams.active:
            return name
        found = [stream_id for stream_id, each in self.streams.active.items() if name in each.request.aliases]
        if len(found) > 1:
            raise StreamConflict(f"streams {', '.join(found)} are all called {name!r}; name one by its own id")
        if not found:
            raise NoSuchStream(f"there is no stream {shortened(name)!r}")
        return found[0]


CONTEXT: web.AppKey[Context] = web.AppKey("context", Context)


async def read_body(request: web.Request) -> Any:
    """The request's JSON value, whatever its type says. Raises MalformedRequest, BodyTooSlow or BodyTooLarge."""
    try:
        async with asyncio.timeout(BODY_S):
            data = await request.read()
    except TimeoutError:
        raise BodyTooSlow(f"the body did not come within {BODY_S:g} s") from None
    except web.HTTPRequestEntityTooLarge:
        limit = request.app[CONTEXT].settings.body_limit_bytes
        raise BodyTooLarge(f"the body is larger than {limit} bytes") from None
    except (web.RequestPayloadError, ConnectionResetError) as exc:  # after the second nobody is there to be answered
        raise MalformedRequest(f"the body did not arrive whole: {exc}") from None
    if not data.strip():
        raise MalformedRequest("the body is empty; a JSON object is expected")
    return read_json(data)


def stream_header(request: web.Request) -> str | None:
    """Orchestrators name the stream in X-Stream-Id, when their caller named one."""
    return request.headers.get("X-Stream-Id", "").strip() or None
