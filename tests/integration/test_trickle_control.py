"""Control messages: what an orchestrator may write, and what must not stop us."""

import asyncio
import logging
from collections.abc import AsyncIterator

import aiohttp
import pytest

from gateway_shim.localnet.broker import Broker
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.control import _Complaints, control_messages
from gateway_shim.trickle.publisher import Publisher
from gateway_shim.trickle.subscriber import Subscriber, SubscriberTiming
from tests.integration.test_trickle_barren import Stub, answer


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    async with Broker() as broker:
        yield broker


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_http() as http:
        yield http


async def exchange(
    broker: Broker, http: aiohttp.ClientSession, messages: list[bytes], limit: int = 1000
) -> list[object]:
    """What a reader makes of ``messages``; each is read before the next is written, and the channel then ends."""
    url = broker.create("control", "application/json")
    timing = SubscriberTiming(silence_s=0.05, reposition_s=0.02)
    async with (
        Publisher(http, url, content_type="application/json") as publisher,
        Subscriber(http, url, timing=timing) as subscriber,
    ):

        async def read() -> list[object]:
            return [value async for value in control_messages(subscriber, limit=limit)]

        reading = asyncio.create_task(read())
        for seq, message in enumerate(messages):
            await broker.wait_for_reader("control", seq)
            segment = await publisher.open_segment()
            await segment.write(message)
            await segment.close()
        await broker.wait_for_reader("control", len(messages))
        await broker.delete("control")
        received = await reading
        assert subscriber.closed_reason == "closed header"
    return received


async def test_values_of_every_kind_come_in_order(broker: Broker, http: aiohttp.ClientSession) -> None:
    messages = [b'{"a": 1}', b"null", b"[1, 2]", b'"text"', b" 7\n", b'{"keep": "off"}', b'{"keep":"alive","a":1}']
    values = [{"a": 1}, None, [1, 2], "text", 7, {"keep": "off"}, {"keep": "alive", "a": 1}]
    assert await exchange(broker, http, messages) == values


async def test_keepalives_and_empty_segments_are_left_out(broker: Broker, http: aiohttp.ClientSession) -> None:
    assert await exchange(broker, http, [b'{"keep":"alive"}', b"", b" \n", b'{ "keep" : "alive" }', b"1"]) == [1]


@pytest.mark.parametrize(
    "bad",
    [b"{", b"\xff\xfe\xfd", b'{"a": NaN}', b"{} {}", b"[" * 900, b"9" * 999 + b"x", b'"' + b"x" * 1000 + b'"'],
    ids=["open", "not-text", "nan", "two-values", "deep", "digits", "too-long"],
)
async def test_what_cannot_be_read_is_skipped_and_said(
    broker: Broker, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture, bad: bytes
) -> None:
    with caplog.at_level(logging.WARNING):
        assert await exchange(broker, http, [bad, b'{"a": 1}']) == [{"a": 1}]
    assert "control message ignored: segment 0" in caplog.text


async def test_long_message_is_read_to_its_end(broker: Broker, http: aiohttp.ClientSession) -> None:
    text = "x" * 3_000_000
    assert await exchange(broker, http, [b'"%s"' % text.encode()], limit=4_000_000) == [text]


async def test_message_cut_off_is_no_message(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("control")
    broker.faults.reset("POST", "control", 0, after_bytes=1)
    with pytest.raises(aiohttp.ClientError):
        await http.post(f"{url}/0", data=b"17")  # its beginning, 1, is JSON too
    async with Subscriber(http, url, timing=SubscriberTiming(silence_s=0.05)) as subscriber:
        reading = asyncio.create_task(anext(control_messages(subscriber)))
        await broker.wait_for_reader("control", 1)
        async with http.post(f"{url}/1", data=b"2"):
            pass
        assert await reading == 2


async def test_head_that_runs_away_from_the_oldest_segment_is_caught_up_with(http: aiohttp.ClientSession) -> None:
    """Of a channel that is written faster than we ask, all but the live edge is gone whenever we come for it."""
    asked: list[int] = []
    lead = 20  # segments that are written between two requests

    def respond(seq: int) -> bytes:
        at_head = bool(asked) and seq == asked[-1] + lead
        asked.append(seq)
        return answer(200, b"1", seq=seq) if at_head else answer(470, latest=seq + lead)

    async with Stub(respond) as stub, Subscriber(http, stub.url, start=0, oldest_first=True) as subscriber:
        assert await asyncio.wait_for(anext(control_messages(subscriber)), 20) == 1
        assert asked[:7] == [0, 15, 31, 48, 66, 85, 105]


def test_complaints_are_counted_and_made_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    complain = _Complaints("http://o/ch", clock=lambda: now)
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            complain("bad")
        now = 1.1
        complain("worse")
    assert [record.getMessage() for record in caplog.records] == [
        "http://o/ch: control message ignored: bad (0 more before)",
        "http://o/ch: control message ignored: worse (49 more before)",
    ]
