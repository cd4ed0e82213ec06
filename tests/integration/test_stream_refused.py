"""A workflow that an engine cannot run: another engine is asked, and what is only a lack of memory is tried again."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.backend import GraphFailed
from gateway_shim.localnet.numbered import write_clip
from gateway_shim.stream import inference
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.network import LiveStream, Network, network

pytestmark = pytest.mark.timeout(60)


class Refusing(StubBackend):
    """Builds fail ``times`` times, with ``code``."""

    def __init__(self, times: int, code: str = "out_of_memory") -> None:
        super().__init__()
        self.times = times
        self.code = code
        self.builds = 0

    def build(self, *arguments: Any) -> Any:
        self.builds += 1
        if self.builds <= self.times:
            raise GraphFailed("CUDA out of memory", code=self.code, node_id="5", class_type="Level")
        return (yield from super().build(*arguments))


@contextlib.asynccontextmanager
async def over(directory: Path, *backends: StubBackend) -> AsyncIterator[tuple[Network, LiveStream]]:
    """A stream on engines with these backends."""
    clip = write_clip(directory / "a.ts", frames=30, rate=15, gop=15)
    async with network(directory, engine=False, engines=len(backends)) as net:
        for number, backend in enumerate(backends):
            net._backend = backend
            await net.start_engine(number)
        stream = await net.start(params={"prompts": json.loads(workflow(level=200))})
        publishing = asyncio.create_task(stream.publish(clip, loops=30, realtime=True))
        try:
            yield net, stream
        finally:
            publishing.cancel()
            await asyncio.wait({publishing})
            await net.post("/stream/stop", {}, **{"X-Stream-Id": "cam"})


async def processed(net: Network) -> None:
    while not (await net.get("/stream/status"))["streams"]["cam"]["frames"]["processed"]:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def test_memory_that_was_short_for_a_moment_costs_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MEMORY_FIRST_S", 0.2)
    backend = Refusing(2)
    async with over(tmp_path, backend) as (net, stream):
        error = await stream.event("error", reason="workflow_refused")
        assert "CUDA out of memory; it is tried again in 0 s" in error["message"]
        await processed(net)
        assert backend.builds == 3
        assert net.shim.engines[0].restarts == 0


async def test_another_engine_has_the_memory_that_one_lacks(tmp_path: Path) -> None:
    first, second = Refusing(1000), Refusing(0)
    async with over(tmp_path, first, second) as (net, stream):
        await processed(net)
        assert (first.builds, second.builds) in {(1, 1), (0, 1)}
        assert not [event for event in stream.events if event.get("type") == "error"]


async def test_a_workflow_that_fails_otherwise_is_asked_of_each_engine_once(tmp_path: Path) -> None:
    backends = [Refusing(1000, "node_failed"), Refusing(1000, "node_failed")]
    async with over(tmp_path, *backends) as (net, stream):
        await stream.event("error", reason="workflow_refused")
        await stream.flow(30)
        assert [backend.builds for backend in backends] == [1, 1]
        for backend in backends:
            backend.times = 0
        status, answer = await net.post("/stream/params", {"prompts": json.loads(workflow(level=100))})
        assert status == 200, answer
        await processed(net)
