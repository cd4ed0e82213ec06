"""The data channel: lines that a gateway can forward, never silent for long."""

import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from gateway_shim.localnet.broker import Broker
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.data import CONTENT_TYPE, DataWriter
from gateway_shim.trickle.publisher import Publisher, PublisherTiming


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    async with Broker() as broker:
        yield broker


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_http() as http:
        yield http


@pytest.fixture
async def publisher(broker: Broker, http: aiohttp.ClientSession) -> AsyncIterator[Publisher]:
    timing = PublisherTiming(retry_first_s=0.01)
    async with Publisher(http, broker.create("data"), content_type=CONTENT_TYPE, timing=timing) as publisher:
        yield publisher


def lines(broker: Broker) -> list[object]:
    channel = broker.channels["data"]
    segments = [segment for seq in range(channel.next_write) if (segment := channel.segment(seq)) is not None]
    return [json.loads(line) for segment in segments for line in segment.data.decode().splitlines()]


async def test_one_object_a_line_and_all_of_them_on_leaving(broker: Broker, publisher: Publisher) -> None:
    records = [{"n": number, "text": "ä\n\u2028"} for number in range(300)]
    async with DataWriter(publisher) as writer:
        for record in records:
            assert writer.put(record)
    assert [json.loads(line) for line in raw(broker).split("\n")[:-1]] == records
    assert (writer.counters.sent, writer.counters.dropped) == (300, 0)
    assert not writer.put({"too": "late"})


def raw(broker: Broker) -> str:
    channel = broker.channels["data"]
    segments = [channel.segment(seq) for seq in range(channel.next_write)]
    return "".join(segment.data.decode() for segment in segments if segment is not None)


async def test_record_is_sent_without_waiting_for_more(broker: Broker, publisher: Publisher) -> None:
    async with DataWriter(publisher, interval_s=60) as writer:
        writer.put({"first": 1})
        await broker.wait_for_segment("data", 0)
        assert lines(broker) == [{"first": 1}]


async def test_silence_is_broken_by_keepalives(broker: Broker, publisher: Publisher) -> None:
    async with DataWriter(publisher, keepalive_s=0.02) as writer:
        await broker.wait_for_segment("data", 1)
        assert lines(broker)[:2] == [{"type": "keepalive"}] * 2
    assert writer.counters.keepalives >= 2
    assert writer.counters.sent == 0


async def test_keepalive_can_be_an_empty_list(broker: Broker, publisher: Publisher) -> None:
    async with DataWriter(publisher, keepalive_s=0.02, keepalive=[]):
        await broker.wait_for_segment("data", 0)
        assert lines(broker)[0] == []


@pytest.mark.parametrize(
    "record",
    [{"text": "x" * (64 << 10)}, {"value": float("nan")}, {"value": object()}],
    ids=["long", "nan", "object"],
)
async def test_record_that_cannot_be_a_line_is_dropped_and_counted(
    broker: Broker, publisher: Publisher, record: dict[str, object]
) -> None:
    async with DataWriter(publisher) as writer:
        assert not writer.put(record)
        assert writer.put({"ok": 1})
    assert lines(broker) == [{"ok": 1}]
    assert (writer.counters.sent, writer.counters.dropped) == (1, 1)


async def test_longest_line_is_below_64_kib(broker: Broker, publisher: Publisher) -> None:
    room = (64 << 10) - 1 - len(b'{"t":""}\n')
    async with DataWriter(publisher) as writer:
        assert writer.put({"t": "x" * room})
        assert not writer.put({"t": "x" * (room + 1)})


async def test_queue_that_is_full_drops_and_counts(broker: Broker, publisher: Publisher) -> None:
    async with DataWriter(publisher, limit=3) as writer:
        assert [writer.put({"n": number}) for number in range(5)] == [True, True, True, False, False]
    assert lines(broker) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert writer.counters.dropped == 2


async def test_channel_that_ends_drops_the_rest_quietly(broker: Broker, publisher: Publisher) -> None:
    async with DataWriter(publisher) as writer:
        await broker.wait_for_writer("data", 0)
        await broker.delete("data")
        await publisher.closed.wait()
        assert not writer.put({"n": 1})
    assert writer.counters.dropped == 1


async def test_leaving_keeps_its_deadline_when_the_server_takes_nothing(broker: Broker, publisher: Publisher) -> None:
    broker.faults.stall("POST", "data", 0, after_bytes=1)
    async with DataWriter(publisher, flush_s=0.05) as writer:
        writer.put({"n": 1})
    assert writer.counters.sent == 0
    broker.faults.clear()


async def test_segment_closed_by_the_server_is_sent_again(
    broker: Broker, publisher: Publisher, http: aiohttp.ClientSession
) -> None:
    broker.faults.reset("POST", "data", 0, after_bytes=3)
    async with DataWriter(publisher) as writer:
        writer.put({"n": 1})
    segment = broker.channels["data"].segment(1)
    assert segment is not None
    assert segment.data == b'{"n":1}\n'
    assert writer.counters.sent == 1
