"""kill -9 of the shim in the middle of a stream: the next one goes on with it, or gives it away at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway_shim.localnet import probe
from gateway_shim.localnet.broker import Broker
from gateway_shim.localnet.live_stream import LiveStream
from gateway_shim.localnet.numbered import write_clip
from gateway_shim.localnet.source import publish_file
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import Publisher
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.engine_client import running_engine, settings_for

from .appliance import DEADLINE_S, NAME, Appliance, ready, streaming
from .test_shim_program import shim

CHANNELS = {"subscribe": "", "publish": "-out", "control": "-control", "events": "-events"}

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]


@asynccontextmanager
async def watched(stream: LiveStream, path: Path) -> AsyncIterator[probe.Probe]:
    async with open_http() as http:
        viewer = probe.Probe(http, stream.publish_url, path)
        watching = asyncio.create_task(viewer.run())
        try:
            yield viewer
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def kill_shim(it: Appliance) -> None:
    shim = (await it.pids())["shim"]
    os.kill(shim, signal.SIGKILL)
    await it.another("shim", shim)


async def test_stream_goes_on_behind_the_last_picture_as_often_as_it_has_to(tmp_path: Path) -> None:
    async with ready(tmp_path) as it, streaming(it, tmp_path) as stream:
        worker = it.orchestrator.capabilities[NAME]
        async with watched(stream, tmp_path / "out.ts") as viewer:
            await it.until(lambda: len(viewer.arrivals.video) > 30)
            for path in (tmp_path / "r" / "streams").iterdir():
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            seams = []
            for _ in range(2):
                seen = len(viewer.arrivals.video)
                await kill_shim(it)
                resumed = await stream.next_event("stream_resumed", DEADLINE_S)
                assert resumed["silent_s"] < 20
                await it.until(lambda seen=seen: len(viewer.arrivals.video) > seen + 60)
                seams.append(seen)
            await stream.end_input()
            await stream.next_event("stream_stopped", DEADLINE_S)
        pts = viewer.arrivals.pts
        assert all(earlier < later for earlier, later in itertools.pairwise(pts)), "no stamp twice, none backwards"
        steps = [later - earlier for earlier, later in itertools.pairwise(pts)]
        # What was lost is the time that nobody was there: the clock goes on with the input's.
        assert sum(step > 3000 for step in steps) <= len(seams) + viewer.arrivals.broken_segments
        assert viewer.arrivals.keyless_segments == 0, "a viewer can begin at each segment, the first after a seam too"
        sizes = {(frame.width, frame.height) for _, frame in probe.pictures(tmp_path / "out.ts")}
        assert sizes == {(128, 128)}
        assert it.orchestrator.capabilities[NAME] is worker, "its count of our streams is not reset while they run"
        await stream.stop()
        assert worker.load == 0
        await it.orchestrator.registered(NAME, after=worker, timeout_s=DEADLINE_S)
        assert it.orchestrator.capabilities[NAME].load == 0
        assert await it.programs.stop() == 0
        assert it.traces.files() == []


async def test_stream_that_may_not_go_on_is_handed_over_at_once(tmp_path: Path) -> None:
    async with ready(tmp_path, HEADRACE_RESUME_WITHIN_S="0") as it, streaming(it, tmp_path) as stream:
        async with watched(stream, tmp_path / "out.ts") as viewer:
            await it.until(lambda: len(viewer.arrivals.video) > 30)
            await kill_shim(it)
            await it.until(lambda: f"{stream.id}-out" not in it.orchestrator.broker.channels)
            await it.until(lambda: viewer.arrivals.closed_reason)
        assert await it.programs.stop() == 0
        assert it.traces.files() == []


async def test_stream_that_ended_while_nobody_was_there_ends(tmp_path: Path) -> None:
    async with ready(tmp_path) as it, streaming(it, tmp_path) as stream:
        shim = (await it.pids())["shim"]
        os.kill(shim, signal.SIGKILL)
        for name in list(it.orchestrator.broker.channels):
            await it.orchestrator.broker.delete(name)
        await it.another("shim", shim)
        await it.orchestrator.registered(NAME, after=it.orchestrator.capabilities[NAME], timeout_s=DEADLINE_S)
        assert [name for name in it.traces.files() if name.startswith("streams/")] == []
        del stream


async def test_stream_that_kills_its_shim_is_given_up(tmp_path: Path) -> None:
    async with ready(tmp_path) as it, streaming(it, tmp_path) as stream:
        for _ in range(3):
            await kill_shim(it)
            await stream.next_event("stream_resumed", DEADLINE_S)
        await kill_shim(it)
        await it.until(lambda: f"{stream.id}-out" not in it.orchestrator.broker.channels)
        await it.until(lambda: not [name for name in it.traces.files() if name.startswith("streams/")])


async def test_parameters_go_on_with_their_version_and_no_update_is_lost_or_made_twice(tmp_path: Path) -> None:
    """The shim alone is a process, because only a stub of a graph has anything to turn without ComfyUI."""
    clip = write_clip(tmp_path / "clip.ts", frames=300, width=64, height=64)
    engine = settings_for(tmp_path)
    options = {"HEADRACE_ENGINE_ADDRESS": engine.address}
    async with Broker() as broker, running_engine(engine, StubBackend()), open_http() as http:
        urls = {f"{key}_url": broker.create(f"cam{end}") for key, end in CHANNELS.items()}
        body = {"gateway_request_id": "cam", **urls, "params": {"prompts": json.loads(workflow(level=60))}}

        async def ask(url: str, path: str, value: object = None) -> dict[str, Any]:
            method = "GET" if value is None else "POST"
            async with http.request(method, url + path, json=value) as response:
                assert response.status == 200, await response.text()
                return await response.json()

        async def level(url: str) -> tuple[int, int]:
            """Version and value, as soon as there is an engine session to ask."""
            while True:
                async with http.get(url + "/stream/params/schema") as response:
                    answer = await response.json()
                    if response.status == 200:
                        by_path = {item["path"]: item["value"] for item in answer["parameters"]}
                        return answer["version"], by_path["nodes.5.inputs.level"]
                await asyncio.sleep(0.05)

        async with (
            Publisher(http, urls["subscribe_url"], content_type="video/MP2T") as source,
            Publisher(http, urls["control_url"], content_type="application/json") as control,
        ):
            publishing = asyncio.create_task(publish_file(source, clip))
            try:
                async with shim(tmp_path, **options) as (process, url):
                    while (await ask(url, "/health"))["status"] != "IDLE":  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                    await ask(url, "/stream/start", body)
                    assert await level(url) == (1, 60)
                    await control.publish(b'{"5": {"level": 100}}')
                    while await level(url) != (2, 100):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                    await ask(url, "/stream/params", {"5": {"level": 200}})
                    assert await level(url) == (3, 200)
                    process.kill()
                    await process.wait()
                async with shim(tmp_path, **options) as (process, url):
                    assert await level(url) == (3, 200), "the older message of the control channel is not read again"
                    process.kill()
                    await process.wait()
                await control.publish(b'{"5": {"level": 30}}')  # nobody is there
                async with shim(tmp_path, **options) as (process, url):
                    while (now := await level(url))[0] < 4:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                    assert now == (4, 30), "the one that came meanwhile, and no other"
                    answer = await ask(url, "/stream/start", body)
                    assert answer["stream_id"] == "cam", "a start that is repeated is the stream that runs"
                    await ask(url, "/stream/stop", {})
                assert not list((tmp_path / "streams").glob("*.*"))
            finally:
                publishing.cancel()
                await asyncio.gather(publishing, return_exceptions=True)
