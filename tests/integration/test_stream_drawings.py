"""Streams that are given what ComfyUI's editor saves: it runs, and its nodes are turned like any other's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway_shim.localnet import probe
from gateway_shim.localnet.numbered import write_clip
from tests.fakes.engine_backend import StubBackend
from tests.fakes.network import LiveStream, Network, network

INPUTS = {"Reroute": "", "Level": "image", "SaveTensor": "images"}


def drawing(level: int) -> dict[str, Any]:
    """Camera, a reroute, the level with its title, viewers."""

    def node(node_id: int, kind: str, link: int | None = None, **more: Any) -> dict[str, Any]:
        inputs = [] if link is None else [{"name": INPUTS[kind], "type": "IMAGE", "link": link}]
        outputs = [{"name": "IMAGE", "type": "IMAGE"}] if kind != "SaveTensor" else []
        return {"id": node_id, "type": kind, "inputs": inputs, "outputs": outputs, **more}

    return {
        "version": 0.4,
        "nodes": [
            node(1, "LoadTensor"),
            node(2, "Reroute", 1),
            node(5, "Level", 2, title="The level", widgets_values=[level, "paint"]),
            node(9, "SaveTensor", 3),
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 5, 0, "IMAGE"], [3, 5, 0, 9, 0, "IMAGE"]],
    }


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Network]:
    async with network(tmp_path, backend=StubBackend()) as net:
        yield net


async def levels(stream: LiveStream) -> list[int]:
    """Grey levels of the pictures that went out, in order, repeats left out."""
    await stream.flow()
    await stream.end_input()
    received = await stream.received()
    seen: list[int] = []
    for _, frame in probe.pictures(received.path):
        level = round(frame.to_ndarray(format="gray").mean())
        if not seen or abs(seen[-1] - level) > 3:
            seen.append(level)
    return seen


async def test_a_drawing_runs_and_is_changed_by_id_by_title_and_by_another_drawing(
    net: Network, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=900, width=64, height=64)
    stream = await net.start(params={"prompts": drawing(60)})
    publishing = asyncio.create_task(stream.publish(clip, realtime=True))
    try:
        await stream.event("runner_send_first_processed_segment")
        await stream.flow(5)
        for version, body in enumerate(
            (
                {"5": {"level": 100}},
                {"The level": {"level": 140}},
                {"prompts": drawing(180)},
                {"5": {"level": 210}},
                {"prompts": drawing(20), "5": {"level": 240}},
            ),
            start=2,
        ):
            status, answer = await net.post("/stream/params", body)
            assert (status, answer.get("version")) == (200, version), answer
            await stream.flow(5)
        status, answer = await net.post("/stream/params", {"2": {"level": 1}})
        assert status == 422, "a reroute has no inputs"
        assert (await net.get("/health"))["status"] == "OK"
        seen = await levels(stream)
    finally:
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    assert len(seen) == 6
    assert seen == sorted(seen)


async def test_a_drawing_is_changed_before_the_first_frame(net: Network, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=300, width=64, height=64)
    stream = await net.start(params={"prompts": drawing(60)})
    status, answer = await net.post("/stream/params", {"5": {"level": 200}})
    assert (status, answer.get("version")) == (200, 2), answer
    publishing = asyncio.create_task(stream.publish(clip, realtime=True))
    try:
        await stream.event("runner_send_first_processed_segment")
        (level,) = await levels(stream)
    finally:
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    assert level > 150


async def test_a_drawing_that_does_not_run_is_refused_at_the_start_with_all_its_findings(net: Network) -> None:
    broken = drawing(60)
    broken["nodes"][2]["type"] = "Lebel"
    broken["links"].pop(0)
    url = net.broker.create("cam", "video/MP2T")
    body = {"gateway_request_id": "cam", "subscribe_url": url, "params": {"prompts": broken}}
    status, answer = await net.post("/stream/start", body)
    assert (status, answer["code"]) == (422, "workflow_refused")
    assert {error["path"] for error in answer["errors"]} == {"nodes.2", "nodes.5"}
