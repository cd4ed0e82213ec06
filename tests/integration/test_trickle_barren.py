"""The reading end against servers that answer at once, again and again, and with nothing new: it makes pauses."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Self

import aiohttp
import pytest

from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.subscriber import Subscriber, SubscriberTiming

TIMING = SubscriberTiming(
    silence_s=5, reposition_s=0.02, retry_first_s=0.05, retry_max_s=5, unreachable_s=0.5, behind_s=60
)
#: GETs after which a server says that the channel is over: a reader that makes no pause gets there in no time.
TOO_MANY = 300
#: Answers without a byte that are nothing strange: a window of empty segments, and a 470 behind it.
USUAL = 6


async def at_once(seq: int) -> object: ...


class Stub:
    """Says ``respond(seq)`` to each GET of a segment, byte for byte, and closes the connection; b"": says nothing.

    ``until(seq)``: what is waited for before it is closed. Bytes that come together with a failure are lost.
    """

    def __init__(
        self, respond: Callable[[int], bytes], *, until: Callable[[int], Awaitable[object]] = at_once
    ) -> None:
        self.asked: Counter[int] = Counter()
        self._respond = respond
        self._until = until
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._serving.add(asyncio.create_task(self._serve(reader, writer)))

        self._server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}/ch"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        await self._server.wait_closed()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            name = head.split()[1].rpartition(b"/")[2]
            if name == b"next":
                writer.write(answer(200, latest=0))
                return
            self.asked[int(name)] += 1
            said = self._respond(int(name)) if self.asked.total() <= TOO_MANY else answer(404)
            if not said:
                await reader.read()  # until the other end is closed
                return
            writer.write(said)
            await writer.drain()
            await self._until(int(name))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # it went away
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def answer(
    status: int, body: bytes = b"", *, seq: int | None = None, latest: int | None = None, length: int | None = None
) -> bytes:
    """``length``: that is announced, more than the body has; -1: none is, and an empty body is an empty chunk."""
    lines = [f"HTTP/1.1 {status} X", "Connection: close"]
    if length == -1:
        lines.append("Transfer-Encoding: chunked")
        body = b"0\r\n\r\n"
    else:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    if seq is not None:
        lines.append(f"Lp-Trickle-Seq: {seq}")
    if latest is not None:
        lines.append(f"Lp-Trickle-Latest: {latest}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_http() as http:
        yield http


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_body_cut_at_the_same_byte_each_time_is_asked_for_with_pauses_and_given_up(
    http: aiohttp.ClientSession,
) -> None:
    def respond(seq: int) -> bytes:
        return answer(200, b"01234", seq=0, length=100) if seq == 0 else b""

    read = asyncio.Event()
    stubbed = Stub(respond, until=lambda seq: read.wait())
    async with stubbed as stub, Subscriber(http, stub.url, start=0, timing=TIMING) as subscriber:
        segment = await anext(subscriber)
        assert await anext(segment) == b"01234"
        read.set()
        assert [data async for data in segment] == []
        assert not segment.complete
        # The first two at once; then behind pauses of 0.05, 0.1, 0.2 and 0.4 s, until half a second has passed.
        assert 3 <= stub.asked[0] <= 6


async def test_body_of_which_each_request_brings_more_is_asked_for_at_once(http: aiohttp.ClientSession) -> None:
    cuts = iter(range(1, 21))

    def respond(seq: int) -> bytes:
        return answer(200, b"x" * next(cuts), seq=0, length=20) if seq == 0 else b""

    read = asyncio.Semaphore(0)
    timing = replace(TIMING, retry_first_s=60, retry_max_s=60, unreachable_s=600)
    stubbed = Stub(respond, until=lambda seq: read.acquire())
    async with stubbed as stub, Subscriber(http, stub.url, start=0, timing=timing) as subscriber:
        segment = await anext(subscriber)
        for _ in range(20):
            assert await asyncio.wait_for(anext(segment), 20) == b"x"
            read.release()
        assert [data async for data in segment] == []
        assert segment.complete
        assert stub.asked[0] == 20


async def test_reader_cancelled_in_the_pause_goes_on_where_it_was(http: aiohttp.ClientSession) -> None:
    read, resumed = asyncio.Event(), asyncio.Event()

    def respond(seq: int) -> bytes:
        if seq:
            return b""
        if stub.asked[0] == 2:
            resumed.set()
        return answer(200, b"0123" if stub.asked[0] < 4 else b"01234567", seq=0, length=8)

    timing = replace(TIMING, retry_first_s=0.2, retry_max_s=0.2, unreachable_s=60)
    stubbed = Stub(respond, until=lambda seq: read.wait())
    async with stubbed as stub, Subscriber(http, stub.url, start=0, timing=timing) as subscriber:
        segment = await anext(subscriber)
        assert await anext(segment) == b"0123"
        read.set()
        reading = asyncio.create_task(segment.read(100))
        await resumed.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reading, 0.1)
        assert await segment.read(100) == b"4567"
        assert segment.complete


@pytest.mark.parametrize("length", [0, -1], ids=["no body", "an empty chunked body"])
async def test_empty_segments_without_end_are_passed_over_with_pauses(
    http: aiohttp.ClientSession, length: int
) -> None:
    last = 30

    def respond(seq: int) -> bytes:
        if seq > last:
            return b""
        return answer(200, b"x", seq=seq) if seq == last else answer(200, seq=seq, length=length)

    async with Stub(respond) as stub, Subscriber(http, stub.url, start=0, timing=TIMING) as subscriber:
        began_at = now()
        async for segment in subscriber:
            if data := await segment.read(100):
                break
        assert (segment.seq, data) == (last, b"x")
        # The request ahead of an empty body is made before that is known.
        assert now() - began_at > 0.9 * TIMING.reposition_s * (last - USUAL - 2)


async def test_write_head_that_runs_away_is_followed_with_pauses(http: aiohttp.ClientSession) -> None:
    last = 30

    def respond(seq: int) -> bytes:
        if seq > last:
            return b""
        return answer(200, b"x", seq=seq) if seq == last else answer(470, latest=seq + 1)

    async with Stub(respond) as stub, Subscriber(http, stub.url, start=0, timing=TIMING) as subscriber:
        began_at = now()
        segment = await anext(subscriber)
        assert (segment.seq, await segment.read(100)) == (last, b"x")
        assert now() - began_at > 0.9 * TIMING.reposition_s * (last - USUAL - 1)


async def test_a_window_of_empty_segments_and_a_lag_behind_it_cost_no_pause(http: aiohttp.ClientSession) -> None:
    def respond(seq: int) -> bytes:
        if seq < 5:
            return answer(200, seq=seq)
        return answer(470, latest=9) if seq == 5 else answer(200, b"x", seq=9) if seq == 9 else b""

    timing = replace(TIMING, reposition_s=60)
    async with Stub(respond) as stub, Subscriber(http, stub.url, start=0, timing=timing) as subscriber:
        segment = await asyncio.wait_for(anext(subscriber), 20)
        assert (segment.seq, await segment.read(100)) == (9, b"x")


async def test_segments_with_bytes_between_empty_ones_cost_no_pause(http: aiohttp.ClientSession) -> None:
    def respond(seq: int) -> bytes:
        if seq > 40:
            return b""
        return answer(200, b"x", seq=seq) if seq % 4 == 0 else answer(200, seq=seq, length=-1)

    timing = replace(TIMING, reposition_s=60)
    async with Stub(respond) as stub, Subscriber(http, stub.url, start=0, timing=timing) as subscriber:
        read = [await (await asyncio.wait_for(anext(subscriber), 20)).read(100) for _ in range(41)]
        assert read == [b"" if seq % 4 else b"x" for seq in range(41)]
