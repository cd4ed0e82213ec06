"""Bad networks, slow peers, confused callers (protocol.md 6.3): the stream goes on, and what it shows is in order."""

import asyncio
import itertools
import random
from pathlib import Path

import pytest

from gateway_shim.localnet.numbered import write_clip
from gateway_shim.stream import session
from gateway_shim.trickle.publisher import Publisher
from tests.fakes.network import LiveStream, network
from tests.fakes.ts_edit import shifted

from .test_stream_faults import published_until, read_until, segments

#: What a control channel may carry that is no update.
ANY = (None, [], [None], 0, -1.5, True, "", "x", {}, {"prompts": None}, {"keep": 1}, b"", b"\xff", b"[" * 9999)


def in_order(pts: list[int]) -> bool:
    return all(earlier < later for earlier, later in itertools.pairwise(pts))


async def test_input_that_begins_late_is_waited_for(tmp_path: Path) -> None:
    """A gateway starts the stream when the job is accepted; its user connects when he likes (protocol.md 3.4)."""
    (first,) = segments(tmp_path, 1)
    async with network(tmp_path, input_timeout_s=1.0) as net:
        stream = await net.start()
        await stream.event("status")
        await asyncio.sleep(2.5)
        assert net.shim.streams.active, "the limit is for an input that has begun"
        await stream.publish_bytes(first)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(30))


async def test_input_that_never_begins_ends_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FIRST_INPUT_S", 1.0)
    async with network(tmp_path) as net:
        stream = await net.start()
        stopped = await stream.event("stream_stopped")
        await net.shim.streams.wait_idle()
    assert "no input for 1 s" in stopped["message"]


async def test_pauses_just_below_the_limit_are_survived_again_and_again(tmp_path: Path) -> None:
    parts = segments(tmp_path, 3)
    async with network(tmp_path, input_timeout_s=3.0) as net:
        stream = await net.start()
        for index, part in enumerate(parts):
            if index:
                await asyncio.sleep(2.2)
            await stream.publish_bytes(shifted(part, index * 2 * 90_000))
            await published_until(stream, (index + 1) * 30)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(90))


async def test_segment_of_thirty_five_seconds_comes_out_in_short_ones(tmp_path: Path) -> None:
    """A gateway abandons a worker that does not finish an output segment in 30 s (protocol.md 1.8)."""
    clip = write_clip(tmp_path / "a.ts", frames=1050, width=160, height=64, audio="aac", gop=1050)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(clip.read_bytes())
        await published_until(stream, 1050)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(1050))
    assert received.arrivals.segments >= 17
    assert received.arrivals.keyless_segments == 0


async def test_segment_that_is_never_written_costs_itself_alone(tmp_path: Path) -> None:
    parts = segments(tmp_path, 3)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(parts[0])
        await published_until(stream, 30)
        for seq in (2, 3):  # nobody ever posts 1
            async with net.http.post(f"{stream.urls['subscribe_url']}/{seq}", data=parts[seq - 1]) as answer:
                assert answer.status == 200
        await published_until(stream, 90)
        await net.broker.delete(stream.id)
        received = await stream.received()
    assert received.numbers == list(range(90))


async def test_output_deleted_under_us_is_told_on_the_events_channel(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=300, width=128, height=64)
    async with network(tmp_path) as net:
        stream = await net.start()
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        await published_until(stream, 20)
        await net.broker.delete("cam-out")  # while a segment is being written
        stopped = await stream.event("stream_stopped")
        await net.shim.streams.wait_idle()
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    assert "channel is over" in stopped["message"]
    frames = stopped["frames"]
    assert frames["in_flight"] == 0


async def test_control_takes_any_value_and_then_an_update(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        stream = await net.start()
        for value in ANY:
            await stream.control(value)
        await stream.control({"max_framerate": 30})
        await stream.event("params_updated")
        assert list(net.shim.streams.active) == ["cam"]


def assert_in_order(numbers: list[int], cuts: int) -> None:
    """cuts: output segments that were cut off. The last picture of each may be a stump, and the viewer's decoder
    hides that: it shows what it had before, once more."""
    shown: list[int] = []
    for number in numbers:
        if not shown or number > shown[-1]:
            shown.append(number)
    assert len(numbers) - len(shown) <= cuts, numbers


@pytest.mark.parametrize("during", ["get", "post", "both"])
async def test_broker_that_restarts_with_its_memory_costs_no_stream(tmp_path: Path, during: str) -> None:
    parts = segments(tmp_path, 4)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(parts[0])
        await published_until(stream, 30 if during == "get" else 10)
        if during == "both":
            net.broker.faults.reset("GET", "cam", 1, after_bytes=len(parts[1]) // 2)
        await net.broker.restart(memory=True)
        # The gateway's connections were reset as ours; it goes on behind what is there, as it does.
        async with Publisher(net.http, stream.urls["subscribe_url"], content_type="video/MP2T", resume=True) as again:
            for part in parts[1:]:
                await again.publish(part)
            await read_until(stream, 4)
            await published_until(stream, 90)
        await net.broker.delete(stream.id)
        received = await stream.received()
        stopped = await stream.event("stream_stopped")
    assert set(range(90, 120)) <= set(received.numbers)
    assert_in_order(received.numbers, cuts=1)
    assert in_order(received.pts)
    assert stopped["frames"]["received"] == 120, "nothing of the input is lost: it is read again where it was cut"


@pytest.mark.parametrize("seed", range(4))
async def test_stalls_and_resets_on_both_ways_keep_the_order(tmp_path: Path, seed: int) -> None:
    """Stalls of 0.1 to 2 s and connections that are reset, each in the middle of a segment."""
    chance = random.Random(seed)
    clip = write_clip(tmp_path / "a.ts", frames=240, width=160, height=64, audio="aac")
    async with network(tmp_path) as net:
        stream = await net.start()
        cuts = 0
        for method, channel in (("GET", "cam"), ("POST", "cam-out")):
            for seq in range(1, 4):
                at = chance.randrange(1, 8000)
                if chance.random() < 0.6:
                    net.broker.faults.stall(method, channel, seq, after_bytes=at, seconds=chance.uniform(0.1, 2.0))
                else:
                    net.broker.faults.reset(method, channel, seq, after_bytes=at)
                    cuts += method == "POST"
        await stream.publish(clip, realtime=True)
        await read_until(stream, 4)
        await stream.end_input()
        received = await stream.received()
        stopped = await stream.event("stream_stopped")
    assert stopped["frames"]["received"] == 240, "what was cut off is read again"
    assert stopped["frames"]["in_flight"] == 0
    assert_in_order(received.numbers, cuts)
    assert in_order(received.pts)
    assert received.arrivals.keyless_segments == 0
    assert len(received.numbers) > 100


async def test_line_that_is_too_slow_for_a_while_costs_frames_and_no_stream(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=240, width=160, height=64)
    async with network(tmp_path) as net:
        stream = await net.start()
        net.broker.faults.limit("POST", "cam-out", bytes_per_s=4000, seconds=3.0)
        await stream.publish(clip, realtime=True)
        await stream.end_input()
        received = await stream.received()
        stopped = await stream.event("stream_stopped")
    assert stopped["frames"]["received"] == 240
    assert stopped["frames"]["in_flight"] == 0
    assert in_order(received.pts)
    assert received.numbers == sorted(set(received.numbers))
    assert set(range(210, 240)) <= set(received.numbers), "once the line is as it was, nothing is missing"


async def test_two_starts_with_one_id_are_one_stream(tmp_path: Path) -> None:
    async with network(tmp_path, capacity=4) as net:
        urls = {"events_url": net.broker.create("a-events"), "control_url": net.broker.create("a-control")}
        body = {"gateway_request_id": "a", **urls}
        answers = await asyncio.gather(*(net.post("/stream/start", body) for _ in range(5)))
        assert [status for status, _ in answers] == [200] * 5
        assert list(net.shim.streams.active) == ["a"]
        other = body | {"events_url": net.broker.create("b-events")}
        results = await asyncio.gather(*(net.post("/stream/start", other) for _ in range(3)))
        assert {status for status, _ in results} == {409}
        assert list(net.shim.streams.active) == ["a"]


async def told_to_stop(stream: LiveStream, reason: str) -> None:
    status, _ = await stream.network.post("/stream/stop", reason, **{"X-Stream-Id": stream.id})
    assert status == 200


async def test_stops_of_a_stream_that_is_over_leave_its_successor_alone(tmp_path: Path) -> None:
    (part,) = segments(tmp_path, 1)
    async with network(tmp_path) as net:
        first = await net.start("one")
        await first.event("status")
        await asyncio.gather(*(told_to_stop(first, "stream ended") for _ in range(3)))
        second = await net.start("two")
        await told_to_stop(first, "late")
        await second.publish_bytes(part)
        await told_to_stop(first, "later")
        await second.end_input()
        assert (await second.received()).numbers == list(range(30))
