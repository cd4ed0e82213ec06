"""The reading end of a channel: segments in order, bytes as they come, whatever the network does.

While a segment is read, the next one is requested already: its bytes then arrive without a round trip in between. A
response is never waited for blindly. Silence is looked into (``GET /next``), and what was abandoned is skipped. Nor
is anything asked for again and again without a pause: a server may answer at once for ever, and with nothing new.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Self

import aiohttp

from .connection import FAILURES, connected, send
from .wire import (
    MAX_LAG_SEGMENTS,
    SEQ_CURRENT,
    SEQ_NEXT,
    STATUS_OUTSIDE_WINDOW,
    Answer,
    Backoff,
    ChannelClosed,
    SegmentTooLarge,
    next_url,
    read_answer,
    segment_url,
)

logger = logging.getLogger(__name__)

# Answers in a row without a byte that are followed by the next request at once: a reader that lags meets at most a
# whole window of empty segments, and one 470 behind it.
MAX_BARREN = MAX_LAG_SEGMENTS + 1


_NO_NEWS = Answer(status=0, seq=None, latest=None, closed=False)


@dataclass(frozen=True, slots=True)
class SubscriberTiming:
    """Waits of the reading end, in seconds."""

    refresh_s: float = 20.0  # silence after which a GET is repeated: a proxy may have forgotten the connection
    silence_s: float = 1.0  # silence after which we ask whether the segment has a successor; doubles to silence_max_s
    silence_max_s: float = 4.0
    reposition_s: float = 0.25  # until a segment that the server does not know yet is asked for again; see MAX_BARREN
    behind_s: float = 2.0  # a write head that stays behind us for so long was set back by a publisher's restart
    retry_first_s: float = 0.25  # after a reset or a 5xx
    retry_max_s: float = 2.0
    unreachable_s: float = 30.0  # of nothing but failures: the channel is over


@dataclass(slots=True)
class SubscriberCounters:
    """What happened on the channel since the subscriber was made."""

    segments: int = 0  # handed to the reader, with bytes
    bytes: int = 0
    gaps: int = 0  # segments handed out that do not continue the one before
    empty: int = 0  # answered without bytes: empty, deleted, or pushed out of the window
    outside_window: int = 0  # answered 470
    retries: int = 0  # requests that failed and were repeated
    resumed: int = 0  # segments continued over another connection
    abandoned: int = 0  # segments skipped because nobody was writing them any more
    refreshes: int = 0  # silent GETs repeated


class _Abandoned(Exception):
    """The segment has a successor and nothing comes."""


class _SetBack(Exception):
    """A publisher began again far before the segment: ``latest`` is written next."""

    def __init__(self, latest: int) -> None:
        super().__init__(latest)
        self.latest = latest


@dataclass(slots=True)
class _Opened:
    seq: int
    response: aiohttp.ClientResponse
    gap: bool  # not the segment that was to come next


class Segment:
    """One segment while it arrives: iterate over its bytes. Ends quietly whatever the reason; see ``complete``."""

    def __init__(self, subscriber: Subscriber, opened: _Opened, gap: bool) -> None:
        self.seq = opened.seq
        self.gap = gap  # bytes between the segment before and this one are missing
        self.complete = False  # the server ended it, and all of it was read
        self._subscriber = subscriber
        self._response: aiohttp.ClientResponse | None = opened.response
        self._received = 0  # bytes handed out
        self._received_at = subscriber._clock()
        self._skip = 0  # bytes that a repeated response begins with and that were handed out before
        self._doubted = False  # asked for again because it was silent beside its successor
        self._backoff = subscriber._backoff()  # between requests that bring nothing new
        self._resumed_at: float | None = None  # the last such request; None: a byte has come since

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """At least one byte; as many as have arrived."""
        while self._response is not None:
            data = await self._receive(self._response)
            if self._skip:
                known = min(self._skip, len(data))
                self._skip -= known
                data = data[known:]
            if data:
                self._doubted = False
                self._backoff.succeeded()
                self._resumed_at = None
                self._subscriber._barren = 0
                self._received += len(data)
                self._received_at = self._subscriber._clock()
                self._subscriber.counters.bytes += len(data)
                return data
        if not self._received:
            self._subscriber._barren += 1
        raise StopAsyncIteration

    async def read(self, limit: int) -> bytes:
        """All of it. Raises SegmentTooLarge, and lets the rest go, when that is more than ``limit`` bytes."""
        parts, size = [], 0
        async for data in self:
            size += len(data)
            if size > limit:
                self.close()
                raise SegmentTooLarge(f"segment {self.seq} has more than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    def close(self) -> None:
        """Stop reading. Nothing happens when it has ended."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _is_arriving(self) -> bool:
        """Bytes came lately and the end did not."""
        silent_s = self._subscriber._clock() - self._received_at
        return self._response is not None and silent_s < self._subscriber.timing.silence_s

    async def _receive(self, response: aiohttp.ClientResponse) -> bytes:
        """The next bytes of the body, or none: look at ``_response`` then."""
        timing = self._subscriber.timing
        patience_s = timing.reposition_s if self._doubted else timing.silence_s
        silent_s = 0.0
        while True:
            try:
                data = response.content.read_nowait()
                if not data:  # nothing is here yet, or it is the end: no timer for what came while we were busy
                    async with asyncio.timeout(patience_s):
                        data = await response.content.readany()
            except TimeoutError:
                silent_s += patience_s
                if self._subscriber._successor_arrived():
                    if self._doubted:
                        self._subscriber.counters.abandoned += 1
                        self.close()
                        return b""
                    # Either nobody writes it any more, or this connection alone is stuck: another one tells at once.
                    self._doubted = True
                    await self._resume()
                    return b""
                if silent_s < timing.refresh_s:
                    continue
                self._subscriber.counters.refreshes += 1
            except FAILURES as exc:
                logger.debug("%s: segment %d: %s", self._subscriber.url, self.seq, exc)
                self._subscriber.counters.retries += 1
            else:
                if not data:
                    self.complete = self._skip == 0
                    self.close()
                return data
            await self._resume()
            return b""

    async def _resume(self) -> None:
        """Ask for the segment again: the server sends it from its first byte as long as it is in the window.

        At once, when new bytes came since it was last done; else after a pause, and not for ever: a body may be cut
        at the same byte each time. ``_response`` is None when the segment is over, and stays what it was when this is
        cancelled in the pause.
        """
        clock, timing = self._subscriber._clock, self._subscriber.timing
        if self._resumed_at is not None and clock() - self._resumed_at > timing.retry_max_s:
            self._backoff.succeeded()  # the connection lasted for a while: whatever ends it now is another failure
        elif self._resumed_at is not None:
            wait_s = self._backoff.failed()
            if wait_s is None:
                logger.debug("%s: segment %d ends at byte %d", self._subscriber.url, self.seq, self._received)
                self.close()
                return
            await asyncio.sleep(wait_s)
            if self._response is None:  # closed meanwhile
                return
        self.close()
        self._response = await self._subscriber._reopen(self.seq)
        self._resumed_at = clock()
        self._skip = self._received
        if self._response is not None:
            self._subscriber.counters.resumed += 1


class Subscriber:
    """Iterate over it for segments, until the channel is over; ``closed_reason`` then says why.

    One reader at a time. A segment that was not read to its end is closed when the next one is asked for. Cancelling
    the iteration loses nothing: it can be taken up again.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        *,
        start: int = SEQ_CURRENT,
        oldest_first: bool = False,
        timing: SubscriberTiming | None = None,
    ) -> None:
        """``url``: of the channel. ``start``: the first segment, or SEQ_CURRENT, or SEQ_NEXT.

        ``oldest_first``: a reader that fell behind goes on at the oldest segment that the server may still have, not
        at the live edge. For a channel whose last segment counts, however late it is read.
        """
        segment_url(url, start)  # refuses an index that the server would answer by dropping the connection
        self.url = url
        self.timing = timing or SubscriberTiming()
        self.counters = SubscriberCounters()
        self.closed_reason: str | None = None
        self._http = http
        self._ahead: asyncio.Task[_Opened | str] | None = None  # request of the segment after the current one
        self._current: Segment | None = None
        self._barren = 0  # segments in a row that ended without a byte
        self._start = start
        self._reach = MAX_LAG_SEGMENTS if oldest_first else 0  # how far before the write head to go on after a 470
        self._clock = asyncio.get_running_loop().time

    @property
    def read_seq(self) -> int | None:
        """Index of the last segment that was read to its end; of the one before, while one is being read."""
        if self._current is None:
            return None
        return self._current.seq if self._current.complete else self._current.seq - 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of everything. The channel lives on for others."""
        if self._current is not None:
            self._current.close()
        if self._ahead is not None:
            await _discard_opened(self._ahead)
            self._ahead = None
        if self.closed_reason is None:
            self.closed_reason = "left"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Segment:
        previous = self._current
        if previous is not None:
            previous.close()
        if self.closed_reason is not None:
            raise StopAsyncIteration
        if self._ahead is None:
            self._request_ahead(self._start)
        assert self._ahead is not None
        # Not the task itself: a reader that is cancelled must not cancel the request.
        await asyncio.wait({self._ahead})
        if self._ahead is None or self._ahead.cancelled():  # closed meanwhile
            raise StopAsyncIteration
        opened = self._ahead.result()
        if isinstance(opened, str):
            self.closed_reason = opened
            raise StopAsyncIteration
        gap = previous is not None and (opened.gap or not previous.complete)
        self._current = Segment(self, opened, gap)
        self.counters.segments += 1
        self.counters.gaps += gap
        self._request_ahead(opened.seq + 1)
        return self._current

    def _request_ahead(self, seq: int) -> None:
        self._ahead = asyncio.create_task(self._open(seq), name=f"trickle GET {seq}")

    def _successor_arrived(self) -> bool:
        """Whether the segment after the current one has bytes, or will never have any: the channel is over."""
        return self._ahead is not None and self._ahead.done()

    def _backoff(self) -> Backoff:
        timing = self.timing
        return Backoff(timing.retry_first_s, timing.retry_max_s, timing.unreachable_s, self._clock)

    async def _open(self, seq: int) -> _Opened | str:
        """Wait for the first byte of segment ``seq``, or of the one to go on with instead.

        Returns the reason, in words, when the channel is over.
        """
        expected = seq
        behind_since: float | None = None
        backoff = self._backoff()
        barren = self._barren
        reach = self._reach
        while True:
            if barren > MAX_BARREN:
                await asyncio.sleep(self.timing.reposition_s)
            try:
                response = await self._get(seq, backoff)
            except ChannelClosed as closed:
                return closed.reason
            except _Abandoned:
                self.counters.abandoned += 1
                if seq >= 0:
                    seq += 1
                continue
            except _SetBack as back:
                seq = self._back_to(back.latest)
                continue
            answer = read_answer(response.status, response.headers)
            if answer.status == 200:
                behind_since, reach = None, self._reach
                # A server that does not resolve -1 and -2 for us is none we know: begin at its write head.
                at = max(seq, 0) if answer.seq is None else answer.seq
                if response.content_length != 0:
                    return _Opened(at, response, gap=expected not in (at, SEQ_CURRENT, SEQ_NEXT))
                response.release()
                self.counters.empty += 1
                barren += 1
                seq = expected = at + 1
                continue
            response.release()  # 470: the server's window lies elsewhere
            self.counters.outside_window += 1
            latest = seq if answer.latest is None else answer.latest
            if latest > seq:
                barren += 1
                # Each time nearer to the head: the oldest segment of a channel that is written faster than we ask is
                # gone whenever we come for it.
                seq = max(seq + 1, latest - reach, 0)
                reach = max(reach - 1, 0)
                continue
            behind_since = self._clock() if behind_since is None else behind_since
            if latest < seq and self._clock() - behind_since >= self.timing.behind_s:
                seq, behind_since = self._back_to(latest), None
            await asyncio.sleep(self.timing.reposition_s)

    def _back_to(self, latest: int) -> int:
        """The segment to go on with, when a publisher began again."""
        logger.info("%s: the write head went back to segment %d", self.url, latest)
        return max(latest - self._reach, 0)

    async def _reopen(self, seq: int) -> aiohttp.ClientResponse | None:
        """The same segment once more, or None when it cannot be had any more."""
        try:
            response = await self._get(seq, self._backoff())
        except (_Abandoned, _SetBack, ChannelClosed):
            return None
        answer = read_answer(response.status, response.headers)
        if answer.status == 200 and answer.seq in (None, seq) and response.content_length != 0:
            return response
        response.release()
        return None

    async def _get(self, seq: int, backoff: Backoff) -> aiohttp.ClientResponse:
        """A response that is 200 or 470. Raises ChannelClosed; _Abandoned and _SetBack: go on at another segment."""
        while True:
            failure: object
            began_at = self._clock()
            try:
                response = await self._long_poll(seq)
            except ChannelClosed:
                raise
            except FAILURES as exc:
                failure = exc
                if connected(exc) and self._clock() - began_at > self.timing.retry_max_s:
                    backoff.succeeded()  # the server was there, for a while
            else:
                if response is None:
                    self.counters.refreshes += 1
                    backoff.succeeded()
                    continue
                answer = read_answer(response.status, response.headers)
                if answer.over is not None:
                    response.close()
                    raise ChannelClosed(answer.over)
                if answer.status in (200, STATUS_OUTSIDE_WINDOW):
                    backoff.succeeded()
                    return response
                response.close()
                failure = answer.status
            logger.debug("%s: segment %d: %s", self.url, seq, failure)
            self.counters.retries += 1
            wait_s = backoff.failed()
            if wait_s is None:
                raise ChannelClosed("unreachable")
            await asyncio.sleep(wait_s)

    async def _long_poll(self, seq: int) -> aiohttp.ClientResponse | None:
        """One GET until its headers come, which is with the first byte. None: silent for ``refresh_s``."""
        url = segment_url(self.url, seq)
        get = asyncio.create_task(send(self._http, "GET", url), name=f"trickle GET {seq} headers")
        refresh_at = self._clock() + self.timing.refresh_s
        patience_s = self.timing.silence_s
        # The current segment of a channel that has none is the first one to come; that of -1 only the server knows.
        waited_for = 0 if seq == SEQ_CURRENT else seq
        behind_since: float | None = None
        taken = False
        try:
            while True:
                await asyncio.wait({get}, timeout=min(patience_s, max(refresh_at - self._clock(), 0)))
                if not get.done() and self._clock() < refresh_at:
                    if self._current is not None and self._current._is_arriving():
                        continue  # its successor is not due
                    patience_s = min(patience_s * 2, self.timing.silence_max_s)
                    head = await self._next_beside(get)
                    leave: Exception
                    if head.over is not None:
                        leave = ChannelClosed(head.over)
                    elif head.latest is None:
                        continue
                    elif 0 <= waited_for < head.latest - 1:
                        leave = _Abandoned()
                    elif head.latest > waited_for - MAX_LAG_SEGMENTS:
                        # At ours, or set back within the window: what lies between the server still has. It discards
                        # what is posted there, and takes ours first. To go back would be to read old segments again.
                        behind_since = None
                        continue
                    else:
                        behind_since = self._clock() if behind_since is None else behind_since
                        if self._clock() - behind_since < self.timing.behind_s:
                            continue
                        leave = _SetBack(head.latest)
                    # The answers come over two connections: that to the GET may be on its way still.
                    await asyncio.wait({get}, timeout=self.timing.reposition_s)
                    if not get.done():
                        raise leave
                if get.done():
                    taken = True
                    return get.result()
                return None
        finally:
            if not taken:
                await _discard(get)

    async def _next_beside(self, get: asyncio.Task[aiohttp.ClientResponse]) -> Answer:
        """The write head; no news once ``get`` is done, which a slow answer here must not hold up."""
        asking = asyncio.create_task(self._next(), name="trickle GET next")
        try:
            await asyncio.wait({get, asking}, return_when=asyncio.FIRST_COMPLETED)
            return _NO_NEWS if get.done() else asking.result()
        finally:
            asking.cancel()
            await asyncio.wait({asking})

    async def _next(self) -> Answer:
        """Ask for the write head. A failure answers nothing: the long poll meets it itself."""
        try:
            async with asyncio.timeout(self.timing.silence_max_s):
                response = await send(self._http, "GET", next_url(self.url))
                response.release()
        except FAILURES:
            return _NO_NEWS
        return read_answer(response.status, response.headers)


async def _discard(get: asyncio.Task[aiohttp.ClientResponse]) -> None:
    get.cancel()
    await asyncio.wait({get})
    if not get.cancelled() and get.exception() is None:
        get.result().close()


async def _discard_opened(ahead: asyncio.Task[_Opened | str]) -> None:
    ahead.cancel()
    await asyncio.wait({ahead})
    if not ahead.cancelled() and ahead.exception() is None and isinstance(opened := ahead.result(), _Opened):
        opened.response.close()
