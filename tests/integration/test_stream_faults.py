"""What goes wrong on the network's side (protocol.md 6.3, 9): the stream survives, or ends as it should."""

import asyncio
from pathlib import Path

import pytest

from gateway_shim.localnet.numbered import write_clip
from gateway_shim.trickle.publisher import Publisher
from tests.fakes.network import LiveStream, network
from tests.fakes.ts_edit import shifted

FRAME = 3000  # ticks at 30 fps


def segments(directory: Path, count: int, frames: int = 30) -> list[bytes]:
    """Consecutive segments of numbered frames, each a transport stream of its own, as a gateway writes them."""
    return [
        shifted(
            write_clip(
                directory / f"segment-{index}.ts", frames=frames, audio="aac", first_number=index * frames
            ).read_bytes(),
            index * frames * FRAME,
        )
        for index in range(count)
    ]


async def published_until(stream: LiveStream, number: int) -> None:
    """Wait until this many frames have gone out."""
    session = stream.network.shim.streams.active[stream.id]
    while session.status()["frames"]["published"] < number:  # noqa: ASYNC110  # a counter makes no event
        await asyncio.sleep(0.02)


async def read_until(stream: LiveStream, seq: int) -> None:
    """Wait until the stream has read everything before this segment: it asks for it."""
    await stream.network.broker.wait_for_reader(stream.id, seq)


async def test_empty_segment_is_no_end(tmp_path: Path) -> None:
    first, second = segments(tmp_path, 2)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(first)
        await stream.publish_bytes(b"")
        await stream.publish_bytes(second)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(60))


async def test_reset_in_the_middle_of_a_segment_loses_at_most_that_segment(tmp_path: Path) -> None:
    parts = segments(tmp_path, 3)
    async with network(tmp_path) as net:
        stream = await net.start()
        net.broker.faults.reset("GET", "cam", 1, after_bytes=len(parts[1]) // 2)
        for part in parts:
            await stream.publish_bytes(part)
        await read_until(stream, 3)
        await stream.end_input()
        received = await stream.received()
    assert set(received.numbers) >= {*range(30), *range(60, 90)}
    assert received.numbers == sorted(set(received.numbers))


async def test_corrupt_bytes_spoil_some_frames_and_no_more(tmp_path: Path) -> None:
    parts = segments(tmp_path, 3)
    async with network(tmp_path) as net:
        stream = await net.start()
        net.broker.faults.corrupt("GET", "cam", 1, after_bytes=len(parts[1]) // 3, length=1000)
        for part in parts:
            await stream.publish_bytes(part)
        await read_until(stream, 3)
        await stream.end_input()
        received = await stream.received()
    assert set(received.numbers) >= {*range(30), *range(60, 90)}, "the segments around it are whole"
    assert received.numbers == sorted(set(received.numbers))


async def test_bytes_that_are_no_transport_stream_are_survived(tmp_path: Path) -> None:
    first, second = segments(tmp_path, 2)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(first)
        await stream.publish_bytes(b"this is not video " * 5000)
        await stream.publish_bytes(second)
        await read_until(stream, 3)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(60))


async def test_publisher_that_gives_up_in_the_middle_of_a_segment_is_a_gap(tmp_path: Path) -> None:
    parts = segments(tmp_path, 3)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(parts[0])
        await published_until(stream, 30)
        publisher = await stream.publisher()
        segment = await publisher.open_segment()
        await segment.write(parts[1][: len(parts[1]) // 2])
        await published_until(stream, 31)
        # What go-livepeer's publisher does: it tells the broker that the segment will not be finished.
        async with net.http.delete(f"{stream.urls['subscribe_url']}/{segment.seq}") as response:
            assert response.status == 200
        async with Publisher(net.http, stream.urls["subscribe_url"], content_type="video/MP2T", resume=True) as again:
            await again.publish(parts[2])
        await published_until(stream, 61)
        await stream.end_input()
        received = await stream.received()
    assert set(received.numbers) >= {*range(30), *range(60, 90)}
    assert received.numbers == sorted(set(received.numbers))


async def test_reader_that_fell_behind_goes_on_at_the_live_edge(tmp_path: Path) -> None:
    parts = segments(tmp_path, 10, frames=10)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(parts[0])
        await published_until(stream, 10)
        # Its next GET hangs while the five-slot ring goes round.
        stall = net.broker.faults.stall("GET", "cam", 2)
        for part in parts[1:8]:
            await stream.publish_bytes(part)
        stall.release()
        await read_until(stream, 8)
        for part in parts[8:]:
            await stream.publish_bytes(part)
        await read_until(stream, 10)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == sorted(set(received.numbers))
    assert set(range(10)) <= set(received.numbers)
    assert set(range(80, 100)) <= set(received.numbers), "what came after it caught up"


@pytest.mark.timeout(60)
async def test_pause_of_ten_seconds_is_survived(tmp_path: Path) -> None:
    first, second = segments(tmp_path, 2)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(first)
        await asyncio.sleep(10)
        assert net.shim.streams.active["cam"].status()["state"] == "DEGRADED_INPUT"
        await stream.publish_bytes(shifted(second, 10 * 90_000))
        await stream.end_input()
        received = await stream.received()
    stills = received.numbers.count(29) - 1
    assert received.numbers == [*range(29), *[29] * (1 + stills), *range(30, 60)]
    assert 5 <= stills <= 12, "segments go on, of the last picture"
    assert received.pts[30 + stills] - received.pts[29] == FRAME + 10 * 90_000


async def test_input_deleted_while_it_is_read_ends_the_stream_in_order(tmp_path: Path) -> None:
    (first,) = segments(tmp_path, 1)
    async with network(tmp_path) as net:
        stream = await net.start()
        publisher = await stream.publisher()
        segment = await publisher.open_segment()
        await segment.write(first)
        await published_until(stream, 20)
        await net.broker.delete("cam")
        received = await stream.received()
        assert not net.shim.streams.active
        stopped = await stream.event("stream_stopped")
    assert received.numbers == list(range(30)), "what was there is played to its end"
    assert stopped["frames"]["in_flight"] == 0


async def test_output_deleted_under_us_ends_the_stream(tmp_path: Path) -> None:
    parts = segments(tmp_path, 3)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(parts[0])
        await published_until(stream, 30)
        await net.broker.delete("cam-out")
        for part in parts[1:]:
            await stream.publish_bytes(part)
        await net.shim.streams.wait_idle()
        await stream.event("stream_stopped")


async def test_control_channel_that_ends_ends_the_stream(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.event("status")
        await net.broker.delete("cam-control")
        await net.shim.streams.wait_idle()
        await stream.event("stream_stopped")


async def test_broker_that_restarts_without_memory_ends_the_stream(tmp_path: Path) -> None:
    (first,) = segments(tmp_path, 1)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(first)
        await published_until(stream, 20)
        await net.broker.restart()
        await net.shim.streams.wait_idle()


async def test_silence_of_the_input_ends_the_stream(tmp_path: Path) -> None:
    (first,) = segments(tmp_path, 1)
    async with network(tmp_path, input_timeout_s=2.0) as net:
        stream = await net.start()
        await stream.publish_bytes(first)
        await net.shim.streams.wait_idle()
        stopped = await stream.event("stream_stopped")
    assert "no input for 2 s" in stopped["message"]


@pytest.mark.parametrize("message", [None, 7, [1, 2], "text", b"{not json", {"keep": "alive"}, {"nobody": {"x": 1}}])
async def test_nothing_on_the_control_channel_hurts(tmp_path: Path, message: object) -> None:
    first, second = segments(tmp_path, 2)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(first)
        await published_until(stream, 20)
        await stream.control(message)
        await stream.publish_bytes(second)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(60))


async def test_status_goes_out_at_once_and_says_what_happens(tmp_path: Path) -> None:
    (first,) = segments(tmp_path, 1)
    async with network(tmp_path) as net:
        stream = await net.start()
        status = await stream.event("status")
        assert status["state"] == "LOADING"
        await stream.publish_bytes(first)
        await stream.event("runner_receive_first_ingest_segment")
        await stream.event("runner_send_first_processed_segment")
        assert (await net.get("/health"))["status"] == "OK"
        await stream.end_input()
        await stream.received()
        assert (await net.get("/health"))["status"] == "IDLE"


#: Numbers shown when the engine is away for frames 30 to 59.
WITH_HOLD = [*range(30), *[29] * 14, *range(44, 90)]


async def test_engine_that_goes_away_lets_frames_pass(tmp_path: Path) -> None:
    first, second = segments(tmp_path, 2)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(first)
        await published_until(stream, 30)
        await net.stop_engine()
        await stream.event("error", reason="engine_gone")
        assert (await net.get("/stream/status"))["status"] != "ERROR"
        await stream.publish_bytes(second)
        await stream.end_input()
        received = await stream.received()
        stopped = await stream.event("stream_stopped")
    assert received.numbers == WITH_HOLD[:60], "the last picture stands for half a second, then frames pass"
    frames = stopped["frames"]
    assert (frames["processed"], frames["passed_through"], frames["repeated"]) == (30, 16, 14)


async def test_engine_that_comes_back_takes_over_again(tmp_path: Path) -> None:
    first, second, third = segments(tmp_path, 3)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(first)
        await published_until(stream, 30)
        await net.stop_engine()
        await stream.event("error", reason="engine_gone")
        await stream.publish_bytes(second)
        await published_until(stream, 60)
        await net.start_engine()
        await stream.event("restart", restart_count=1)
        await stream.publish_bytes(third)
        await stream.end_input()
        received = await stream.received()
        stopped = await stream.event("stream_stopped")
    assert received.numbers == WITH_HOLD
    assert stopped["frames"]["processed"] == 60


async def test_stop_is_the_streams_own_and_may_come_twice(tmp_path: Path) -> None:
    (first,) = segments(tmp_path, 1)
    async with network(tmp_path, capacity=2) as net:
        one, two = await net.start("one"), await net.start("two")
        await two.publish_bytes(first)
        assert (await net.post("/stream/stop", None, **{"X-Stream-Id": "one"}))[0] == 200
        assert (await net.post("/stream/stop", None, **{"X-Stream-Id": "one"}))[0] == 200
        assert (await net.post("/stream/stop", None, **{"X-Stream-Id": "nobody"}))[0] == 200
        assert list(net.shim.streams.active) == ["two"]
        await one.event("stream_stopped")
        await two.end_input()
        assert (await two.received()).numbers == list(range(30))
