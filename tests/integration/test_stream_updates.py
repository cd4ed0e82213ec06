"""Parameters of a running stream, good and bad, on every way in: the stream itself never notices a bad one."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway_shim.localnet import probe
from gateway_shim.localnet.numbered import write_clip
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.network import LiveStream, Network, network

WORKFLOW = json.loads(workflow(level=60))
ROUTES = [
    "/live/video-to-video/update",
    "/live/video-to-video/cam/update",
    "/stream/params",
    "/stream/update",
    "/api/stream/params",
    "/api/stream/update",
]


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Network]:
    async with network(tmp_path, backend=StubBackend()) as net:
        yield net


@pytest.fixture
async def stream(net: Network, tmp_path: Path) -> AsyncIterator[LiveStream]:
    """A stream whose frames flow for as long as the test lasts; every picture has one grey level."""
    clip = write_clip(tmp_path / "clip.ts", frames=900, width=64, height=64)
    stream = await net.start(params={"prompts": WORKFLOW})
    publishing = asyncio.create_task(stream.publish(clip, realtime=True))
    await stream.event("runner_send_first_processed_segment")
    await stream.flow(5)
    yield stream
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)


async def levels(stream: LiveStream, tmp_path: Path) -> list[int]:
    """Grey levels of the pictures that went out, one after another, repeats left out."""
    await stream.flow()
    await stream.end_input()
    received = await stream.received()
    seen: list[int] = []
    for _, frame in probe.pictures(received.path):
        level = round(frame.to_ndarray(format="gray").mean())
        if not seen or abs(seen[-1] - level) > 3:
            seen.append(level)
    return seen


@pytest.mark.parametrize("route", ROUTES)
async def test_update_holds_from_the_pts_that_the_answer_names(
    net: Network, stream: LiveStream, tmp_path: Path, route: str
) -> None:
    status, answer = await net.post(route, {"5": {"level": 200}})
    assert (status, answer["status"], answer["version"]) == (200, "success", 2)
    assert answer["effective_pts"] is not None
    await stream.flow()
    await stream.end_input()
    received = await stream.received()
    looks = {pts: bool(frame.to_ndarray(format="gray").mean() > 150) for pts, frame in probe.pictures(received.path)}
    assert looks == {pts: pts >= answer["effective_pts"] for pts in looks}
    assert set(looks.values()) == {False, True}


@pytest.mark.parametrize(
    "body",
    [
        {"5": {"inputs": {"level": 200}}},
        {"The level": {"level": 200}},
        {"params": {"5": {"level": 200}}},
        {"prompts": json.loads(workflow(level=200))},
        {"prompt": workflow(level=200)},
        {"prompts": [json.loads(workflow(level=200))]},
        json.loads(workflow(level=200)),
    ],
    ids=["inputs", "title", "params", "prompts", "text", "list", "bare"],
)
async def test_every_shape_of_an_update(net: Network, stream: LiveStream, tmp_path: Path, body: Any) -> None:
    status, answer = await net.post("/stream/params", body)
    assert (status, answer["version"]) == (200, 2), answer
    assert len(await levels(stream, tmp_path)) == 2


async def test_update_over_the_control_channel(net: Network, stream: LiveStream, tmp_path: Path) -> None:
    await stream.control({"keep": "alive"})
    async with asyncio.timeout(30):
        await stream.control({"5": {"level": 200}})
        event = await stream.event("params_updated")
    assert event["version"] == 2
    assert len(await levels(stream, tmp_path)) == 2


BAD: list[tuple[Any, int, str]] = [
    ({"5": {"level": "loud"}}, 422, "nodes.5.inputs.level"),
    ({"5": {"level": 256}}, 422, "nodes.5.inputs.level"),
    ({"5": {"level": True}}, 422, "nodes.5.inputs.level"),
    ({"5": {"level": 1.5}}, 422, "nodes.5.inputs.level"),
    ({"5": {"levle": 7}}, 422, "nodes.5.inputs.levle"),
    ({"5": {"level": 1}, "6": {"level": 1}}, 422, ""),
    ({"5": {"image": 3}}, 422, "nodes.5.inputs.image"),
    ({"prompts": {"1": {"class_type": "Nope", "inputs": {}}}}, 422, ""),
    ({"prompts": "{not json"}, 422, ""),
    ({"width": 128, "height": 128}, 400, "width"),
    ({"width": 128}, 422, ""),
    ({"max_framerate": 0}, 422, "max_framerate"),
    ([1, 2], 400, ""),
    (None, 400, ""),
    ("text", 400, ""),
]


async def test_bad_updates_change_nothing(net: Network, stream: LiveStream, tmp_path: Path) -> None:
    for body, expected, path in BAD:
        status, answer = await net.post("/live/video-to-video/update", body)
        assert status == expected, (body, answer)
        assert answer["status"] == "error"
        assert answer["message"], body
        if path:
            assert path in [error["path"] for error in answer["errors"]], (body, answer)
    assert (await net.get("/health"))["status"] == "OK"
    status, answer = await net.post("/stream/params", {"5": {"level": 61}})
    assert (status, answer["version"]) == (200, 2), "no version was spent on what was refused"
    assert len(await levels(stream, tmp_path)) == 1, "the picture never changed"
    assert (await net.get("/health"))["status"] == "IDLE"


async def test_bodies_that_are_no_json_or_too_large(net: Network, stream: LiveStream) -> None:
    url = net.shim.url + "/stream/params"
    async with net.http.post(url, data=b"{not json") as response:
        assert response.status == 400
    async with net.http.post(url, data=io.BytesIO(b"x" * (17 << 20))) as response:
        assert response.status == 413
    status, _ = await net.post("/live/video-to-video/nobody/update", {"5": {"level": 1}})
    assert status == 404
    assert (await net.get("/health"))["status"] == "OK"


async def test_start_while_full_leaves_the_running_stream_alone(net: Network, stream: LiveStream) -> None:
    urls = {name: url.replace("cam", "other") for name, url in stream.urls.items()}
    status, answer = await net.post("/stream/start", {"gateway_request_id": "other", **urls})
    assert (status, answer["code"]) == (503, "insufficient_capacity")
    status, answer = await net.post("/live-video-to-video", {"manifest_id": "other", **urls})
    assert status == 500
    assert "insufficient capacity" in answer["detail"]["msg"]
    status, _ = await net.post("/stream/start", {"gateway_request_id": "cam", **stream.urls})
    assert status == 200, "the same start again is the same stream"
    assert list(net.shim.streams.active) == ["cam"]


async def test_dry_run_and_expected_version(net: Network, stream: LiveStream) -> None:
    status, answer = await net.post("/stream/params?dry_run=1", {"5": {"level": 99}})
    assert (status, answer["version"]) == (200, 1)
    status, answer = await net.post("/stream/params?dry_run=1", {"5": {"level": 999}})
    assert status == 422
    status, answer = await net.post("/stream/params", {"5": {"level": 99}}, **{"If-Match": "7"})
    assert (status, answer["code"]) == (412, "version_conflict")
    status, answer = await net.post("/stream/params", {"5": {"level": 99}}, **{"If-Match": "1"})
    assert (status, answer["version"]) == (200, 2)


async def test_update_that_breaks_the_graph_is_taken_back(net: Network, stream: LiveStream, tmp_path: Path) -> None:
    status, answer = await net.post("/stream/params", {"5": {"mode": "fail"}})
    assert status == 422, answer
    assert "told to" in answer["message"]
    await stream.event("error", reason="update_reverted")
    assert net.shim.streams.active["cam"].prompt["5"]["inputs"]["mode"] == "paint"
    status, answer = await net.post("/stream/params", {"5": {"level": 200}})
    assert status == 200
    assert (await net.get("/health"))["status"] == "OK"
    assert len(await levels(stream, tmp_path)) == 2


async def test_workflow_refused_at_start_starts_nothing(tmp_path: Path) -> None:
    async with network(tmp_path, backend=StubBackend()) as net:
        broken = {**WORKFLOW, "7": {"class_type": "Nope", "inputs": {}}}
        body = {
            "gateway_request_id": "cam",
            "params": {"prompts": broken},
            "publish_url": net.broker.create("cam-out"),
        }
        status, answer = await net.post("/stream/start", body)
        assert status == 422
        assert [error["path"] for error in answer["errors"]] == ["nodes.7"]
        assert "install its pack" in answer["errors"][0]["message"]
        assert not net.shim.streams.active
        assert (await net.get("/health"))["status"] == "IDLE"
