"""A trickle server that behaves as an orchestrator's does, for demo and tests.

Behaviour: go-livepeer trickle/trickle_server.go. It relays bytes by reference while they arrive: a chunk is received
once and written to each reader, nothing is joined or kept twice. ``Broker`` stands alone on a port of its own, or is
added to another application at the same origin (``add_to``), as an orchestrator serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from aiohttp import web

from ..trickle.wire import HEADER_EXPECT_CONTENT
from .answers import answer_early, gone, not_allowed, reset, text
from .channel import Channel, Segment
from .faults import Dropped, Faults
from .relay import Relay

BASE_PATH = "/ai/trickle"
_INDEX = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class BrokerTiming:
    """Waits of the server, in seconds. The defaults are those of go-livepeer."""

    keepalive_s: float = 10.0  # between the 100 Continue answers to a POST without a first byte
    idle_s: float = 300.0  # a channel on which no segment starts for so long is closed
    sweep_s: float = 60.0  # between two looks for idle channels
    presence_s: float = 0.5  # how soon a reader that hung up is noticed while there is nothing to send it


class Broker:
    """Channels by name, and the HTTP in front of them.

    ``async with Broker() as broker`` serves on 127.0.0.1. ``add_to`` serves it within another application; ``origin``
    must then be set to where that is reachable before URLs are asked for.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        auto_create: bool = False,
        timing: BrokerTiming | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``auto_create``: a POST to an unknown channel creates it; orchestrators do not allow that."""
        self.origin = ""
        self.faults = Faults()
        self._host, self._port, self._tls = host, port, tls
        self._auto_create = auto_create
        self._timing = timing or BrokerTiming()
        self._channels: dict[str, Channel] = {}
        self._open: dict[int, web.Request] = {}  # by id: requests cannot be hashed
        self._relay = Relay(self.faults, self._timing.keepalive_s)
        self._runner: web.AppRunner | None = None

    # Channels

    @property
    def url(self) -> str:
        """Of the server, without a trailing slash; a channel's name follows after one."""
        return self.origin + BASE_PATH

    @property
    def channels(self) -> Mapping[str, Channel]:
        return MappingProxyType(self._channels)

    def create(self, name: str, mime: str = "application/octet-stream") -> str:
        """Returns the channel's URL. A channel that exists stays as it is."""
        if name not in self._channels:
            now = asyncio.get_running_loop().time()
            self._channels[name] = Channel(name, mime, now)
        return f"{self.url}/{name}"

    async def delete(self, name: str) -> bool:
        """End a channel as its owner does: pending requests are released, later ones are answered 404."""
        channel = self._channels.pop(name, None)
        if channel is not None:
            channel.close()
        return channel is not None

    async def restart(self, *, memory: bool = False) -> None:
        """Lose every connection, and without ``memory`` every channel, as a server that crashed and came back."""
        channels: dict[str, Channel] = {}
        if not memory:
            channels, self._channels = self._channels, {}
        for request in list(self._open.values()):
            reset(request)
        for channel in channels.values():
            channel.close()

    async def wait_for_segment(self, name: str, seq: int) -> Segment:
        """Until the segment is complete. Raises LookupError when it fell out of the ring before, or the channel
        ended: ask before publishing."""
        channel = self._channels[name]

        def settled(channel: Channel) -> bool:
            segment = channel.segment(seq)
            return channel.next_write > seq and (segment is None or segment.closed)

        await channel.wait_for(settled)
        segment = channel.segment(seq)
        if segment is None:
            raise LookupError(f"segment {seq} of {name} is no longer held")
        return segment

    async def wait_for_reader(self, name: str, seq: int) -> None:
        """Until a GET is at work on the segment."""
        await self._channels[name].wait_for(lambda channel: channel.at_work("GET", seq) > 0)

    async def wait_for_writer(self, name: str, seq: int) -> None:
        """Until a POST is at work on the segment, with bytes or idle."""
        await self._channels[name].wait_for(lambda channel: channel.at_work("POST", seq) > 0)

    # Life

    async def __aenter__(self) -> Self:
        app = web.Application()
        self.add_to(app)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, ssl_context=self._tls)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.origin = f"{'http' if self._tls is None else 'https'}://{host}:{port}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def routes(self) -> list[web.RouteDef]:
        """For an application that looks after ``running`` itself."""
        return [
            web.route("*", BASE_PATH + "/{name}", self._on_channel),
            web.route("*", BASE_PATH + "/{name}/{seq}", self._on_segment),
            web.route("*", BASE_PATH + "/{rest:.*}", self._on_other_path),
        ]

    def add_to(self, app: web.Application) -> None:
        """Serve within ``app``; its shutdown ends all channels."""

        async def close_channels(_: web.Application) -> None:
            self._close_channels()

        async def running(_: web.Application) -> AsyncIterator[None]:
            async with self.running():
                yield

        app.add_routes(self.routes())
        app.on_shutdown.append(close_channels)  # before the server waits for its handlers to end
        app.cleanup_ctx.append(running)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What has to be done in the background: idle channels, readers that hung up."""
        task = asyncio.create_task(self._keep_house(), name="trickle broker")
        try:
            yield
        finally:
            self._close_channels()
            task.cancel()
            await asyncio.wait({task})

    def _close_channels(self) -> None:
        self.faults.clear()
        while self._channels:
            _, channel = self._channels.popitem()
            channel.close()

    async def _keep_house(self) -> None:
        clock = asyncio.get_running_loop().time
        sweep_at = clock() + self._timing.sweep_s
        while True:
            await asyncio.sleep(min(self._timing.presence_s, self._timing.sweep_s))
            for key, segment in list(self._relay.waiting.items()):
                if gone(self._open[key]):
                    segment.changed.fire()
            if clock() >= sweep_at:
                sweep_at = clock() + self._timing.sweep_s
                for name, channel in list(self._channels.items()):
                    if not name.startswith("_") and clock() - channel.written_at > self._timing.idle_s:
                        await self.delete(name)

    # HTTP

    async def _on_channel(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if request.method == "POST":
            if name not in self._channels:
                if not self._auto_create:
                    return text(404, "Stream not found")
                self.create(name, request.headers.get(HEADER_EXPECT_CONTENT, ""))
            return web.Response()
        if request.method == "DELETE":
            return web.Response() if await self.delete(name) else text(400, "Invalid stream")
        return not_allowed("DELETE", "POST")

    async def _on_segment(self, request: web.Request) -> web.StreamResponse:
        handlers = {"GET": self._relay.get, "POST": self._relay.post, "DELETE": self._relay.delete}
        if request.method not in handlers:
            return not_allowed(*handlers)
        name, index = request.match_info["name"], request.match_info["seq"]
        if request.method == "POST" and name not in self._channels and self._auto_create:
            self.create(name, request.headers.get("Content-Type", ""))
        channel = self._channels.get(name)
        if channel is None:
            response = text(404, "Stream not found")
            return await answer_early(request, response) if request.method == "POST" else response
        if request.method == "GET" and index == "next":
            return self._relay.next(channel)
        if not _INDEX.fullmatch(index):
            response = text(400, "Invalid idx")
            return await answer_early(request, response) if request.method == "POST" else response
        self._open[id(request)] = request
        try:
            return await handlers[request.method](request, channel, int(index))
        except Dropped:
            reset(request)
            return web.Response()
        finally:
            del self._open[id(request)]
            channel.changed.fire()

    async def _on_other_path(self, request: web.Request) -> web.StreamResponse:
        cleaned = re.sub("/{2,}", "/", request.raw_path)
        if cleaned != request.raw_path:
            return web.Response(status=307, headers={"Location": cleaned})
        return text(404, "404 page not found")
