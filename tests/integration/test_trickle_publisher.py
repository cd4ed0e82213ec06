"""The writing end against the broker, over sockets."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Self

import aiohttp
import psutil
import pytest

from gateway_shim.localnet.broker import BASE_PATH, Broker, BrokerTiming
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import OutgoingSegment, Publisher, PublisherTiming
from gateway_shim.trickle.subscriber import Subscriber
from gateway_shim.trickle.wire import ChannelClosed, ChannelError

TIMING = PublisherTiming(
    retry_first_s=0.01,
    retry_max_s=0.05,
    delete_first_s=0.01,
    delete_max_s=0.05,
    unreachable_s=10,
    close_s=10,
    write_s=10,
)
BROKER_TIMING = BrokerTiming(keepalive_s=0.02, presence_s=0.02)


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    async with Broker(timing=BROKER_TIMING) as broker:
        yield broker


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_http() as http:
        yield http


@pytest.fixture
async def publisher(broker: Broker, http: aiohttp.ClientSession) -> AsyncIterator[Publisher]:
    async with Publisher(http, broker.create("ch"), content_type="video/mp2t", timing=TIMING) as publisher:
        yield publisher


class Proxy:
    """On the way to the broker. It may be out of service, or lose every DELETE."""

    def __init__(self, broker: Broker) -> None:
        self.loses_deletes = False
        self.lost = asyncio.Semaphore(0)  # released with each DELETE that is lost
        self._broker_port = int(broker.origin.rpartition(":")[2])
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.refuse()
        self.cut()
        if self._serving:
            await asyncio.wait(self._serving)

    def url(self, channel: str) -> str:
        return f"http://127.0.0.1:{self._port}{BASE_PATH}/{channel}"

    async def accept(self) -> None:
        self._server = await asyncio.start_server(self._begin, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """No new connections; those that stand go on."""
        self._server.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name="proxy")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_connection("127.0.0.1", self._broker_port)
        self._writers |= {writer, to_broker}
        await asyncio.gather(self._pump(reader, to_broker), self._pump(from_broker, writer))
        self._writers -= {writer, to_broker}

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if self.loses_deletes and data.startswith(b"DELETE "):
                    self.lost.release()
                    break
                sink.write(data)
                await sink.drain()
        sink.close()


@pytest.fixture
async def proxy(broker: Broker) -> AsyncIterator[Proxy]:
    async with Proxy(broker) as proxy:
        yield proxy


async def half_written(broker: Broker, publisher: Publisher) -> OutgoingSegment:
    """The first segment: four bytes of it are at the broker, and the next one is connected."""
    segment = await publisher.open_segment()
    await segment.write(b"half")
    await broker.channels["ch"].wait_for(lambda channel: channel.counters.bytes_in == 4)
    await broker.wait_for_writer("ch", 1)
    return segment


async def until_closed(publisher: Publisher) -> str | None:
    await asyncio.wait_for(publisher.closed.wait(), 20)
    return publisher.closed_reason


def data_of(broker: Broker, seq: int) -> bytes | None:
    segment = broker.channels["ch"].segment(seq)
    return None if segment is None else segment.data


async def test_first_segment_is_connected_on_entering_and_the_next_on_opening(
    broker: Broker, publisher: Publisher
) -> None:
    await broker.wait_for_writer("ch", 0)
    segment = await publisher.open_segment()
    await broker.wait_for_writer("ch", 1)
    assert broker.channels["ch"].at_work("POST", 2) == 0
    assert broker.channels["ch"].counters.bytes_in == 0
    await segment.write(b"x")
    await segment.close()
    assert (segment.seq, data_of(broker, 0)) == (0, b"x")


async def test_close_means_that_the_bytes_arrived(broker: Broker, publisher: Publisher) -> None:
    payload = bytes(range(256)) * 20_000  # more than the buffer and the sockets hold
    for seq in range(3):
        segment = await publisher.open_segment()
        for start in range(0, len(payload), 100_000):
            await segment.write(payload[start : start + 100_000])
        await segment.close()
        held = broker.channels["ch"].segment(seq)
        assert held is not None
        assert held.closed
        assert held.data == payload
    assert publisher.counters.segments == 3


async def test_publishing_at_once_gives_each_its_own_index(broker: Broker, publisher: Publisher) -> None:
    seqs = await asyncio.gather(*(publisher.publish(b"event %d" % number) for number in range(4)))
    assert sorted(seqs) == [0, 1, 2, 3]
    for number, seq in enumerate(seqs):
        assert data_of(broker, seq) == b"event %d" % number


async def test_idle_post_outlives_100_continue(broker: Broker, publisher: Publisher) -> None:
    await broker.channels["ch"].wait_for(lambda channel: channel.counters.continues >= 3)
    assert await publisher.publish(b"x") == 0
    assert broker.channels["ch"].counters.posts == 2  # index 0, and index 1 ahead of it
    assert publisher.counters.retries == 0


async def test_content_type_creates_a_channel_with_it(http: aiohttp.ClientSession) -> None:
    async with Broker(auto_create=True) as broker:
        async with Publisher(http, f"{broker.url}/new/", content_type="application/json") as publisher:
            await publisher.publish(b"{}")
        assert broker.channels["new"].mime == "application/json"


async def test_channel_deleted_while_idle_is_noticed_at_once(broker: Broker, publisher: Publisher) -> None:
    await broker.wait_for_writer("ch", 0)
    await broker.delete("ch")
    assert await until_closed(publisher) == "closed header"
    with pytest.raises(ChannelClosed, match="closed header"):
        await publisher.open_segment()
    with pytest.raises(ChannelClosed):
        await publisher.publish(b"x")


async def test_channel_deleted_while_a_segment_is_written(broker: Broker, publisher: Publisher) -> None:
    segment = await publisher.open_segment()
    await segment.write(b"half")
    await broker.wait_for_writer("ch", 1)
    await broker.delete("ch")
    await until_closed(publisher)
    with pytest.raises(ChannelClosed):
        await segment.write(b"more")
    with pytest.raises(ChannelClosed):
        await segment.close()


async def test_unknown_channel_is_over_at_once(broker: Broker, http: aiohttp.ClientSession) -> None:
    async with Publisher(http, f"{broker.url}/none", content_type="x/y", timing=TIMING) as publisher:
        assert await until_closed(publisher) == "404"


async def test_delete_ends_the_channel_for_all(broker: Broker, publisher: Publisher) -> None:
    await publisher.publish(b"x")
    await publisher.delete()
    assert "ch" not in broker.channels
    assert await until_closed(publisher) == "deleted"
    with pytest.raises(ChannelClosed, match="deleted"):
        await publisher.open_segment()


async def test_leaving_publishes_nothing_more(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    channel = broker.channels["ch"]
    async with Publisher(http, url, content_type="x/y", timing=TIMING) as publisher:
        await publisher.publish(b"x")
        await publisher.open_segment()  # and never written to
        await broker.wait_for_writer("ch", 2)
    await channel.wait_for(lambda channel: not any(channel.at_work("POST", seq) for seq in range(3)))
    assert channel.next_write == 1
    assert channel.counters.segments == 1
    with pytest.raises(ChannelClosed):
        await publisher.open_segment()


async def test_leaving_ends_an_open_segment_properly(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    async with Publisher(http, url, content_type="x/y", timing=TIMING) as publisher:
        segment = await publisher.open_segment()
        await segment.write(b"all of it")
    held = broker.channels["ch"].segment(0)
    assert held is not None
    assert (held.data, held.closed) == (b"all of it", True)


async def test_leaving_without_an_answer_keeps_its_deadline(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    broker.faults.stall("POST", "ch", 0, after_bytes=2)
    timing = replace(TIMING, close_s=0.05)
    async with Publisher(http, url, content_type="x/y", timing=timing) as publisher:
        segment = await publisher.open_segment()
        await segment.write(b"abcd")
    assert publisher.counters.failed == 1
    assert broker.channels["ch"].counters.deletes == 1


async def test_post_that_fails_before_the_first_byte_is_repeated_at_its_index(
    broker: Broker, http: aiohttp.ClientSession
) -> None:
    url = broker.create("ch")
    faults = [broker.faults.reset("POST", "ch", 0), broker.faults.answer("POST", "ch", 0, status=503)]
    async with Publisher(http, url, content_type="x/y", timing=TIMING) as publisher:
        for fault in faults:
            await asyncio.wait_for(fault.taken.wait(), 10)
        assert await publisher.publish(b"x") == 0
        assert publisher.counters.retries == 2
    assert data_of(broker, 0) == b"x"


async def test_idle_post_that_is_reset_is_connected_again(broker: Broker, publisher: Publisher) -> None:
    await publisher.publish(b"x")
    fault = broker.faults.reset("POST", "ch", 2)
    assert await publisher.publish(b"y") == 1
    await asyncio.wait_for(fault.taken.wait(), 10)
    await broker.channels["ch"].wait_for(lambda channel: channel.counters.posts >= 4)
    assert await publisher.publish(b"z") == 2
    assert publisher.counters.retries == 1
    assert publisher.counters.failed == 0


async def test_segment_cut_off_half_way_is_ended_and_the_next_one_goes_on(
    broker: Broker, publisher: Publisher, http: aiohttp.ClientSession
) -> None:
    broker.faults.reset("POST", "ch", 1, after_bytes=4)
    await publisher.publish(b"x")
    segment = await publisher.open_segment()
    await segment.write(b"01234567")
    with pytest.raises(ChannelError, match="cut off"):
        await segment.close()
    held = broker.channels["ch"].segment(1)
    assert held is not None
    assert (held.data, held.closed) == (b"0123", True)  # DELETE released its readers
    assert await publisher.publish(b"y") == 2
    assert publisher.counters.failed == 1
    assert not publisher.closed.is_set()


async def test_segment_closed_by_the_server_fails_and_the_next_one_goes_on(
    broker: Broker, publisher: Publisher, http: aiohttp.ClientSession
) -> None:
    segment = await publisher.open_segment()
    await broker.wait_for_writer("ch", 0)
    async with http.delete(f"{publisher.url}/0"):
        pass
    await asyncio.wait({segment._post.task}, timeout=10)
    with pytest.raises(ChannelError, match="closed by the server"):
        await segment.write(b"x")
    assert await publisher.publish(b"x") == 1
    assert publisher.counters.refused == 1


async def test_idle_post_whose_segment_is_closed_moves_to_the_next_index(
    broker: Broker, publisher: Publisher, http: aiohttp.ClientSession
) -> None:
    await broker.wait_for_writer("ch", 0)
    async with http.delete(f"{publisher.url}/0"):
        pass
    await broker.wait_for_writer("ch", 1)
    assert await publisher.publish(b"x") == 1


async def test_publisher_that_does_not_resume_loses_nothing_to_finished_segments(
    broker: Broker, http: aiohttp.ClientSession
) -> None:
    url = broker.create("ch")
    async with Publisher(http, url, content_type="x/y", timing=TIMING) as first:
        for _ in range(3):
            await first.publish(b"old")
    async with Publisher(http, url, content_type="x/y", timing=TIMING) as second:
        await broker.channels["ch"].wait_for(lambda channel: channel.counters.refused_posts == 3)
        await broker.channels["ch"].wait_for(lambda channel: channel.at_work("POST", 3) == 1)
        assert await second.publish(b"new") == 3
    assert [data_of(broker, seq) for seq in range(4)] == [b"old", b"old", b"old", b"new"]


async def test_restart_resumes_after_what_is_there_and_releases_readers(
    broker: Broker, http: aiohttp.ClientSession
) -> None:
    url = broker.create("ch")
    broker.faults.reset("POST", "ch", 2, after_bytes=4)
    for seq in range(2):
        async with http.post(f"{url}/{seq}", data=b"old"):
            pass
    with pytest.raises(aiohttp.ClientError):
        await http.post(f"{url}/2", data=b"abandoned")
    held = broker.channels["ch"].segment(2)
    assert held is not None
    assert not held.closed
    async with Publisher(http, url, content_type="x/y", resume=True, timing=TIMING) as publisher:
        await broker.wait_for_writer("ch", 3)
        assert held.closed
        assert await publisher.publish(b"new") == 3


async def test_resume_on_an_ended_channel_is_over(broker: Broker, http: aiohttp.ClientSession) -> None:
    async with Publisher(http, f"{broker.url}/none", content_type="x/y", resume=True, timing=TIMING) as publisher:
        assert publisher.closed_reason == "404"
        with pytest.raises(ChannelClosed):
            await publisher.publish(b"x")


async def test_resume_asks_again_after_a_failure(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    broker.faults.answer("GET", "ch/next", status=502)
    async with Publisher(http, url, content_type="x/y", resume=True, timing=TIMING) as publisher:
        assert await publisher.publish(b"x") == 0


async def test_server_that_takes_nothing_holds_the_writer_back_and_then_costs_the_segment(
    broker: Broker, http: aiohttp.ClientSession
) -> None:
    url = broker.create("ch")
    broker.faults.stall("POST", "ch", 0, after_bytes=1)
    timing = replace(TIMING, write_s=0.1, buffer_bytes=100_000)
    async with Publisher(http, url, content_type="x/y", timing=timing) as publisher:
        segment = await publisher.open_segment()
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await segment.write(bytes(50_000))
                sent += 50_000

        with pytest.raises(ChannelError, match=r"took nothing for 0\.1 s"):
            await flood()
        assert sent < 64 << 20  # what sockets and buffers hold
        assert broker.channels["ch"].counters.deletes == 1
        assert await publisher.publish(b"next") == 1


async def test_write_larger_than_the_buffer_is_taken(broker: Broker, http: aiohttp.ClientSession) -> None:
    timing = replace(TIMING, buffer_bytes=10)
    async with Publisher(http, broker.create("ch"), content_type="x/y", timing=timing) as publisher:
        assert await publisher.publish(bytes(100_000)) == 0
    assert data_of(broker, 0) == bytes(100_000)


async def test_segment_aborted_by_its_writer_is_ended_for_readers(broker: Broker, publisher: Publisher) -> None:
    segment = await publisher.open_segment()
    await segment.write(b"half")
    await broker.channels["ch"].wait_for(lambda channel: channel.counters.bytes_in == 4)
    await segment.abort()
    held = broker.channels["ch"].segment(0)
    assert held is not None
    assert (held.data, held.closed) == (b"half", True)
    with pytest.raises(ChannelError, match="aborted"):
        await segment.write(b"more")


@pytest.mark.parametrize("how", ["cut off", "aborted"])
async def test_segment_given_up_while_nothing_gets_through_is_ended_once_the_way_is_open(
    broker: Broker, proxy: Proxy, http: aiohttp.ClientSession, how: str
) -> None:
    broker.create("ch")
    channel = broker.channels["ch"]
    async with Publisher(http, proxy.url("ch"), content_type="x/y", timing=TIMING) as publisher:
        segment = await half_written(broker, publisher)
        async with http.get(f"{broker.url}/ch/0") as reader:
            proxy.refuse()
            if how == "cut off":
                proxy.cut()
                await asyncio.wait({segment._post.task}, timeout=10)
            else:
                await segment.abort()
            with pytest.raises(ChannelError, match=how):
                await segment.close()
            assert channel.counters.deletes == 0
            await proxy.accept()
            assert await asyncio.wait_for(reader.read(), 10) == b"half"
        assert channel.next_write == 1  # nothing that follows has pushed it out
        assert await publisher.publish(b"next") == 1
    assert channel.counters.deletes == 1


async def test_leaving_does_not_wait_for_a_segment_that_could_not_be_ended(
    broker: Broker, proxy: Proxy, http: aiohttp.ClientSession
) -> None:
    broker.create("ch")
    timing = replace(TIMING, delete_first_s=60)
    async with Publisher(http, proxy.url("ch"), content_type="x/y", timing=timing) as publisher:
        segment = await half_written(broker, publisher)
        proxy.refuse()
        await segment.abort()
        (deleting,) = publisher._deleting.values()
    assert deleting.cancelled()
    assert broker.channels["ch"].counters.deletes == 0


async def test_segment_that_cannot_be_ended_is_left_alone_once_the_ring_has_no_place_for_it(
    broker: Broker, proxy: Proxy, http: aiohttp.ClientSession
) -> None:
    broker.create("ch")
    async with Publisher(http, proxy.url("ch"), content_type="x/y", timing=TIMING) as publisher:
        segment = await half_written(broker, publisher)
        held = broker.channels["ch"].segment(0)
        assert held is not None
        proxy.loses_deletes = True
        await segment.abort()
        (deleting,) = publisher._deleting.values()
        for seq in range(1, 4):
            assert await publisher.publish(b"x") == seq
        while not proxy.lost.locked():
            await proxy.lost.acquire()
        await asyncio.wait_for(proxy.lost.acquire(), 10)  # one more, with index 4 connected
        assert not held.closed
        assert await publisher.publish(b"x") == 4
        await broker.wait_for_writer("ch", 5)
        assert held.closed
        await asyncio.wait_for(deleting, 10)
        assert not publisher._deleting


async def test_finish_does_not_wait_for_the_server(broker: Broker, publisher: Publisher) -> None:
    fault = broker.faults.stall("POST", "ch", 0, after_bytes=1)
    segment = await publisher.open_segment()
    await segment.write(b"x")
    await segment.finish()
    with pytest.raises(RuntimeError, match="finished"):
        await segment.write(b"y")
    assert await publisher.publish(b"y") == 1
    fault.release()
    await segment.close()


async def test_server_that_is_gone_ends_the_channel_after_a_while(http: aiohttp.ClientSession) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/ch"
        timing = replace(TIMING, unreachable_s=0.1)
        async with Publisher(http, url, content_type="x/y", timing=timing) as publisher:
            segment = await publisher.open_segment()
            await segment.write(b"x")
            assert await until_closed(publisher) == "unreachable"
            with pytest.raises(ChannelClosed):
                await segment.close()


async def test_server_that_comes_back_finds_the_idle_post(http: aiohttp.ClientSession) -> None:
    async with Broker(timing=BROKER_TIMING) as broker:
        port = int(broker.origin.rpartition(":")[2])
        url = broker.create("ch")
        publisher = Publisher(http, url, content_type="x/y", timing=TIMING)
        await publisher.__aenter__()
        await broker.wait_for_writer("ch", 0)
        broker._channels.clear()  # gone without a word to anybody
    async with Broker(port=port, timing=BROKER_TIMING) as broker:
        # The channel is unknown to the server that came back: over, as protocol and gateway see it.
        assert await until_closed(publisher) == "404"
        await publisher.aclose()


async def test_leaving_closes_every_socket(broker: Broker) -> None:
    """Whatever state the segments are in: idle, half written, stalled, acknowledged."""
    process = psutil.Process()
    before = process.num_fds()
    broker.faults.stall("POST", "ch", 2, after_bytes=1)
    async with open_http() as http:
        timing = replace(TIMING, close_s=0.05)
        async with Publisher(http, broker.create("ch"), content_type="x/y", timing=timing) as publisher:
            async with Subscriber(http, publisher.url) as subscriber:
                await publisher.publish(b"x")
                assert (await anext(subscriber)).seq == 0
                for _ in range(2):
                    await (await publisher.open_segment()).write(b"half")
                await broker.wait_for_writer("ch", 3)
            assert process.num_fds() > before
    broker.faults.clear()
    channel = broker.channels["ch"]
    await channel.wait_for(lambda channel: not any(channel.at_work("POST", seq) for seq in range(4)))
    await channel.wait_for(lambda channel: not any(channel.at_work("GET", seq) for seq in range(2)))
    for _ in range(100):  # the loop closes a transport one round after its protocol has ended
        if process.num_fds() == before:
            break
        await asyncio.sleep(0.02)
    assert process.num_fds() == before


async def test_writer_that_is_cancelled_leaves_the_publisher_usable(broker: Broker, publisher: Publisher) -> None:
    fault = broker.faults.stall("POST", "ch", 0, after_bytes=1)
    task: asyncio.Task[Any] = asyncio.create_task(publisher.publish(b"xy"))
    await asyncio.wait_for(fault.taken.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await publisher.publish(b"z") == 1
    fault.release()
