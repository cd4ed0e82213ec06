"""Fifty swaps and five hundred updates, good and bad, in one stream, against a model of what must be the outcome."""

from __future__ import annotations

import asyncio
import collections
import json
import random
from pathlib import Path
from typing import Any

from gateway_shim.errors import HeadraceError
from gateway_shim.localnet import probe
from gateway_shim.localnet.numbered import write_clip
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.network import Network, network

SEED = 20261123
SWAPS = 50
UPDATES = 500

#: Far enough from each other that the encoder cannot make one of another.
LEVELS = (30, 60, 90, 120, 150, 180, 210)


class Model:
    """What the stream must run after each request, by the rules that the README gives."""

    def __init__(self) -> None:
        self.random = random.Random(SEED)
        self.prompt: dict[str, Any] = json.loads(workflow(level=60))
        self.levels = {60}  # every grey level that a frame may show

    def swap(self) -> tuple[Any, int]:
        """A body with a whole workflow, and the status that it must get."""
        kind = self.random.choice(["good", "good", "good", "fails", "memory", "unknown", "json", "empty"])
        level = self.random.choice(LEVELS)
        document = json.loads(workflow(level=level, mode={"fails": "fail", "memory": "huge"}.get(kind, "paint")))
        if kind == "good":
            self.prompt = document
            self.levels.add(level)
            return {"prompts": document}, 200
        if kind == "unknown":
            document["7"] = {"class_type": "Nope", "inputs": {}}
        return {"prompts": {"json": "{no", "empty": {}}.get(kind, document)}, 422

    def update(self) -> tuple[Any, int]:
        level = self.random.choice(LEVELS)
        good: list[Any] = [
            {"5": {"level": level}},
            {"5": {"inputs": {"level": level}}},
            {"The level": {"level": level}},
            {"params": {"5": {"level": level}}},
        ]
        bad: list[tuple[Any, int]] = [
            ({"5": {"level": 256 + level}}, 422),
            ({"5": {"level": "loud"}}, 422),
            ({"5": {"level": level, "levle": 1}}, 422),
            ({"5": {"level": level}, "77": {"level": 1}}, 422),
            ({"5": {"level": level}, "max_framerate": 0}, 422),
            ({"5": {"image": 3, "level": level}}, 422),
            ({"width": 128, "height": 128, "5": {"level": level}}, 400),
            ([{"5": {"level": level}}], 400),
        ]
        if self.random.random() < 0.6:
            self.prompt["5"]["inputs"]["level"] = level
            self.levels.add(level)
            return self.random.choice(good), 200
        return self.random.choice(bad)


async def healths(net: Network) -> list[str]:
    """Every state that ``/health`` showed until cancelled."""
    seen = [(await net.get("/health"))["status"]]
    try:
        while True:
            await asyncio.sleep(0.02)
            seen.append((await net.get("/health"))["status"])
    except asyncio.CancelledError:
        return seen


async def bombard(net: Network, model: Model) -> int:
    """Send everything, in bursts of one to eight; returns the last version."""
    turns = ["swap"] * SWAPS + ["update"] * UPDATES
    model.random.shuffle(turns)
    waiting = collections.deque(turns)
    version = 1
    while waiting:
        burst = [waiting.popleft() for _ in range(min(len(waiting), model.random.randint(1, 8)))]
        requests = [model.swap() if turn == "swap" else model.update() for turn in burst]
        # Below HTTP, which would mix their order: tasks begin in the order in which they are made.
        answers = await asyncio.gather(*(send(net, body) for body, _ in requests))
        for (body, wanted), (status, answer) in zip(requests, answers, strict=True):
            assert status == wanted, (body, answer)
            if status == 200:
                assert answer >= version, "versions only grow"
                version = answer
    return version


async def send(net: Network, body: Any) -> tuple[int, Any]:
    """The status that HTTP would have, and the version or the message."""
    try:
        return 200, (await net.shim.streams.update("cam", body)).version
    except HeadraceError as exc:
        return exc.http_status, exc.message


async def test_fifty_swaps_and_five_hundred_updates_cost_no_frame(tmp_path: Path) -> None:
    # A second of slack: a shared machine stands still longer than the test's own work does.
    async with network(tmp_path, backend=StubBackend(), latency_budget_ms=1000) as net:
        clip = write_clip(tmp_path / "clip.ts", frames=1800, width=64, height=64)
        stream = await net.start(params={"prompts": json.loads(workflow(level=60))})
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        await stream.event("runner_send_first_processed_segment")
        watching = asyncio.create_task(healths(net))
        model = Model()
        version = await bombard(net, model)
        schema = await net.get("/stream/params/schema")
        session = net.shim.streams.active["cam"]
        assert session.prompt == model.prompt
        assert (session.version, schema["version"]) == (version, version)
        running = {item["path"]: item["value"] for item in schema["parameters"] if not item["linked"]}
        assert running["nodes.5.inputs.level"] == model.prompt["5"]["inputs"]["level"]
        watching.cancel()
        assert set(await watching) == {"OK"}
        await stream.flow()
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        await stream.end_input()
        received = await stream.received()
        stopped = await stream.event("stream_stopped")
    frames = stopped["frames"]
    assert frames["processed"] == frames["received"] == frames["published"] > 100, frames
    level = 0.0
    for _, frame in probe.pictures(received.path):
        picture = frame.to_ndarray(format="yuv420p")[: frame.height]  # luma as it travelled
        level = picture.mean()
        assert picture.std() < 3, "only what the graph painted is ever shown"
        assert min(abs(level - known) for known in model.levels) < 4
    assert abs(level - model.prompt["5"]["inputs"]["level"]) < 4
