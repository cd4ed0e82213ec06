"""The writing end of a channel: one POST per segment, the next one connected before it is needed.

An idle POST costs nothing and tells us at once when the channel ends. Indices rise by exactly one, under a lock: a
server discards what is posted to an index that was written before, and mixes two bodies posted to the same one.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Self

import aiohttp

from .connection import FAILURES, send
from .post import Post
from .wire import (
    MAX_LAG_SEGMENTS,
    UNREACHABLE,
    Backoff,
    ChannelClosed,
    ChannelError,
    channel_base,
    next_url,
    read_answer,
    segment_url,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublisherTiming:
    """Waits and bounds of the writing end; ``_s`` in seconds."""

    buffer_bytes: int = 1 << 20  # written and not yet taken by the socket, per segment: 2 s of 4 Mbit/s
    write_s: float = 5.0  # how long a full buffer may stay full before the segment is given up
    close_s: float = 5.0  # for the server to acknowledge a segment, and for all of them when the publisher ends
    request_s: float = 3.0  # for the short requests: DELETE, GET /next
    retry_first_s: float = 0.25  # after a failure before the first byte
    retry_max_s: float = 2.0
    delete_first_s: float = 0.1  # after a DELETE that failed
    delete_max_s: float = 1.0
    unreachable_s: float = 30.0  # of nothing but failures: the channel is over


@dataclass(slots=True)
class PublisherCounters:
    """What happened on the channel since the publisher was made."""

    segments: int = 0  # acknowledged by the server
    bytes: int = 0  # handed to the socket
    retries: int = 0  # POSTs repeated, nothing of them had been sent
    failed: int = 0  # segments given up, with or without bytes
    refused: int = 0  # POSTs answered before their body: somebody closed the segment


class OutgoingSegment:
    """A segment that is open for writing."""

    def __init__(self, post: Post) -> None:
        self._post = post

    @property
    def seq(self) -> int:
        return self._post.seq

    async def write(self, data: bytes) -> None:
        """Buffer ``data`` for the socket, which gets it at once when it is idle.

        Waits while the buffer is full. Raises ChannelError when this segment is lost, ChannelClosed when the channel
        is over.
        """
        await self._post.write(data)

    async def finish(self) -> None:
        """No more bytes follow. Does not wait for the server; a later ``close`` may."""
        self._post.end()

    async def close(self) -> None:
        """Returns when the server has acknowledged every byte. Raises as ``write`` does."""
        self._post.end()
        await self._post.publisher.end_post(self._post)
        self._post.check()

    async def abort(self) -> None:
        """Give the segment up: readers get what was sent, and its end."""
        if not self._post.task.done():
            await self._post.abandon(ChannelError(f"segment {self.seq} was aborted"))


class Publisher:
    """An async context manager. Leaving it ends open segments properly, within a deadline, and lets the idle POST go.

    ``closed`` is set when the channel is over, by whoever's doing; every call raises ChannelClosed from then on.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        *,
        content_type: str,
        resume: bool = False,
        timing: PublisherTiming | None = None,
    ) -> None:
        """``url``: of the channel. ``resume``: it may have segments already; go on after them."""
        self.url = url
        self.content_type = content_type
        self.timing = timing or PublisherTiming()
        self.counters = PublisherCounters()
        self.closed = asyncio.Event()
        self.closed_reason: str | None = None
        self.http = http
        self._resume = resume
        self._lock = asyncio.Lock()  # over the allocation of indices
        self._ahead: Post | None = None
        self._open: set[Post] = set()
        self._deleting: dict[int, asyncio.Task[None]] = {}  # by index: segments whose DELETE is repeated
        clock = asyncio.get_running_loop().time
        self.backoff = Backoff(self.timing.retry_first_s, self.timing.retry_max_s, self.timing.unreachable_s, clock)

    async def __aenter__(self) -> Self:
        seq = await self._write_head() if self._resume else 0
        if not self.closed.is_set():
            self._ahead = Post(self, seq, reset=self._resume)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End what is open. The channel itself stays, for its owner to end."""
        async with self._lock:
            ahead, self._ahead = self._ahead, None
            if self.closed_reason is None:
                self.closed_reason = "left"
        if ahead is not None:
            self._open.add(ahead)
        try:
            await asyncio.gather(*(self.end_post(post) for post in self._open))
        finally:
            for task in self._deleting.values():
                task.cancel()
            for post in self._open:
                await post.cancel()
            self._open.clear()
            if self._deleting:
                await asyncio.wait(self._deleting.values())

    async def end_post(self, post: Post) -> None:
        if post.untouched:
            await post.cancel()
            return
        post.end()
        await asyncio.wait({post.task}, timeout=self.timing.close_s)
        if not post.task.done():
            error = ChannelError(f"segment {post.seq} was not acknowledged within {self.timing.close_s:g} s")
            await post.abandon(error)

    async def open_segment(self) -> OutgoingSegment:
        """The next segment. The one after it is connected from here on."""
        async with self._lock:
            self._check()
            post = self._ahead
            if post is None:
                raise RuntimeError("a publisher is entered before it is used, and not used after it was left")
            post.owned = True
            self._ahead = Post(self, post.seq + 1)
        self._open = {other for other in self._open if not other.task.done()} | {post}
        return OutgoingSegment(post)

    async def publish(self, data: bytes) -> int:
        """One whole segment; returns its index once it has arrived. Raises ChannelError, ChannelClosed.

        A segment that the server closed under our hands is sent once more, in the next one.
        """
        try:
            return await self._publish(data)
        except ChannelClosed:
            raise
        except ChannelError as exc:
            logger.debug("%s: %s; sending it again", self.url, exc)
            return await self._publish(data)

    async def _publish(self, data: bytes) -> int:
        segment = await self.open_segment()
        await segment.write(data)
        await segment.close()
        return segment.seq

    async def delete(self) -> None:
        """End the channel for everybody: readers and the gateway learn at once that no more will come."""
        if self.closed_reason is None:
            self.closed_reason = "deleted"
        await self._request("DELETE", channel_base(self.url))
        await self.end("deleted")

    def _check(self) -> None:
        if self.closed_reason is not None:
            raise ChannelClosed(self.closed_reason)

    async def end(self, reason: str) -> None:
        """The channel is over: every writer learns it. For its posts to say; others `delete` it, or leave."""
        if self.closed_reason is None:
            self.closed_reason = reason
            logger.debug("%s: the channel is over: %s", self.url, reason)
        self.closed.set()
        for post in {*self._open, *([] if self._ahead is None else [self._ahead])}:
            if not post.task.done():
                post.fail(ChannelClosed(self.closed_reason))
            if post.task is not asyncio.current_task():
                post.task.cancel()

    async def _write_head(self) -> int:
        """Where a publisher before us left off."""
        while True:
            response = await self._request("GET", next_url(self.url))
            if response is not None:
                answer = read_answer(response.status, response.headers)
                if answer.over is not None:
                    await self.end(answer.over)
                    return 0
                if answer.latest is not None:
                    self.backoff.succeeded()
                    return answer.latest
            wait_s = self.backoff.failed()
            if wait_s is None:
                await self.end(UNREACHABLE)
                return 0
            await asyncio.sleep(wait_s)

    async def delete_segment(self, seq: int) -> None:
        """Release the readers of a segment that was given up. One try takes the caller's time, the others do not."""
        done = False
        try:
            done = await self._delete(seq)
        finally:  # a caller that has no more time for it leaves the segment as open as a failure does
            if not done and seq not in self._deleting and not self._released(seq):
                task = asyncio.create_task(self._keep_deleting(seq), name=f"trickle DELETE {seq}")
                self._deleting[seq] = task
                task.add_done_callback(lambda _: self._deleting.pop(seq))

    async def _keep_deleting(self, seq: int) -> None:
        """Until the server answers. Its readers would hang until the ring drops the segment: with an event in ten
        seconds, for longer than a gateway waits for one."""
        wait_s = self.timing.delete_first_s
        while True:
            await asyncio.sleep(wait_s)
            if self._released(seq) or await self._delete(seq):
                return
            wait_s = min(wait_s * 2, self.timing.delete_max_s)

    async def _delete(self, seq: int) -> bool:
        """Whether the server has heard it: a proxy in front of it that says it is away has not."""
        answer = await self._request("DELETE", segment_url(self.url, seq))
        return answer is not None and answer.status < 500

    def _released(self, seq: int) -> bool:
        """Nobody waits for this segment's end any more: all is over, or a later one takes its place in the ring."""
        return self.closed_reason is not None or self._ahead is None or self._ahead.seq - seq >= MAX_LAG_SEGMENTS

    async def _request(self, method: str, url: str) -> aiohttp.ClientResponse | None:
        """A short request; None when it failed. What became of it shows in the channel's further life."""
        try:
            async with asyncio.timeout(self.timing.request_s):
                response = await send(self.http, method, url)
                await response.read()
                return response
        except FAILURES as exc:
            logger.debug("%s %s: %s", method, url, exc)
            return None
