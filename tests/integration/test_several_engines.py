"""Several engine processes behind one shim: who serves which stream, and what one's death costs."""

import asyncio
from pathlib import Path

import pytest

from gateway_shim.localnet.numbered import write_clip
from tests.fakes.network import Network, network

pytestmark = pytest.mark.timeout(120)


async def opened(net: Network, sessions: int) -> list[int]:
    """Sessions of each engine once there are so many in all."""
    while sum(counts := [engine.sessions for engine in net.shim.engines]) != sessions:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return counts


async def home(net: Network, name: str) -> int:
    """The engine that a stream runs on, once its session is open and not only asked for."""
    while not any(served := [engine.served_at(name) > 0 for engine in net.shim.engines]):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return served.index(True)


async def test_another_engine_takes_over_when_one_dies(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=180)
    async with network(tmp_path, engines=2) as net:
        stream = await net.start()
        feed = asyncio.create_task(stream.publish(clip, realtime=True))
        await stream.flow(30)
        first = (await opened(net, 1)).index(1)
        await net.kill_engine(first)  # and nothing restarts it
        await stream.event("restart")
        assert net.shim.engines[1 - first].sessions == 1
        await feed
        await stream.end_input()
        await stream.received()
        frames = (await stream.event("stream_stopped"))["frames"]
        engines = (await net.get("/stream/status"))["additional_info"]["engines"]
    assert frames["received"] == frames["published"] == 180
    # A frame in flight, those until the loss is noticed, and those until the session is open; a restart takes 30.
    assert frames["processed"] >= 160, frames
    assert [engine["state"] for engine in engines] == ["DEAD" if number == first else "READY" for number in range(2)]


async def test_streams_spread_and_come_back_to_where_they_were(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=30)
    async with network(tmp_path, engines=2, capacity=4) as net:
        streams = []
        for name in "abcd":
            streams.append(await net.start(name))
            await streams[-1].publish(clip)
            counts = await opened(net, len(streams))
            assert max(counts) - min(counts) <= 1
        status = (await net.get("/stream/status"))["additional_info"]["engines"]
        assert [engine["sessions"] for engine in status] == [2, 2]
        assert all(0 <= engine["busy"] <= 1 and engine["device"]["type"] == "cpu" for engine in status)
        homes = {name: await home(net, name) for name in "abcd"}
        for stream in streams:
            await stream.end_input()
            await stream.received()
        await opened(net, 0)
        # One by one, the emptiest engine would be the same one each time.
        for name in "dcba":
            again = await net.start(name)
            await again.publish(clip)
            counts = await opened(net, 1)
            assert counts.index(1) == homes[name]
            await again.end_input()
            await again.received()
            await opened(net, 0)
