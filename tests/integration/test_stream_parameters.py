"""The knobs of a running stream: what they are, how soon they act, and what becomes of many turns at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.backend import FrameIn, PictureOut, RunResult
from engine.graph.workflow import Prompt
from engine.parameters import Parameters
from gateway_shim.localnet.numbered import write_clip
from tests.fakes.engine_backend import StubBackend, StubGraph, workflow
from tests.fakes.network import LiveStream, Network, network

FRAME_S = 1 / 30
SCHEMAS = ["/stream/params/schema", "/api/stream/params/schema", "/live/video-to-video/cam/schema"]


@pytest.fixture
def backend() -> StubBackend:
    return StubBackend()


@pytest.fixture
async def net(tmp_path: Path, backend: StubBackend) -> AsyncIterator[Network]:
    async with network(tmp_path, backend=backend) as net:
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


@pytest.mark.parametrize("path", SCHEMAS)
async def test_schema_says_what_may_be_turned_and_how_far(net: Network, stream: LiveStream, path: str) -> None:
    assert (await net.post("/stream/params", {"5": {"level": 61}}))[0] == 200
    async with net.http.get(net.shim.url + path) as response:
        assert (response.status, response.headers["ETag"]) == (200, '"2"')
        schema = await response.json()
    assert (schema["stream_id"], schema["version"], schema["runner"]) == ("cam", 2, "stub")
    by_path = {item["path"]: item for item in schema["parameters"]}
    assert by_path["nodes.5.inputs.level"] == {
        "path": "nodes.5.inputs.level",
        "node_id": "5",
        "title": "The level",
        "class_type": "Level",
        "input": "level",
        "type": "INT",
        "required": True,
        "default": 7,
        "min": 0,
        "max": 255,
        "step": 1,
        "choices": [],
        "multiline": False,
        "tooltip": "",
        "linked": False,
        "value": 61,
        "allowed": "an integer from 0 to 255",
    }
    image = by_path["nodes.5.inputs.image"]
    assert (image["linked"], image["value"]) == (True, None)
    # What the schema gives is what an update takes.
    status, answer = await net.post("/stream/params", {"5": {"level": 62}}, **{"If-Match": '"2"'})
    assert (status, answer["version"]) == (200, 3)


async def test_schema_without_a_stream_or_an_engine(tmp_path: Path) -> None:
    async with network(tmp_path, backend=StubBackend()) as net:
        async with net.http.get(net.shim.url + SCHEMAS[0]) as response:
            assert response.status == 404
        stream = await net.start(params={"prompts": json.loads(workflow(level=60))})
        clip = write_clip(tmp_path / "clip.ts", frames=30, width=64, height=64)
        await stream.publish(clip)
        await stream.event("runner_send_first_processed_segment")
        await net.stop_engine()
        await stream.event("error", reason="engine_gone")
        async with net.http.get(net.shim.url + SCHEMAS[0]) as response:
            answer = await response.json()
        assert (response.status, answer["code"]) == (503, "not_ready")
        assert "the engine is loading or being restarted" in answer["message"]


async def test_every_wrong_field_has_an_entry_with_what_it_takes(net: Network, stream: LiveStream) -> None:
    body = {"5": {"level": 256, "levle": 1, "image": 3}, "1": {"x": 1}}
    status, answer = await net.post("/stream/params", body)
    assert (status, answer["code"]) == (422, "invalid_request")
    errors = {error["path"]: error for error in answer["errors"]}
    assert set(errors) == {"nodes.5.inputs.level", "nodes.5.inputs.levle", "nodes.5.inputs.image", "nodes.1.inputs.x"}
    assert errors["nodes.5.inputs.level"] == {
        "path": "nodes.5.inputs.level",
        "message": "256 is above 255",
        "allowed": "an integer from 0 to 255",
    }
    assert errors["nodes.5.inputs.levle"]["allowed"] == "image, level, mode"
    assert "a link" in errors["nodes.5.inputs.image"]["allowed"]


async def test_unknown_node_is_named_once(net: Network, stream: LiveStream) -> None:
    status, answer = await net.post("/stream/params", {"77": {"level": 1}})
    assert (status, answer["message"].count("77")) == (422, 1)
    assert "5, 9" in answer["errors"][0]["allowed"]


async def test_title_of_two_nodes_is_no_name(net: Network, stream: LiveStream) -> None:
    two = json.loads(workflow(level=60))
    two["6"] = json.loads(json.dumps(two["5"]))
    assert (await net.post("/stream/params", {"prompts": two}))[0] == 200
    status, answer = await net.post("/stream/params", {"The level": {"level": 1}})
    assert status == 422
    assert answer["errors"][0]["allowed"] == "node ids 5, 6"
    assert answer["errors"][0]["message"] == "2 nodes have this title"


async def test_body_of_fifteen_mebibytes(net: Network, stream: LiveStream) -> None:
    body = json.dumps({"5": {"mode": "x" * (15 << 20)}}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 1 << 18):
            yield body[at : at + (1 << 18)]

    async with net.http.post(net.shim.url + "/stream/params", data=pieces()) as response:
        assert (response.status, (await response.json())["version"]) == (200, 2)
    event = await stream.event("params_updated")
    assert set(event["params"]) == {"omitted_bytes"}, "an event is no place for it"


async def test_many_updates_at_once_go_together_and_the_bad_ones_alone_are_refused(
    net: Network, stream: LiveStream, backend: StubBackend
) -> None:
    async def send(body: Any) -> tuple[int, int]:
        status, answer = await net.post("/stream/params", body)
        return status, answer.get("version", 0)

    first = asyncio.create_task(send({"5": {"level": 20}}))
    await asyncio.sleep(0)
    answers = await asyncio.gather(*(send({"5": {"level": 30 + number}}) for number in range(100)))
    assert await first == (200, 2)
    assert {status for status, _ in answers} == {200}
    version = net.shim.streams.active["cam"].version
    assert version < 30, "many were one"
    assert max(got for _, got in answers) == version
    mixed = await asyncio.gather(*(send({"5": {"level": 255 + number % 2}}) for number in range(20)))
    assert [status for status, _ in mixed] == [200, 422] * 10
    assert net.shim.streams.active["cam"].prompt["5"]["inputs"]["level"] == 255


async def test_what_a_client_has_changed_is_kept_for_a_successor(
    net: Network, stream: LiveStream, tmp_path: Path
) -> None:
    """A stream whose viewers must never see the input would show it to them after the shim was killed."""
    (path,) = (tmp_path / "streams").glob("*.json")
    assert json.loads(path.read_text())["request"]["fallback"] is None
    changes = {"fallback": "overlay", "latency_budget_ms": 250, "5": {"level": 61}}
    assert (await net.post("/stream/params", changes))[0] == 200
    kept = json.loads(path.read_text())
    assert {name: kept["request"][name] for name in ("fallback", "latency_budget_ms")} == {
        "fallback": "overlay",
        "latency_budget_ms": 250,
    }
    assert kept["prompt"]["5"]["inputs"]["level"] == 61


async def test_updates_of_the_control_channel_go_together(net: Network, stream: LiveStream) -> None:
    for level in range(30, 60):
        await stream.control({"5": {"level": level}})
    session = net.shim.streams.active["cam"]
    async with asyncio.timeout(30):
        while session.prompt["5"]["inputs"]["level"] != 59:  # noqa: ASYNC110  # the last event may be dropped
            await asyncio.sleep(0.02)
    assert session.version < 31


async def test_update_acts_within_two_frames_of_its_acceptance(
    net: Network, stream: LiveStream, backend: StubBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.run_s = 0.9 * FRAME_S  # one frame time, and what surrounds it
    begun: list[int] = []  # the frame that had begun last when an update was accepted
    adopt = Parameters.adopt

    def accepted(self: Parameters, prompt: Prompt, graph: Any) -> int:
        begun.append(backend.log[-1][1][0])
        return adopt(self, prompt, graph)

    monkeypatch.setattr(Parameters, "adopt", accepted)
    effective = []
    for level in range(100, 120):
        status, answer = await net.post("/stream/params", {"5": {"level": level}})
        assert (status, answer["effective_pts"] is None) == (200, False)
        effective.append(backend.first_made[level])
    delays = [frame - last for frame, last in zip(effective, begun, strict=True)]
    print("frames from acceptance to effect:", delays)
    assert max(delays) <= 2, delays


class Small(StubGraph):
    """Its mode "half" makes pictures of 8x8, which no encoder takes."""

    def run(self, prompt: Prompt, frames: Sequence[FrameIn]) -> RunResult:
        result = super().run(prompt, frames)
        if prompt["5"]["inputs"]["mode"] == "half":
            return replace(result, pictures=[PictureOut(bytes(96), 8, 8) for _ in frames])
        return result


async def test_pictures_that_cannot_be_shown_bring_the_last_good_parameters_back(tmp_path: Path) -> None:
    backend = StubBackend()
    backend.graph_class = Small
    clip = write_clip(tmp_path / "clip.ts", frames=900, width=64, height=64)
    async with network(tmp_path, backend=backend) as net:
        stream = await net.start(params={"prompts": json.loads(workflow(level=60))})
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        while frames(await net.get("/stream/status"))["processed"] < 30:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert (await net.post("/stream/params", {"5": {"mode": "half"}}))[0] == 200
        event = await stream.event("error", reason="update_reverted")
        assert "what worked before holds again" in event["message"]
        made = frames(await net.get("/stream/status"))["processed"]
        while frames(await net.get("/stream/status"))["processed"] < made + 30:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        schema = await net.get("/stream/params/schema")
        assert {each["path"]: each["value"] for each in schema["parameters"]}["nodes.5.inputs.mode"] == "paint"
        failed = frames(await net.get("/stream/status"))["failed"]
        assert 15 <= failed < 120, "half a second of them, and what came until the old ones were back"
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)


def frames(status: dict[str, Any]) -> dict[str, int]:
    account: dict[str, int] = status["streams"]["cam"]["frames"]
    return account
