"""The reading end against the broker, over sockets."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from gateway_shim.localnet.broker import Broker, BrokerTiming
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import Publisher
from gateway_shim.trickle.subscriber import Segment, Subscriber, SubscriberTiming
from gateway_shim.trickle.wire import SEQ_NEXT, SegmentTooLarge

TIMING = SubscriberTiming(
    refresh_s=10,
    silence_s=0.05,
    silence_max_s=0.1,
    reposition_s=0.02,
    behind_s=0.1,
    retry_first_s=0.01,
    retry_max_s=0.05,
    unreachable_s=10,
)


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    async with Broker(timing=BrokerTiming(presence_s=0.02)) as broker:
        yield broker


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_http() as http:
        yield http


class AskedBroker(Broker):
    """Tells of each question for the write head, and answers none before ``may_answer`` is set."""

    def __init__(self) -> None:
        super().__init__(timing=BrokerTiming(presence_s=0.02))
        self.asked = asyncio.Semaphore(0)
        self.may_answer = asyncio.Event()

    async def _on_segment(self, request: web.Request) -> web.StreamResponse:
        if request.match_info["seq"] != "next":
            return await super()._on_segment(request)
        self.asked.release()
        await self.may_answer.wait()
        return await super()._on_segment(request)


@pytest.fixture
async def asked_broker() -> AsyncIterator[AskedBroker]:
    async with AskedBroker() as broker:
        yield broker
        broker.may_answer.set()


@pytest.fixture
async def publisher(broker: Broker, http: aiohttp.ClientSession) -> AsyncIterator[Publisher]:
    async with Publisher(http, broker.create("ch"), content_type="video/mp2t") as publisher:
        yield publisher


@pytest.fixture
async def subscriber(broker: Broker, http: aiohttp.ClientSession) -> AsyncIterator[Subscriber]:
    async with Subscriber(http, broker.create("ch"), timing=TIMING) as subscriber:
        yield subscriber


async def post(http: aiohttp.ClientSession, url: str, seq: int, data: bytes = b"") -> None:
    async with http.post(f"{url}/{seq}", data=data or b"segment %d" % seq) as response:
        assert response.status == 200


async def read_next(subscriber: Subscriber) -> tuple[int, bytes, bool, bool]:
    segment = await anext(subscriber)
    data = await segment.read(1 << 20)
    return segment.seq, data, segment.complete, segment.gap


async def test_bytes_come_as_they_are_written(publisher: Publisher, subscriber: Subscriber) -> None:
    outgoing = await publisher.open_segment()
    await outgoing.write(b"one")
    segment = await anext(subscriber)
    assert await anext(segment) == b"one"
    await outgoing.write(b"two")
    assert await anext(segment) == b"two"
    await outgoing.close()
    assert [data async for data in segment] == []
    assert (segment.seq, segment.complete, segment.gap) == (0, True, False)


async def test_next_segment_is_requested_while_the_current_one_is_read(
    broker: Broker, publisher: Publisher, subscriber: Subscriber
) -> None:
    outgoing = await publisher.open_segment()
    await outgoing.write(b"one")
    await anext(subscriber)
    await broker.wait_for_reader("ch", 1)
    await outgoing.close()


async def test_all_segments_in_order_without_a_gap(publisher: Publisher, subscriber: Subscriber) -> None:
    async def publish() -> None:
        for number in range(20):
            await publisher.publish(b"%d" % number)
            await got.acquire()

    got = asyncio.Semaphore(0)
    publishing = asyncio.create_task(publish())
    for number in range(20):
        assert await read_next(subscriber) == (number, b"%d" % number, True, False)
        got.release()
    await publishing
    assert subscriber.counters.segments == 20
    assert subscriber.counters.gaps == subscriber.counters.retries == 0


@pytest.mark.parametrize(("start", "first"), [(-2, 2), (1, 1)])
async def test_joins_a_running_channel(
    broker: Broker, http: aiohttp.ClientSession, publisher: Publisher, start: int, first: int
) -> None:
    for _ in range(3):
        await publisher.publish(b"x")
    async with Subscriber(http, publisher.url + "/", start=start, timing=TIMING) as subscriber:
        assert await read_next(subscriber) == (first, b"x", True, False)


async def test_start_at_the_next_segment_takes_its_index_from_the_answer(
    broker: Broker, http: aiohttp.ClientSession, publisher: Publisher
) -> None:
    for _ in range(3):
        await publisher.publish(b"old")
    async with Subscriber(http, publisher.url, start=SEQ_NEXT, timing=TIMING) as subscriber:
        reading = asyncio.create_task(read_next(subscriber))
        await broker.wait_for_reader("ch", 3)
        await publisher.publish(b"new")
        assert await reading == (3, b"new", True, False)
        await broker.wait_for_reader("ch", 4)


async def test_reader_that_lags_goes_on_at_the_live_edge(
    broker: Broker, http: aiohttp.ClientSession, subscriber: Subscriber
) -> None:
    url = subscriber.url
    await post(http, url, 0)
    first = await anext(subscriber)
    await broker.wait_for_reader("ch", 1)
    for seq in range(1, 12):
        await post(http, url, seq)
    assert await first.read(100) == b"segment 0"
    assert await read_next(subscriber) == (1, b"segment 1", True, False)  # was connected in time, and is held for us
    reading = asyncio.create_task(read_next(subscriber))
    await broker.wait_for_reader("ch", 12)
    await post(http, url, 12)
    assert await reading == (12, b"segment 12", True, True)
    assert subscriber.counters.outside_window == 1
    assert subscriber.counters.gaps == 1


async def test_reader_that_lags_goes_on_at_the_oldest_segment_where_all_count(
    broker: Broker, http: aiohttp.ClientSession
) -> None:
    url = broker.create("ch")
    await post(http, url, 0)
    async with Subscriber(http, url, oldest_first=True, timing=TIMING) as subscriber, asyncio.timeout(20):
        first = await anext(subscriber)
        await broker.wait_for_reader("ch", 1)
        for seq in range(1, 12):
            await post(http, url, seq)
        assert await first.read(100) == b"segment 0"
        assert await read_next(subscriber) == (1, b"segment 1", True, False)
        assert await read_next(subscriber) == (7, b"segment 7", True, True)
        for seq in range(8, 12):
            assert await read_next(subscriber) == (seq, b"segment %d" % seq, True, False)
        assert subscriber.counters.outside_window == 1


async def test_oldest_segment_whose_place_is_taken_already_is_passed_over(
    broker: Broker, http: aiohttp.ClientSession
) -> None:
    url = broker.create("ch")
    for seq in range(12):
        await post(http, url, seq)
    async with Subscriber(http, url, start=2, oldest_first=True, timing=TIMING) as subscriber, asyncio.timeout(20):
        waiting = asyncio.create_task(http.get(f"{url}/12"))  # takes the place of 7, as a publisher's next POST does
        await broker.wait_for_reader("ch", 12)
        for seq in range(8, 12):
            assert (await read_next(subscriber))[:2] == (seq, b"segment %d" % seq)
        assert subscriber.counters.outside_window == 2
        waiting.cancel()
        await asyncio.wait({waiting})


async def test_empty_and_deleted_segments_are_passed_over(
    broker: Broker, http: aiohttp.ClientSession, subscriber: Subscriber
) -> None:
    url = subscriber.url
    async with http.post(f"{url}/0"):
        pass
    reading = asyncio.create_task(read_next(subscriber))
    await broker.wait_for_reader("ch", 1)
    async with http.delete(f"{url}/1"):
        pass
    await broker.channels["ch"].wait_for(lambda channel: channel.counters.outside_window > 0)
    await post(http, url, 2)
    assert await reading == (2, b"segment 2", True, False)
    assert subscriber.counters.empty == 2
    assert subscriber.closed_reason is None


async def test_channel_deleted_during_a_get(broker: Broker, subscriber: Subscriber) -> None:
    reading = asyncio.create_task(read_next(subscriber))
    await broker.wait_for_reader("ch", 0)
    await broker.delete("ch")
    with pytest.raises(StopAsyncIteration):
        await reading
    assert subscriber.closed_reason == "closed header"


async def test_channel_deleted_in_the_middle_of_a_segment(
    broker: Broker, publisher: Publisher, subscriber: Subscriber
) -> None:
    outgoing = await publisher.open_segment()
    await outgoing.write(b"half")
    segment = await anext(subscriber)
    await broker.wait_for_reader("ch", 1)
    await broker.delete("ch")
    assert await segment.read(100) == b"half"
    assert [segment async for segment in subscriber] == []
    assert subscriber.closed_reason == "closed header"


async def test_unknown_channel_is_over_at_once(broker: Broker, http: aiohttp.ClientSession) -> None:
    async with Subscriber(http, f"{broker.url}/none", timing=TIMING) as subscriber:
        assert [segment async for segment in subscriber] == []
    assert subscriber.closed_reason == "404"


async def test_closed_channel_is_noticed_even_if_the_get_was_forgotten(
    broker: Broker, subscriber: Subscriber
) -> None:
    broker.faults.stall("GET", "ch", 0)
    reading = asyncio.create_task(read_next(subscriber))
    await broker.wait_for_reader("ch", 0)
    await broker.delete("ch")
    with pytest.raises(StopAsyncIteration):
        await reading
    assert subscriber.closed_reason == "404"


async def test_reset_in_the_middle_loses_nothing(
    broker: Broker, publisher: Publisher, subscriber: Subscriber
) -> None:
    fault = broker.faults.reset("GET", "ch", 0, after_bytes=6)
    outgoing = await publisher.open_segment()
    await outgoing.write(b"01234")
    segment = await anext(subscriber)
    received = await anext(segment)
    assert received == b"01234"
    await outgoing.write(b"56789")
    async for data in segment:
        received += data
        if len(received) == 10:
            await outgoing.write(b"abc")
            await outgoing.close()
    assert fault.taken.is_set()
    assert (received, segment.complete) == (b"0123456789abc", True)
    assert subscriber.counters.resumed == 1


async def test_reset_before_the_first_byte_is_retried_at_the_same_index(
    broker: Broker, publisher: Publisher, subscriber: Subscriber
) -> None:
    for _ in range(3):
        broker.faults.reset("GET", "ch", 0)
    broker.faults.answer("GET", "ch", 0, status=503)
    await publisher.publish(b"x")
    assert await read_next(subscriber) == (0, b"x", True, False)
    assert subscriber.counters.retries >= 2


async def test_segment_that_cannot_be_resumed_ends_incomplete(
    broker: Broker, http: aiohttp.ClientSession, subscriber: Subscriber
) -> None:
    url = subscriber.url
    fault = broker.faults.stall("GET", "ch", 0, after_bytes=4)
    await post(http, url, 0, b"01234567")
    segment = await anext(subscriber)
    assert await anext(segment) == b"0123"
    await broker.wait_for_reader("ch", 1)
    for seq in range(1, 7):
        await post(http, url, seq)
    broker.faults.reset("GET", "ch", 0)
    await fault.taken.wait()
    segment._response.close()  # type: ignore[union-attr]  # the connection breaks; index 0 has left the window
    segment._response = await subscriber._reopen(0)
    assert segment._response is None
    assert [data async for data in segment] == []
    assert not segment.complete
    seq, _, complete, gap = await read_next(subscriber)
    assert (seq, complete, gap) == (1, True, True)


async def test_silent_get_is_refreshed_at_the_same_index(
    broker: Broker, http: aiohttp.ClientSession, publisher: Publisher
) -> None:
    broker.faults.stall("GET", "ch", 0)
    timing = replace(TIMING, refresh_s=0.05, silence_s=5)
    async with Subscriber(http, publisher.url, timing=timing) as subscriber:
        await publisher.publish(b"x")
        assert await read_next(subscriber) == (0, b"x", True, False)
        assert subscriber.counters.refreshes >= 1
        assert subscriber.counters.retries == 0


async def test_silent_body_is_refreshed_where_it_stopped(
    broker: Broker, http: aiohttp.ClientSession, publisher: Publisher
) -> None:
    broker.faults.stall("GET", "ch", 0, after_bytes=3)
    async with Subscriber(http, publisher.url, timing=replace(TIMING, refresh_s=0.2)) as subscriber:
        await publisher.publish(b"012345")
        assert await read_next(subscriber) == (0, b"012345", True, False)
        assert subscriber.counters.resumed == 1


async def test_aborted_segment_is_left_as_soon_as_a_later_one_has_bytes(
    broker: Broker, http: aiohttp.ClientSession, subscriber: Subscriber
) -> None:
    broker.faults.reset("POST", "ch", 0, after_bytes=4)
    with pytest.raises(aiohttp.ClientError):
        await http.post(f"{subscriber.url}/0", data=b"01234567")
    segment = await anext(subscriber)
    reading = asyncio.create_task(segment.read(100))
    await broker.wait_for_reader("ch", 1)
    await post(http, subscriber.url, 1)
    assert await reading == b"0123"
    assert not segment.complete
    assert subscriber.counters.abandoned == 1
    assert await read_next(subscriber) == (1, b"segment 1", True, True)


async def test_connection_that_is_stuck_beside_the_next_segment_is_replaced_and_loses_nothing(
    broker: Broker, http: aiohttp.ClientSession, subscriber: Subscriber
) -> None:
    stall = broker.faults.stall("GET", "ch", 0, after_bytes=4)
    await post(http, subscriber.url, 0)
    segment = await anext(subscriber)
    reading = asyncio.create_task(segment.read(100))
    await broker.wait_for_reader("ch", 1)
    await post(http, subscriber.url, 1)
    assert await reading == b"segment 0"
    assert segment.complete
    assert await read_next(subscriber) == (1, b"segment 1", True, False)
    assert (subscriber.counters.abandoned, subscriber.counters.resumed) == (0, 1)
    stall.release()


async def test_segment_that_is_never_written_is_skipped(
    broker: Broker, http: aiohttp.ClientSession, subscriber: Subscriber
) -> None:
    await post(http, subscriber.url, 0)
    assert (await read_next(subscriber))[0] == 0
    reading = asyncio.create_task(read_next(subscriber))
    await broker.wait_for_reader("ch", 1)
    await post(http, subscriber.url, 2)
    assert await reading == (2, b"segment 2", True, True)
    assert subscriber.counters.abandoned == 1


async def test_first_segment_that_is_never_written_is_skipped(
    broker: Broker, http: aiohttp.ClientSession, subscriber: Subscriber
) -> None:
    reading = asyncio.create_task(read_next(subscriber))
    await broker.wait_for_reader("ch", 0)
    await post(http, subscriber.url, 1)
    assert (await reading)[:2] == (1, b"segment 1")


async def test_publisher_that_starts_over_at_zero_is_followed(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    for seq in range(8):
        await post(http, url, seq)
    # Patient: it is not told by the write head before the place is taken.
    async with Subscriber(http, url, timing=replace(TIMING, silence_s=60)) as subscriber:
        assert (await read_next(subscriber))[0] == 7
        reading = asyncio.create_task(read_next(subscriber))
        await broker.wait_for_reader("ch", 8)
        for seq in range(5):  # index 3 takes the place of index 8, which was waited for; index 4 is discarded
            await post(http, url, seq)
        await broker.wait_for_reader("ch", 5)
        await post(http, url, 5)
        assert await reading == (5, b"segment 5", True, True)


@pytest.mark.parametrize("oldest_first", [False, True])
async def test_publisher_that_starts_over_is_followed_before_it_takes_the_place_that_is_waited_for(
    broker: Broker, http: aiohttp.ClientSession, oldest_first: bool
) -> None:
    url = broker.create("ch")
    for seq in range(9):
        await post(http, url, seq)
    async with Subscriber(http, url, oldest_first=oldest_first, timing=TIMING) as subscriber, asyncio.timeout(20):
        assert (await read_next(subscriber))[0] == 8
        reading = asyncio.create_task(read_next(subscriber))
        await broker.wait_for_reader("ch", 9)
        await post(http, url, 0, b"anew 0")  # index 4 would take the place of index 9
        if oldest_first:
            assert await reading == (0, b"anew 0", True, True)
            reading = asyncio.create_task(read_next(subscriber))
        await broker.wait_for_reader("ch", 1)
        await post(http, url, 1, b"anew 1")
        assert await reading == (1, b"anew 1", True, not oldest_first)
        assert subscriber.counters.outside_window == subscriber.counters.abandoned == 0


@pytest.mark.parametrize("written", [0, 1, 9])
async def test_channel_on_which_nothing_happens_is_waited_for_where_it_is(
    asked_broker: AskedBroker, http: aiohttp.ClientSession, written: int
) -> None:
    url = asked_broker.create("ch")
    asked_broker.may_answer.set()
    for seq in range(written):
        await post(http, url, seq)
    async with Subscriber(http, url, timing=replace(TIMING, behind_s=0)) as subscriber, asyncio.timeout(20):
        if written:
            assert (await read_next(subscriber))[0] == written - 1
        reading = asyncio.create_task(read_next(subscriber))
        for _ in range(4):
            await asked_broker.asked.acquire()
        assert asked_broker.channels["ch"].counters.gets == (2 if written else 1)
        await post(http, url, written)
        assert await reading == (written, b"segment %d" % written, True, False)
        assert subscriber.counters.outside_window == subscriber.counters.abandoned == 0


async def test_write_head_set_back_within_the_window_shows_nothing_twice(
    asked_broker: AskedBroker, http: aiohttp.ClientSession
) -> None:
    """The server discards what is posted to a segment that it has: the next one that it takes is waited for."""
    url = asked_broker.create("ch")
    asked_broker.may_answer.set()
    for seq in range(3):
        await post(http, url, seq)
    async with Subscriber(http, url, timing=replace(TIMING, behind_s=0)) as subscriber, asyncio.timeout(20):
        assert (await read_next(subscriber))[0] == 2
        reading = asyncio.create_task(read_next(subscriber))
        await asked_broker.wait_for_reader("ch", 3)
        await post(http, url, 0, b"anew 0")
        assert asked_broker.channels["ch"].next_write == 1
        for _ in range(4):
            await asked_broker.asked.acquire()
        for seq in range(1, 4):
            await post(http, url, seq, b"anew %d" % seq)
        assert await reading == (3, b"anew 3", True, False)


async def test_answer_is_not_held_up_by_the_question_for_the_write_head(
    asked_broker: AskedBroker, http: aiohttp.ClientSession
) -> None:
    url = asked_broker.create("ch")
    async with Subscriber(http, url, timing=replace(TIMING, silence_max_s=60)) as subscriber:
        reading = asyncio.create_task(read_next(subscriber))
        await asked_broker.asked.acquire()
        await post(http, url, 0)
        assert await asyncio.wait_for(reading, 20) == (0, b"segment 0", True, False)
        await asked_broker.asked.acquire()  # that of the segment after it
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "trickle GET next"]


async def test_server_that_is_gone_ends_the_channel_after_a_while(http: aiohttp.ClientSession) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        timing = replace(TIMING, unreachable_s=0.1)
        async with Subscriber(http, f"http://127.0.0.1:{port}/ch", timing=timing) as subscriber:
            assert [segment async for segment in subscriber] == []
    assert subscriber.closed_reason == "unreachable"
    assert subscriber.counters.retries >= 3


async def test_server_restart_ends_the_channel(broker: Broker, publisher: Publisher, subscriber: Subscriber) -> None:
    outgoing = await publisher.open_segment()
    await outgoing.write(b"half")
    segment = await anext(subscriber)
    assert await anext(segment) == b"half"
    await broker.restart()
    assert [data async for data in segment] == []
    assert not segment.complete
    assert [segment async for segment in subscriber] == []
    assert subscriber.closed_reason == "404"
    await asyncio.wait_for(publisher.closed.wait(), 10)


async def test_cancelled_reader_takes_up_where_it_was(publisher: Publisher, subscriber: Subscriber) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(subscriber), 0.01)
    await publisher.publish(b"x")
    assert await read_next(subscriber) == (0, b"x", True, False)


async def test_segment_left_unread_makes_a_gap(publisher: Publisher, subscriber: Subscriber) -> None:
    for _ in range(2):
        await publisher.publish(b"x")
    async with Subscriber(publisher.http, publisher.url, start=0, timing=TIMING) as other:
        assert (await anext(other)).seq == 0
        assert await read_next(other) == (1, b"x", True, True)


async def test_segment_larger_than_its_reader_wants(publisher: Publisher, subscriber: Subscriber) -> None:
    await publisher.publish(bytes(5000))
    segment = await anext(subscriber)
    with pytest.raises(SegmentTooLarge):
        await segment.read(4999)
    assert not segment.complete


async def test_leaving_lets_go_of_every_request(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    await post(http, url, 0)
    async with Subscriber(http, url, timing=TIMING) as subscriber:
        segment: Segment = await anext(subscriber)
        await broker.wait_for_reader("ch", 1)
    await broker.channels["ch"].wait_for(lambda channel: not (channel.at_work("GET", 0) or channel.at_work("GET", 1)))
    assert [data async for data in segment] == []
    assert [segment async for segment in subscriber] == []


@pytest.fixture
def self_signed(tmp_path: Path) -> ssl.SSLContext:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=elsewhere"]
    command += ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl to sign a certificate")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    return tls


async def test_certificate_signed_by_the_server_itself_is_accepted(
    http: aiohttp.ClientSession, self_signed: ssl.SSLContext
) -> None:
    async with Broker(tls=self_signed) as broker:
        url = broker.create("ch")
        assert url.startswith("https://")
        async with Publisher(http, url, content_type="text/plain") as publisher:
            await publisher.publish(b"x")
            async with Subscriber(http, url, timing=TIMING) as subscriber:
                assert await read_next(subscriber) == (0, b"x", True, False)
