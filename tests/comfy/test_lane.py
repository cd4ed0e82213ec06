"""Slots and the real ComfyUI: every picture is its frame's, and stays so, whatever happens to the graph."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from engine.config import read
from gateway_shim.engine_client import EngineClient
from gateway_shim.media.planes import frame_of, planes_of, rows_of
from proto import engine_pb2 as pb
from proto.frames import Frame
from proto.results import Results
from tests.comfy.conftest import graph
from tests.fakes.engine_client import grey

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT = 64, 48
FRAMES = 60  # with each graph


@pytest.fixture(scope="module", params=["executor", "plan"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of an engine with the runner asked for; equal sessions share runs where that can be."""
    comfyui = read().comfyui_dir
    if comfyui is None:
        reason = "there is no ComfyUI: run `make comfyui` or set COMFYUI_DIR"
        pytest.fail(reason) if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1" else pytest.skip(reason)
    address = f"unix:{tmp_path_factory.mktemp('lane')}/engine.sock"
    wishes = {"HEADRACE_ENGINE_RUNNER": request.param, "HEADRACE_ENGINE_SHARE_BATCHES": "1"}
    engine = subprocess.Popen(
        [sys.executable, "-m", "engine", "--address", address, "--log-level", "warning"],
        cwd=ROOT,
        env=os.environ | wishes | {"COMFYUI_DIR": str(comfyui)},
    )
    yield address
    engine.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        engine.wait(20)
    engine.kill()
    engine.wait()


def inverted(width: int, height: int) -> str:
    scale = {"upscale_method": "nearest-exact", "width": width, "height": height, "crop": "disabled"}
    return json.dumps(
        graph(
            inverted=("ImageInvert", {"image": ["live", 0]}),
            scaled=("ImageScale", {"image": ["inverted", 0], **scale}),
            out=("SaveTensor", {"images": ["scaled", 0]}),
        )
    )


#: One after the other: size of the pictures and whether they are inverted. Twice the size fits into no slot; the
#: one that hands its input through is no graph of ComfyUI's at all.
GRAPHS = [
    (inverted(WIDTH, HEIGHT), (WIDTH, HEIGHT), True),
    (inverted(WIDTH // 2, HEIGHT // 2), (WIDTH // 2, HEIGHT // 2), True),
    (inverted(WIDTH * 2, HEIGHT * 2), (WIDTH * 2, HEIGHT * 2), True),
    (json.dumps(graph(out=("SaveTensor", {"images": ["live", 0]}))), (WIDTH, HEIGHT), False),
    (inverted(WIDTH, HEIGHT), (WIDTH, HEIGHT), True),
]


def level(number: int) -> int:
    """Three apart, as conversion there and back may be off by one; as many as fit into the luma of video."""
    return 20 + 3 * (number % 70)


class Stream:
    """A session that sends frames without pause, and looks at its pictures only some time later."""

    def __init__(self, client: EngineClient, name: str, first: int, *, max_batch: int) -> None:
        self.client = client
        self.name = name
        self.number = first
        self.rng = random.Random(first)
        self.max_batch = max_batch
        self.held: list[tuple[av.VideoFrame, int, int]] = []
        self.seen = dict.fromkeys(range(1, len(GRAPHS) + 1), 0)  # pictures by version
        self.slots: dict[int, set[bool]] = {version: set() for version in self.seen}

    async def run(self) -> None:
        request = pb.OpenSession(
            session_id=self.name,
            video=pb.VideoFormat(width=WIDTH, height=HEIGHT),
            workflow_json=GRAPHS[0][0],
            max_batch=self.max_batch,
        )
        async with self.client.open(request) as session:
            self.lane = session.lane
            sender = asyncio.create_task(self._send(session), name=self.name)
            updates: list[asyncio.Task[pb.UpdateSessionResponse]] = []
            try:
                async for response in session.responses():
                    for result in response.results if isinstance(response, Results) else ():
                        assert result.picture is not None, (result.dropped, result.failed)
                        self._take(result.frame_id, result.version, result.picture)
                    version = 1 + len(updates)
                    if self.seen[version] < FRAMES:
                        continue
                    if version == len(GRAPHS):
                        break
                    change = pb.UpdateSessionRequest(session_id=self.name, workflow_json=GRAPHS[version][0])
                    updates.append(asyncio.create_task(self.client.update(change, 60)))
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
            assert [(await update).version for update in updates] == list(range(2, len(GRAPHS) + 1))
        while self.held:
            self._look(self.held.pop())

    async def _send(self, session) -> None:
        while True:
            await session.credit()
            frames = []
            for _ in range(min(session.batch, session.credits)):
                picture = frame_of(grey(WIDTH, HEIGHT, level(self.number)), WIDTH, HEIGHT)
                frames.append(session.load(Frame(self.number, self.number), rows_of(picture)))
                self.number += 1
            await session.send(frames)

    def _take(self, number: int, version: int, picture) -> None:
        self.seen[version] += 1
        self.slots[version].add(bool(picture.slot))
        self.held.append((frame_of(picture.planes, picture.width, picture.height), number, version))
        picture.planes = b""
        while len(self.held) > 4:  # the one that came first is shown again and again
            self._look(self.held.pop(self.rng.randrange(1, len(self.held))))

    def _look(self, held: tuple[av.VideoFrame, int, int]) -> None:
        frame, number, version = held
        _, size, invert = GRAPHS[version - 1]
        assert (frame.width, frame.height) == size, f"frame {number} of version {version}"
        luma = np.frombuffer(planes_of(frame), np.uint8)[: frame.width * frame.height].astype(int)
        expected = 251 - level(number) if invert else level(number)
        assert abs(luma - expected).max() <= 1, f"{self.name}: frame {number} of version {version} is another one's"


@pytest.mark.parametrize("max_batch", [1, 4])
async def test_every_picture_is_its_frame_s(address: str, max_batch: int) -> None:
    async with EngineClient(address) as sharing, EngineClient(address, share_memory=False) as other:
        await sharing.ready()
        await other.ready()
        streams = [
            Stream(client, f"{name}-{max_batch}", 1 + 23 * number, max_batch=max_batch)
            for number, (client, name) in enumerate([(sharing, "a"), (sharing, "b"), (other, "c")])
        ]
        async with asyncio.TaskGroup() as all_of_them:
            for stream in streams:
                all_of_them.create_task(stream.run())
    assert [stream.lane for stream in streams] == ["shared_memory", "shared_memory", "bytes"]
    for stream in streams:
        assert min(stream.seen.values()) >= FRAMES
    for stream in streams[:2]:
        assert True in stream.slots[1]
        assert True in stream.slots[2]
        assert stream.slots[3] == {False}, "twice the size fits into no slot"
        assert True in stream.slots[4]
    assert streams[2].slots == {version: {False} for version in streams[2].seen}
