"""Faults of the network and of peers, injected into whole streams; docs/faults.md says which fault is tested where."""

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway_shim.localnet.measure import latencies_ms
from gateway_shim.stream import events as stream_events
from gateway_shim.stream import session as stream_session
from gateway_shim.trickle import subscriber as trickle_subscriber
from gateway_shim.trickle.publisher import Publisher
from gateway_shim.trickle.subscriber import SubscriberTiming
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.network import LiveStream, Network, network
from tests.fakes.timed import Played, heard, play, steady, write_timed
from tests.integration.test_stream_faults import published_until, segments

FRAME = 3000


async def watched(
    tmp_path: Path,
    seconds: float,
    fault: Callable[[Network, LiveStream], object],
    *,
    clip: dict[str, Any] | None = None,
    during: Callable[[Network, LiveStream], Coroutine[Any, Any, None]] | None = None,
) -> tuple[list[int], list[float], dict[str, Any], Played]:
    """Play in real time while a fault is ordered. Gives the numbers that arrived, in order, their latencies in ms,
    the ledger, and what was played."""
    times = steady(30, seconds)
    path = write_timed(tmp_path / "source.nut", times, **(clip or {}))
    async with network(tmp_path) as net:
        stream = await net.start()
        fault(net, stream)
        publisher = await stream.publisher()
        async with asyncio.TaskGroup() as both:
            playing = both.create_task(play(publisher, path))
            if during is not None:
                both.create_task(during(net, stream))
        played = playing.result()
        await stream.end_input()
        received = await stream.received()
        frames = (await stream.event("stream_stopped"))["frames"]
        found = heard(received.path, times)
    pts_of = {number: pts for pts, number in found.pictures}
    sent = {pts_of[number]: at for number, at in played.frames.items() if number in pts_of}
    late = latencies_ms(sent, received.arrivals.video)
    assert frames["in_flight"] == 0
    assert frames["received"] == sum(frames[key] for key in ("processed", "failed", "passed_through", "dropped"))
    return [number for _, number in found.pictures], late, frames, played


# ---- input


async def test_input_that_begins_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_session, "FIRST_INPUT_S", 3.0)
    (first,) = segments(tmp_path, 1)
    async with network(tmp_path, input_timeout_s=1.0) as net:
        stream = await net.start()
        await asyncio.sleep(1.8)
        assert net.shim.streams.active, "the limit for pauses is not that for the beginning"
        await stream.publish_bytes(first)
        await published_until(stream, 30)
        await stream.end_input()
        assert (await stream.received()).numbers == list(range(30))


async def test_input_that_never_begins_ends_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_session, "FIRST_INPUT_S", 1.0)
    async with network(tmp_path) as net:
        stream = await net.start()
        stopped = await stream.event("stream_stopped")
        await net.shim.streams.wait_idle()
    assert "no input for 1 s" in stopped["message"]


async def test_pause_just_below_the_limit_is_survived(tmp_path: Path) -> None:
    first, second, third = segments(tmp_path, 3)
    async with network(tmp_path, input_timeout_s=3.0) as net:
        stream = await net.start()
        for part in (first, second):
            await stream.publish_bytes(part)
            await published_until(stream, 30)
            await asyncio.sleep(2.2)
        await stream.publish_bytes(third)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(90))


async def test_segment_longer_than_every_wait_is_one_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty seconds and more, on a clock a hundred times as fast: no wait of ours bounds the whole segment."""
    timing = SubscriberTiming(refresh_s=0.4, silence_s=0.1, silence_max_s=0.2, unreachable_s=0.6)
    monkeypatch.setattr(trickle_subscriber, "SubscriberTiming", lambda: timing)
    times = steady(30, 4)
    path = write_timed(tmp_path / "source.nut", times, gop_s=10)
    async with network(tmp_path) as net:
        stream = await net.start()
        await play(await stream.publisher(), path, segment_s=10)
        counters = net.shim.streams.active["cam"]._intake._subscriber.counters
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(120))
    assert (counters.segments, counters.gaps, counters.abandoned, counters.resumed) == (1, 0, 0, 0)


async def test_segment_that_is_never_written_is_left_out(tmp_path: Path) -> None:
    parts = segments(tmp_path, 4)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(parts[0])
        await published_until(stream, 30)
        for seq, part in ((2, parts[2]), (3, parts[3])):
            async with net.http.post(f"{stream.urls['subscribe_url']}/{seq}", data=part) as response:
                assert response.status == 200
        await published_until(stream, 90)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == [*range(30), *range(60, 120)]


async def test_publisher_that_falls_silent_in_the_middle_of_a_segment_and_goes_on_with_the_next(
    tmp_path: Path,
) -> None:
    """Nobody deletes the segment: that it was given up shows in its successor alone."""
    parts = segments(tmp_path, 3)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(parts[0])
        publisher = await stream.publisher()
        left = await publisher.open_segment()
        await left.write(parts[1][: len(parts[1]) // 2])
        await published_until(stream, 31)
        assert not net.broker.channels["cam"].segment(1).closed
        async with net.http.post(f"{stream.urls['subscribe_url']}/2", data=parts[2]) as response:
            assert response.status == 200
        await published_until(stream, 61)
        assert not net.broker.channels["cam"].segment(1).closed, "our reader did not wait for its end"
        await stream.end_input()
        received = await stream.received()
    assert set(received.numbers) >= {*range(30), *range(60, 90)}
    assert received.numbers == sorted(set(received.numbers))


async def test_publisher_whose_connection_is_reset_in_the_middle_of_a_segment(tmp_path: Path) -> None:
    numbers, _, _, played = await watched(
        tmp_path, 5, lambda net, _: net.broker.faults.reset("POST", "cam", 2, after_bytes=5000)
    )
    assert numbers == sorted(set(numbers))
    assert set(numbers) >= {*range(60), *range(90, 150)} & set(played.frames), "no more than that segment is lost"


@pytest.mark.parametrize("seconds", [0.1, 0.5, 2.0])
async def test_input_that_stalls_loses_nothing_and_catches_up(tmp_path: Path, seconds: float) -> None:
    numbers, late, frames, _ = await watched(
        tmp_path, 5, lambda net, _: net.broker.faults.stall("GET", "cam", 1, after_bytes=3000, seconds=seconds)
    )
    assert numbers == list(range(150)), frames
    assert max(late[-30:]) < 1000, "the delay of the stall does not stay"


async def test_input_over_a_thin_line_falls_back_to_the_live_edge(tmp_path: Path) -> None:
    """Half of what the stream needs: the latency stays within the five segments that the broker keeps."""

    def limit(net: Network, _: LiveStream) -> None:
        net.broker.faults.limit("GET", "cam", bytes_per_s=15_000, seconds=60)

    numbers, late, _, played = await watched(tmp_path, 8, limit)
    assert numbers == sorted(set(numbers))
    assert len(numbers) > 30
    assert max(late) < 6500, "segments are one second long here"


# ---- output


@pytest.mark.parametrize("seconds", [0.1, 0.5, 2.0])
async def test_output_that_stalls_loses_nothing(tmp_path: Path, seconds: float) -> None:
    numbers, late, frames, _ = await watched(
        tmp_path, 6, lambda net, _: net.broker.faults.stall("POST", "cam-out", 1, after_bytes=3000, seconds=seconds)
    )
    assert numbers == list(range(180)), frames
    assert max(late[-30:]) < 1000, "the delay of the stall does not stay"


async def test_output_that_is_accepted_slowly_loses_nothing(tmp_path: Path) -> None:
    numbers, _, _, _ = await watched(
        tmp_path, 5, lambda net, _: net.broker.faults.stall("POST", "cam-out", 0, seconds=1.5)
    )
    assert numbers == list(range(150))


async def test_output_over_a_thin_line_drops_pictures_and_keeps_its_latency(tmp_path: Path) -> None:
    def limit(net: Network, _: LiveStream) -> None:
        net.broker.faults.limit("POST", "cam-out", bytes_per_s=8_000, seconds=60)

    numbers, late, _, _ = await watched(tmp_path, 14, limit)
    assert len(numbers) > 30
    assert max(late) < 6000
    halves = late[: len(late) // 2], late[len(late) // 2 :]
    assert max(halves[1]) < max(halves[0]) + 1500, "the latency does not go on growing"


async def test_output_deleted_while_it_is_written_ends_the_stream_with_an_event(tmp_path: Path) -> None:
    times = steady(30, 10)
    path = write_timed(tmp_path / "source.nut", times)
    async with network(tmp_path) as net:
        stream = await net.start()
        publisher = await stream.publisher()
        playing = asyncio.create_task(play(publisher, path))
        await published_until(stream, 40)
        await net.broker.delete("cam-out")
        stopped = await stream.event("stream_stopped")
        await net.shim.streams.wait_idle()
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
    assert "output channel" in stopped["message"] or "channel is over" in stopped["message"]


# ---- control


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"x": [value]}
    return value


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        (None, True),
        (True, True),
        (0, True),
        (-1.5e308, True),
        ("", True),
        ([], True),
        ([{"max_framerate": 30}], True),
        ({}, None),
        (nested(100), None),
        ({"5": {"text": "x" * (1 << 20)}}, None),
        ({f"key{n}": n for n in range(50_000)}, None),
        ({"keep": "alive", "and": "more"}, None),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, (bool, type(None))) else "",
)
async def test_any_json_on_control_is_answered_and_the_next_update_counts(
    tmp_path: Path, message: object, refused: bool | None
) -> None:
    (first,) = segments(tmp_path, 1)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.control(message)
        await stream.control({"max_framerate": 29})
        await stream.event("params_updated", params={"max_framerate": 29})
        told = [event for event in stream.events if event["type"] in ("error", "params_updated")]
        if refused:
            assert told[0]["type"] == "error", told
        await stream.publish_bytes(first)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers, "the stream went on"


# ---- broker, orchestrator


async def test_broker_that_restarts_with_its_memory_costs_little(tmp_path: Path) -> None:
    async def restart(net: Network, stream: LiveStream) -> None:
        await published_until(stream, 45)
        await net.broker.restart(memory=True)

    numbers, late, _, played = await watched(tmp_path, 6, lambda *_: None, during=restart)
    assert numbers == sorted(set(numbers))
    assert set(numbers) >= {*range(30), *range(120, 180)} & set(played.frames), numbers
    assert max(late[-30:]) < 1000


async def test_two_starts_with_one_id_at_the_same_time_are_one_stream(tmp_path: Path) -> None:
    (first,) = segments(tmp_path, 1)
    backend = StubBackend()
    async with network(tmp_path, backend=backend, capacity=2) as net:
        params = {"prompts": json.loads(workflow(level=60))}
        stream, _ = await asyncio.gather(net.start(params=params), net.start(params=params))
        assert list(net.shim.streams.active) == ["cam"]
        other = net.broker.create("other-out", "video/MP2T")
        status, _ = await net.post("/stream/start", {"gateway_request_id": "cam", "publish_url": other})
        assert status == 409
        await stream.publish_bytes(first)
        await stream.flow(30)
        assert net.shim.streams.active["cam"].status()["frames"]["received"] == 30


async def test_stop_of_the_stream_before_does_not_end_this_one(tmp_path: Path) -> None:
    (first,) = segments(tmp_path, 1)
    async with network(tmp_path) as net:
        before = await net.start("before")
        await before.event("status")
        for _ in range(2):
            assert (await net.post("/stream/stop", None, **{"X-Stream-Id": "before"}))[0] == 200
        now = await net.start("now")
        assert (await net.post("/stream/stop", None, **{"X-Stream-Id": "before"}))[0] == 200
        await now.publish_bytes(first)
        await now.end_input()
        assert (await now.received()).numbers == list(range(30))


async def test_stops_at_the_same_time_are_all_answered(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.event("status")
        stops = [net.post("/stream/stop", None, **{"X-Stream-Id": "cam"}) for _ in range(3)]
        assert [status for status, _ in await asyncio.gather(*stops)] == [200, 200, 200]
        await net.shim.streams.wait_idle()


async def test_engine_that_loads_for_longer_than_the_gateway_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events from the first moment and segments all along: neither watchdog of the gateway sees silence."""
    monkeypatch.setattr(stream_events, "STATUS_EVERY_S", 0.3)
    times = steady(30, 4)
    path = write_timed(tmp_path / "source.nut", times)
    async with network(tmp_path, engine=False) as net:
        backend = StubBackend()
        backend.may_load.clear()
        net._backend = backend
        starting = asyncio.create_task(net.start_engine())
        while not net.shim.engines[0].state.name == "LOADING":  # noqa: ASYNC110  # it says so to those who ask
            await asyncio.sleep(0.02)
        stream = await net.start(params={"prompts": json.loads(workflow())})
        await play(await stream.publisher(), path)
        told = [event["timestamp"] for event in stream.events if event["type"] == "status"]
        await stream.end_input()
        received = await stream.received()
        backend.may_load.set()
        await starting
    assert received.numbers == list(range(120))
    assert received.arrivals.segments >= 2
    assert max(after - before for before, after in itertools.pairwise(told)) < 1500


def gaps(numbers: Sequence[int]) -> int:
    return sum(after - before - 1 for before, after in itertools.pairwise(numbers))


async def test_resets_of_both_directions_at_random_moments(tmp_path: Path) -> None:
    def resets(net: Network, _: LiveStream) -> None:
        for seq, after in ((1, 100), (2, 9000), (4, 20_000)):
            net.broker.faults.reset("GET", "cam", seq, after_bytes=after)
        for seq, after in ((1, 500), (2, 4000)):
            net.broker.faults.reset("POST", "cam-out", seq, after_bytes=after)

    numbers, late, _, _ = await watched(tmp_path, 8, resets)
    assert numbers == sorted(set(numbers))
    assert gaps(numbers) < 60, "two output segments were cut"
    assert max(late[-30:]) < 1000
