"""The requests for one segment: a POST writes it, each GET is sent what is written, as it comes.

Behaviour: go-livepeer trickle/trickle_server.go. A chunk is received once and written to each reader.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from aiohttp import web

from ..trickle.wire import (
    HEADER_CLOSED,
    HEADER_LATEST,
    HEADER_RESET,
    HEADER_SEQ,
    SEQ_CURRENT,
    SEQ_NEXT,
    STATUS_OUTSIDE_WINDOW,
)
from .answers import BODY_FAILURES, answer_early, gone, text
from .channel import Channel, Segment
from .faults import Dropped, Fault, Faults

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Relay:
    """Serves what is asked of a segment. Raises Dropped where the connection has to be reset."""

    def __init__(self, faults: Faults, keepalive_s: float) -> None:
        """``keepalive_s``: between the 100 Continue answers to a POST without a first byte."""
        self.waiting: dict[int, Segment] = {}  # by id of the request: what those GETs that have nothing to send read
        self._faults = faults
        self._keepalive_s = keepalive_s

    def next(self, channel: Channel) -> web.Response:
        channel.counters.nexts += 1
        seq = str(channel.next_write)
        fault = self._faults.take("GET", f"{channel.name}/next", channel.next_write)
        if fault is not None and fault.kind == "answer":
            return text(fault.status, "as ordered")
        return web.Response(text=seq, headers={HEADER_LATEST: seq})

    async def delete(self, request: web.Request, channel: Channel, seq: int) -> web.StreamResponse:
        segment = channel.segment(seq)
        if segment is None:
            return text(400, "Nonexistent segment")
        channel.counters.deletes += 1
        segment.close()
        return web.Response()

    async def get(self, request: web.Request, channel: Channel, seq: int) -> web.StreamResponse:
        if seq < SEQ_CURRENT:
            raise Dropped  # upstream's handler panics
        channel.counters.gets += 1
        latest = channel.next_write
        segment = channel.for_reading(seq)
        if segment is None:
            channel.counters.outside_window += 1
            return text(STATUS_OUTSIDE_WINDOW, "Entry not found", {HEADER_LATEST: str(latest), HEADER_SEQ: str(seq)})
        fault = self._faults.take("GET", channel.name, segment.seq)
        if fault is not None and fault.kind == "answer":
            return text(fault.status, "as ordered")
        with _at_work(request, channel, segment):
            return await self._send(request, channel, segment, latest, fault)

    async def _send(
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
            while not gone(request):
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
                    self.waiting[id(request)] = segment
                    await segment.changed.wait()
        except ConnectionError as exc:
            if isinstance(exc, Dropped):
                raise
        finally:
            self.waiting.pop(id(request), None)
        if response.prepared:
            return response
        # Nothing was ever written: the channel ended, the segment was deleted or pushed out of the ring, or is empty.
        headers = {HEADER_SEQ: str(segment.seq), HEADER_LATEST: str(channel.next_write)}
        if channel.closed:
            headers[HEADER_CLOSED] = "terminated"
        return web.Response(headers=headers)

    async def post(self, request: web.Request, channel: Channel, seq: int) -> web.StreamResponse:
        if seq < SEQ_NEXT:
            raise Dropped  # upstream's handler panics
        channel.counters.posts += 1
        segment = channel.for_writing(seq)
        fault = self._faults.take("POST", channel.name, segment.seq)
        if fault is not None and fault.kind == "answer":
            return await answer_early(request, text(fault.status, "as ordered"))
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
                return await answer_early(request, web.Response(headers=headers))
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
        except BODY_FAILURES:
            channel.counters.aborted_posts += 1
            return text(500, "Server error")
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
                    {body, closed}, timeout=self._keepalive_s, return_when=asyncio.FIRST_COMPLETED
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
