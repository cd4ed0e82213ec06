"""A workflow takes over from another while frames flow: what viewers, callers and gateways see of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway_shim.localnet.numbered import write_clip
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.network import LiveStream, Network, network

LOAD_S = 2.0


@pytest.fixture
def backend() -> StubBackend:
    return StubBackend()


@pytest.fixture
async def net(tmp_path: Path, backend: StubBackend) -> AsyncIterator[Network]:
    async with network(tmp_path, backend=backend, latency_budget_ms=500) as net:
        yield net


@pytest.fixture
async def stream(net: Network, tmp_path: Path) -> AsyncIterator[LiveStream]:
    clip = write_clip(tmp_path / "clip.ts", frames=900, width=64, height=64)
    stream = await net.start(params={"prompts": json.loads(workflow(level=60))})
    publishing = asyncio.create_task(stream.publish(clip, realtime=True))
    await stream.event("runner_send_first_processed_segment")
    yield stream
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)


async def lost(stream: LiveStream) -> int:
    """Frames that went out without having been through a graph, of the whole stream, which ends here."""
    await stream.flow()
    await stream.end_input()
    await stream.received()
    frames: dict[str, Any] = (await stream.event("stream_stopped"))["frames"]
    lost: int = frames["received"] - frames["processed"]
    return lost


async def test_model_that_loads_for_two_seconds_costs_no_frame(
    net: Network, stream: LiveStream, backend: StubBackend
) -> None:
    backend.load_s = LOAD_S
    loop = asyncio.get_running_loop()
    began = loop.time()
    status, answer = await net.post("/stream/params", {"prompts": json.loads(workflow(level=200))})
    took_s = loop.time() - began
    assert (status, answer["version"]) == (200, 2)
    assert took_s > LOAD_S
    assert answer["effective_pts"] is not None
    await stream.event("progress", stage="loading", node_id="5", done=1, total=1)
    await stream.event("progress", stage="warming", done=1, total=2)
    loading = [event for event in stream.events if event.get("stage") == "loading"]
    assert len(loading) >= 3, "once at the start of the stream, then again and again while it takes long"
    assert await lost(stream) == 0
    assert (await net.get("/health"))["status"] == "IDLE"


async def test_warm_up_stands_back_for_live_frames(net: Network, stream: LiveStream, backend: StubBackend) -> None:
    backend.run_s, backend.warm_up_steps, backend.step_s = 0.02, 50, 0.035
    status, _ = await net.post("/stream/params", {"prompts": json.loads(workflow(level=200))})
    assert status == 200
    session = net.shim.streams.active["cam"]
    assert session.status()["inference_status"]["graph_ms"] > 0
    assert await lost(stream) == 0


@pytest.mark.parametrize("aside", [True, False], ids=["loader thread", "executor thread"])
async def test_workflow_that_fails_leaves_the_old_one_running(
    net: Network, stream: LiveStream, backend: StubBackend, aside: bool
) -> None:
    backend.load_s, backend.load_aside = 0.05, aside
    for mode, said in (("fail", "told to"), ("huge", "no memory left")):
        status, answer = await net.post("/stream/params", {"prompts": json.loads(workflow(mode=mode))})
        assert (status, answer["code"]) == (422, "workflow_refused")
        assert said in answer["message"]
        assert answer["errors"][0]["path"] == "nodes.5"
    assert net.shim.streams.active["cam"].version == 1
    assert len(backend.graphs) == 1
    assert await lost(stream) == 0


async def test_control_channel_hears_of_a_workflow_that_fails(
    net: Network, stream: LiveStream, backend: StubBackend
) -> None:
    await stream.control({"prompts": json.loads(workflow(mode="huge"))})
    async with asyncio.timeout(30):
        event = await stream.event("error", reason="update_refused")
    assert "no memory left" in event["message"]
    assert event["errors"][0]["path"] == "nodes.5"
    assert await lost(stream) == 0


async def test_override_that_changes_a_link_is_built_beside(
    net: Network, stream: LiveStream, backend: StubBackend
) -> None:
    two = json.loads(workflow(level=60))
    two["6"] = {"class_type": "Level", "inputs": {"image": ["1", 0], "level": 100}}
    assert (await net.post("/stream/params", {"prompts": two}))[0] == 200
    assert len(backend.graphs) == 2
    assert (await net.post("/stream/params", {"9": {"images": ["6", 0]}}))[0] == 200
    assert len(backend.graphs) == 3, "another graph, warm before it took over"
    assert (await net.post("/stream/params", {"6": {"level": 90}}))[0] == 200
    assert len(backend.graphs) == 3
    assert await lost(stream) == 0


async def test_graph_that_fails_a_few_frames_after_its_update_is_taken_back(
    net: Network, stream: LiveStream, backend: StubBackend
) -> None:
    status, answer = await net.post("/stream/params", {"5": {"mode": "fail_later"}})
    assert status == 200, "the first frame was good"
    async with asyncio.timeout(30):
        event = await stream.event("error", reason="update_reverted")
    assert "what worked before it holds again" in event["message"]
    session = net.shim.streams.active["cam"]
    async with asyncio.timeout(30):
        while session.version != answer["version"] + 1:  # noqa: ASYNC110  # read back behind the event
            await asyncio.sleep(0.01)
    assert session.prompt["5"]["inputs"]["mode"] == "paint"
    assert await lost(stream) == 1, "the frame that failed"


async def test_nothing_of_a_stream_survives_into_the_next(
    net: Network, stream: LiveStream, backend: StubBackend
) -> None:
    assert (await net.post("/stream/params", {"5": {"level": 200}}))[0] == 200
    assert (await net.post("/stream/params", {"prompts": json.loads(workflow(level=90))}))[0] == 200
    assert await lost(stream) == 0
    clip = write_clip(net.directory / "next.ts", frames=60, width=64, height=64)
    following = await net.start("next", params={"prompts": json.loads(workflow(level=60))})
    await following.publish(clip)
    await following.event("runner_send_first_processed_segment")
    schema = await net.get("/live/video-to-video/next/schema")
    values = {item["path"]: item["value"] for item in schema["parameters"]}
    assert (schema["version"], values["nodes.5.inputs.level"]) == (1, 60)
    assert net.shim.streams.active["next"].prompt == json.loads(workflow(level=60))
    status = net.shim.streams.active["next"].status()["inference_status"]
    assert "200" not in json.dumps(status["last_params"])
    assert status["last_error"] is None
    assert all(graph.closed for graph in backend.graphs[:-1])
    await following.end_input()
    await following.received()
