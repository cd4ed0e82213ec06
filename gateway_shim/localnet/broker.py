"""A trickle server that behaves as an orchestrator's does, for demo and tests.

Behaviour: go-livepeer trickle/trickle_server.go. It relays bytes by reference while they arrive: a chunk is received
once and written to each reader, nothing is joined or kept twice. ``Broker`` stands alone on a port of its own, or is
added to another application at the same origin (``add_to``), as an orchestrator serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from aiohttp import web
from aiohttp.http import HttpProcessingError

from ..trickle.wire import (
    HEADER_CLOSED,
    HEADER_EXPECT_CONTENT,
    HEADER_LATEST,
    HEADER_RESET,
    HEADER_SEQ,
    SEQ_CURRENT,
    SEQ_NEXT,
    STATUS_OUTSIDE_WINDOW,
)
from .channel import Channel, Segment
from .faults import Dropped, Fault, Faults

BASE_PATH = "/ai/trickle"
LINGER_S = 0.5  # net/http, rstAvoidanceDelay
_INDEX = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# What reading a request body raises when the client is gone or does not speak HTTP.
_BODY_FAILURES = (OSError, web.RequestPayloadError, HttpProcessingError)


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
        self._waiting: dict[int, Segment] = {}  # those of them that have nothing to send at the moment
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
            _reset(request)
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
            for key, segment in list(self._waiting.items()):
                if _gone(self._open[key]):
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
                    return _text(404, "Stream not found")
                self.create(name, request.headers.get(HEADER_EXPECT_CONTENT, ""))
            return web.Response()
        if request.method == "DELETE":
            return web.Response() if await self.delete(name) else _text(400, "Invalid stream")
        return _not_allowed(request, "DELETE", "POST")

    async def _on_segment(self, request: web.Request) -> web.StreamResponse:
        handlers = {"GET": self._get, "POST": self._post, "DELETE": self._delete_segment}
        if request.method not in handlers:
            return _not_allowed(request, *handlers)
        name, index = request.match_info["name"], request.match_info["seq"]
        if request.method == "POST" and name not in self._channels and self._auto_create:
            self.create(name, request.headers.get("Content-Type", ""))
        channel = self._channels.get(name)
        if channel is None:
            response = _text(404, "Stream not found")
            return await _answer_early(request, response) if request.method == "POST" else response
        if request.method == "GET" and index == "next":
            return self._next(channel)
        if not _INDEX.fullmatch(index):
            response = _text(400, "Invalid idx")
            return await _answer_early(request, response) if request.method == "POST" else response
        self._open[id(request)] = request
        try:
            return await handlers[request.method](request, channel, int(index))
        except Dropped:
            _reset(request)
            return web.Response()
        finally:
            del self._open[id(request)]
            channel.changed.fire()

    async def _on_other_path(self, request: web.Request) -> web.StreamResponse:
        cleaned = re.sub("/{2,}", "/", request.raw_path)
        if cleaned != request.raw_path:
            return web.Response(status=307, headers={"Location": cleaned})
        return _text(404, "404 page not found")

    def _next(self, channel: Channel) -> web.Response:
        channel.counters.nexts += 1
        seq = str(channel.next_write)
        fault = self.faults.take("GET", f"{channel.name}/next", channel.next_write)
        if fault is not None and fault.kind == "answer":
            return _text(fault.status, "as ordered")
        return web.Response(text=seq, headers={HEADER_LATEST: seq})

    async def _delete_segment(self, request: web.Request, channel: Channel, seq: int) -> web.StreamResponse:
        segment = channel.segment(seq)
        if segment is None:
            return _text(400, "Nonexistent segment")
        channel.counters.deletes += 1
        segment.close()
        return web.Response()

    async def _get(self, request: web.Request, channel: Channel, seq: int) -> web.StreamResponse:
        if seq < SEQ_CURRENT:
            raise Dropped  # upstream's handler panics
        channel.counters.gets += 1
        latest = channel.next_write
        segment = channel.for_reading(seq)
        if segment is None:
            channel.counters.outside_window += 1
            return _text(STATUS_OUTSIDE_WINDOW, "Entry not found", {HEADER_LATEST: str(latest), HEADER_SEQ: str(seq)})
        fault = self.faults.take("GET", channel.name, segment.seq)
        if fault is not None and fault.kind == "answer":
            return _text(fault.status, "as ordered")
        with _at_work(request, channel, segment):
            return await self._relay(request, channel, segment, latest, fault)

    async def _relay(
        self, request: web.Request, channel: Channel, segment: Segment, latest: int, fault: Fault | None
    ) -> web.StreamResponse:
        """Send the segment from its first byte to its end. Headers go out with the first byte, not before."""
        headers = {HEADER_SEQ: str(segment.seq), "Content-Type": channel.mime or "application/octet-stream"}
        if segment.seq != latest:
            headers[HEADER_LATEST] = str(latest)
        response = web.StreamResponse(headers=headers)
        if fault is not None:
            await fault.begin()
        sent = 0  # chunks
        try:
            while not _gone(request):
                if sent < len(segment.chunks):
                    if not response.prepared:
                        await response.prepare(request)
                    data = segment.chunks[sent]
                    sent += 1
                    if fault is None:
                        await response.write(data)
                    else:
                        async for part in fault.through(data):
                            await response.write(part)
                    channel.counters.bytes_out += len(data)
                elif segment.closed:
                    break
                else:
                    self._waiting[id(request)] = segment
                    await segment.changed.wait()
        except ConnectionError as exc:
            if isinstance(exc, Dropped):
                raise
        finally:
            self._waiting.pop(id(request), None)
        if response.prepared:
            return response
        # Nothing was ever written: the channel ended, the segment was deleted or pushed out of the ring, or is empty.
        headers = {HEADER_SEQ: str(segment.seq), HEADER_LATEST: str(channel.next_write)}
        if channel.closed:
            headers[HEADER_CLOSED] = "terminated"
        return web.Response(headers=headers)

    async def _post(self, request: web.Request, channel: Channel, seq: int) -> web.StreamResponse:
        if seq < SEQ_NEXT:
            raise Dropped  # upstream's handler panics
        channel.counters.posts += 1
        segment = channel.for_writing(seq)
        fault = self.faults.take("POST", channel.name, segment.seq)
        if fault is not None and fault.kind == "answer":
            return await _answer_early(request, _text(fault.status, "as ordered"))
        if HEADER_RESET in request.headers:
            channel.reset(segment.seq)
        with _at_work(request, channel, segment):
            return await self._receive(request, channel, segment, fault)

    async def _receive(
        self, request: web.Request, channel: Channel, segment: Segment, fault: Fault | None
    ) -> web.StreamResponse:
        """Take the body in. A client that leaves half way leaves the segment open, as upstream."""
        clock = asyncio.get_running_loop().time
        headers = {HEADER_SEQ: str(segment.seq)}
        try:
            if fault is not None:
                await fault.begin()
            data = await self._first_bytes(request, channel, segment)
            channel.started(segment.seq, clock())
            if data is None:
                channel.counters.refused_posts += segment.closed
                channel.changed.fire()
                segment.close()
                if channel.closed:
                    headers[HEADER_CLOSED] = "terminated"
                return await _answer_early(request, web.Response(headers=headers))
            channel.counters.segments += 1
            while data:
                if fault is None:
                    self._take_in(channel, segment, data)
                else:
                    async for part in fault.through(data):
                        self._take_in(channel, segment, part)
                data = await request.content.readany()
        except Dropped:
            channel.counters.aborted_posts += 1
            raise
        except _BODY_FAILURES:
            channel.counters.aborted_posts += 1
            return _text(500, "Server error")
        segment.close()
        return web.Response(headers=headers)

    def _take_in(self, channel: Channel, segment: Segment, data: bytes) -> None:
        channel.counters.bytes_in += len(data)
        if not segment.write(data):
            channel.counters.discarded_bytes += len(data)
        channel.changed.fire()

    async def _first_bytes(self, request: web.Request, channel: Channel, segment: Segment) -> bytes | None:
        """None when there are none: the body ended, or the segment was closed by somebody else."""
        body = asyncio.create_task(request.content.readany(), name="trickle first byte")
        closed = asyncio.create_task(_closed(segment), name="trickle segment closed")
        try:
            while True:
                done, _ = await asyncio.wait(
                    {body, closed}, timeout=self._timing.keepalive_s, return_when=asyncio.FIRST_COMPLETED
                )
                if closed in done:
                    return None
                if body in done:
                    return body.result() or None
                await request.writer.write(_CONTINUE)
                request.writer.output_size = 0  # an interim answer is not the response
                channel.counters.continues += 1
                channel.changed.fire()
        finally:
            for task in (body, closed):
                task.cancel()
            await asyncio.wait({body, closed})
            if not body.cancelled():
                body.exception()


async def _closed(segment: Segment) -> None:
    while not segment.closed:
        await segment.changed.wait()


@contextlib.contextmanager
def _at_work(request: web.Request, channel: Channel, segment: Segment) -> Iterator[None]:
    segment.at_work[request.method] += 1
    channel.changed.fire()
    try:
        yield
    finally:
        segment.at_work[request.method] -= 1
        channel.changed.fire()


async def _answer_early(request: web.Request, response: web.Response) -> web.Response:
    """Answer a request whose body may not have ended, and end its connection.

    The rest of the body is read for a moment, since closing on unread bytes resets the connection, and the reset may
    overtake the answer. aiohttp would do the same for 10 s, whether or not the client is still there.
    """
    response.force_close()
    try:
        await response.prepare(request)
        await response.write_eof()
        async with asyncio.timeout(LINGER_S):
            while not request.content.at_eof():
                await request.content.readany()
    except (TimeoutError, *_BODY_FAILURES):
        pass
    if not request.content.at_eof():
        request.protocol.force_close()
    return response


def _gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _reset(request: web.Request) -> None:
    """Drop the connection with a RST, unanswered."""
    transport = request.transport
    if transport is None:
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _text(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers=headers)


def _not_allowed(request: web.Request, *allowed: str) -> web.Response:
    return web.Response(status=405, headers={"Allow": ", ".join(sorted(allowed))})
