"""Faults of the network and of peers, injected into whole streams; docs/faults.md has the table."""

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway_shim.localnet.measure import latencies_ms
from gateway_shim.stream import events as stream_events
from gateway_shim.trickle import subscriber as trickle_subscriber
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
) -> tuple[list[int], list[float], dict[str, Any], Played]:
    """Play in real time while a fault is ordered. Gives the numbers that arrived, in order, their latencies in ms,
    the ledger, and what was played."""
    times = steady(30, seconds)
    path = write_timed(tmp_path / "source.nut", times)
    async with network(tmp_path) as net:
        stream = await net.start()
        fault(net, stream)
        publisher = await stream.publisher()
        played = await play(publisher, path)
        await stream.end_input()
        received = await stream.received()
        frames = (await stream.event("stream_stopped"))["frames"]
        farewell = [event for event in stream.events if event["type"] == "status"][-1]
        frames["lost_output_segments"] = farewell["lost_output_segments"]
        found = heard(received.path, times)
    pts_of = {number: pts for pts, number in found.pictures}
    sent = {pts_of[number]: at for number, at in played.frames.items() if number in pts_of}
    late = latencies_ms(sent, received.arrivals.video)
    assert frames["in_flight"] == 0
    assert frames["received"] == sum(frames[key] for key in ("processed", "failed", "passed_through", "dropped"))
    return [number for _, number in found.pictures], late, frames, played


# ---- input


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

    numbers, late, _, _ = await watched(tmp_path, 8, limit)
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

    numbers, late, frames, _ = await watched(tmp_path, 14, limit)
    assert len(numbers) > 30
    assert max(late) < 6000
    halves = late[: len(late) // 2], late[len(late) // 2 :]
    assert max(halves[1]) < max(halves[0]) + 1500, "the latency does not go on growing"
    assert frames["lost_output_segments"] >= 2


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
        (-1.5e308, True),
        ([{"max_framerate": 30}], True),
        (nested(100), None),
        ({"5": {"text": "x" * (1 << 20)}}, None),
        ({f"key{n}": n for n in range(50_000)}, None),
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


async def test_last_of_many_updates_counts_though_the_reader_was_held_up(tmp_path: Path) -> None:
    """More than the broker keeps, and nothing comes after them."""
    async with network(tmp_path) as net:
        held_up = net.broker.faults.stall("GET", "cam-control", 0)
        stream = await net.start()
        await held_up.taken.wait()
        for framerate in range(21, 30):
            await stream.control({"max_framerate": framerate})
        held_up.release()
        async with asyncio.timeout(30):
            await stream.event("params_updated", params={"max_framerate": 29})


# ---- engine


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
        while net.shim.engines[0].state.name != "LOADING":  # noqa: ASYNC110  # it says so to those who ask
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
