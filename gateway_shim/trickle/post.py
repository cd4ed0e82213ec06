"""One segment on its way to the server: a bounded buffer, and the POST that empties it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Self

from .connection import FAILURES, send
from .wire import HEADER_RESET, UNREACHABLE, ChannelClosed, ChannelError, read_answer, segment_url

if TYPE_CHECKING:
    from .publisher import Publisher

logger = logging.getLogger(__name__)


class _Body:
    """Request body of one attempt to post: what is written, as soon as it is written.

    Not a generator: an attempt that fails would leave it suspended, to be ended by the garbage collector.
    """

    def __init__(self, post: Post) -> None:
        self.begun = False  # the connection stands and the headers are on their way
        self.exhausted = False  # every byte is in the socket, and the end with it
        self._post = post

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if not self.begun:
            # aiohttp sends the headers with the first chunk, not before; without them the server knows nothing of us.
            self.begun = True
            return b""
        data = await self._post.take()
        if not data:
            self.exhausted = True
            raise StopAsyncIteration
        return data


class Post:
    """One segment on its way: a bounded buffer, and the task that posts it."""

    def __init__(self, publisher: Publisher, seq: int, *, reset: bool = False) -> None:
        self.seq = seq
        self.owned = False  # by a writer; until then the index may move on
        self.sent = False  # bytes were handed to the socket
        self.error: ChannelError | None = None  # why this segment, or the whole channel, is over
        self.publisher = publisher
        self._reset = reset
        self._buffer: deque[bytes] = deque()
        self._buffered = 0
        self._ended = False  # no more bytes will be written
        self._wanted = asyncio.Event()  # there is something to take: bytes, or the end
        self._freed = asyncio.Event()  # the buffer was emptied, or nothing will
        self.task = asyncio.create_task(self._run(), name=f"trickle POST {seq}")

    @property
    def untouched(self) -> bool:
        return not (self.sent or self._buffer or self._ended)

    async def write(self, data: bytes) -> None:
        if self._ended:
            raise RuntimeError(f"segment {self.seq} is finished")
        if not self._has_room(data):
            await self._room_for(data)
        if self.error is None and data:
            self._buffer.append(data)
            self._buffered += len(data)
            self._wanted.set()
        self.check()

    def _has_room(self, data: bytes) -> bool:
        full = self._buffered and self._buffered + len(data) > self.publisher.timing.buffer_bytes
        return not full or self.error is not None

    async def _room_for(self, data: bytes) -> None:
        write_s = self.publisher.timing.write_s
        try:
            async with asyncio.timeout(write_s):
                while not self._has_room(data):
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            await self.abandon(ChannelError(f"segment {self.seq}: the server took nothing for {write_s:g} s"))

    def check(self) -> None:
        """Raises what went wrong."""
        if self.error is not None:
            raise self.error
        if self.task.done():
            self.task.result()

    def end(self) -> None:
        self._ended = True
        self._wanted.set()

    async def abandon(self, error: ChannelError) -> None:
        """Give the segment up and tell the server, so that its readers do not wait for the rest."""
        self.fail(error)
        await self.cancel()
        await self.publisher.delete_segment(self.seq)

    async def cancel(self) -> None:
        """Drop the connection. What was not begun leaves no trace at the server."""
        self.task.cancel()
        await asyncio.wait({self.task})

    def fail(self, error: ChannelError) -> None:
        """Writers raise ``error`` from here on."""
        if self.error is None:
            self.error = error
            if not isinstance(error, ChannelClosed):
                self.publisher.counters.failed += 1
        self._freed.set()

    async def take(self) -> bytes:
        """All that is buffered, as soon as there is something; nothing at the end."""
        while not self._buffer and not self._ended:
            self._wanted.clear()
            await self._wanted.wait()
        if not self._buffer:
            return b""
        data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        self._buffer.clear()
        self._buffered = 0
        self._freed.set()
        self.sent = True
        self.publisher.counters.bytes += len(data)
        return data

    async def _run(self) -> None:
        """Post until the segment is through, given up, or the channel over."""
        publisher = self.publisher
        clock = asyncio.get_running_loop().time
        while True:
            body = _Body(self)
            began_at = clock()
            try:
                failure = await self._attempt(body)
            except FAILURES as exc:
                failure = f"{type(exc).__name__}: {exc}"
                if body.begun and clock() - began_at > publisher.timing.retry_max_s:
                    publisher.backoff.succeeded()  # the server was there, for a while
            if failure is None:
                return
            logger.debug("%s: segment %d: %s", publisher.url, self.seq, failure)
            if self.sent:
                self.fail(ChannelError(f"segment {self.seq} was cut off: {failure}"))
                await publisher.delete_segment(self.seq)
                return
            wait_s = publisher.backoff.failed()
            if wait_s is None:
                await publisher.end(UNREACHABLE)
                return
            publisher.counters.retries += 1
            await asyncio.sleep(wait_s)

    async def _attempt(self, body: _Body) -> str | None:
        """One POST. Returns what went wrong, or None when there is nothing left to do for this segment."""
        publisher = self.publisher
        headers = {"Content-Type": publisher.content_type}
        if self._reset:
            headers[HEADER_RESET] = "1"
        response = await send(
            publisher.http, "POST", segment_url(publisher.url, self.seq), data=body, headers=headers
        )
        # An answer may come before the end of the body; closing then ends the connection, and the body with it.
        whole = body.exhausted
        answer = read_answer(response.status, response.headers)
        try:
            if whole:
                await response.read()  # leaves the connection to the next segment
        finally:
            response.close()
        if answer.over is not None:
            await publisher.end(answer.over)
            return None
        if answer.status != 200:
            return f"status {answer.status}"
        publisher.backoff.succeeded()
        if whole:
            publisher.counters.segments += 1
            return None
        publisher.counters.refused += 1
        if self.owned:
            self.fail(ChannelError(f"segment {self.seq} was closed by the server"))
            return None
        # Nobody writes here yet: the index is used up, so the POST that waits takes the following one.
        self.seq += 1
        return "closed before the first byte"
