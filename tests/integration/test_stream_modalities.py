"""Whole streams, broker to broker: graphs that give sound, text, pictures of another size, pictures of their own."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway_shim.localnet import measure, probe
from gateway_shim.localnet.numbered import write_clip
from gateway_shim.localnet.source import Published
from gateway_shim.media.ts import TsReader
from gateway_shim.trickle.subscriber import Subscriber
from tests.fakes.network import Network, network
from tests.fakes.sound_backend import SoundBackend, workflow
from tests.integration.test_stream_media import av_offsets_ms, sizes

FRAME = 3000  # ticks at 30 fps
#: A machine that is busy with other things must not make anything late here.
CALM = {"latency_budget_ms": 2000}


async def until(check: Callable[[], bool]) -> None:
    while not check():  # noqa: ASYNC110  # counters make no event
        await asyncio.sleep(0.01)


def alike(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Normalised correlation; 0 where there is silence."""
    size = min(len(one), len(other))
    norm = float(np.linalg.norm(one[:size]) * np.linalg.norm(other[:size]))
    return float(one[:size] @ other[:size]) / norm if norm else 0.0


def polarity(path: Path, of: Path, published: Published) -> list[float]:
    """Correlation of the sound with the one that went in, for each burst: 1 as it was, -1 turned upside down."""
    out, into = probe.sound(path), probe.sound(of)
    assert out is not None
    assert into is not None
    moved = min(published.video) - next(pts for pts, _ in probe.pictures(of))
    signs = []
    for onset in measure.onsets(into):
        at = [
            round((onset + shift - sound.pts) * measure.SAMPLE_RATE / measure.TICKS)
            for sound, shift in ((out, moved), (into, 0))
        ]
        if min(at) < 0:
            continue
        best = max(
            (
                alike(out.samples[at[0] + lag :][:2000], into.samples[at[1] :][:2000])
                for lag in range(-9, 10)  # less than a quarter of the tone
                if at[0] + lag >= 0
            ),
            key=abs,
        )
        signs.append(best)
    return signs


def holes(path: Path) -> list[int]:
    """Distances of the sound's stamps that are not one packet, in ticks."""
    reader = TsReader()
    units = [*reader.feed(path.read_bytes()), *reader.end_segment()]
    stamps = [unit.pts for unit in units if unit.track.kind == "audio" and unit.pts is not None]
    assert len(stamps) > 50
    return [later - earlier for earlier, later in itertools.pairwise(stamps) if later - earlier != 1800]


@pytest.mark.parametrize("picture", [True, False], ids=["with pictures", "alone"])
async def test_sound_of_the_graph_is_heard_in_sync_and_whole(tmp_path: Path, picture: bool) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=120, audio="aac")
    backend = SoundBackend()
    async with network(tmp_path, backend=backend, **CALM) as net:
        stream = await net.start(params={"prompts": workflow(buffer_ms=200, picture=picture)})
        published = await stream.publish(clip, realtime=True)
        state = net.shim.streams.active["cam"].status()["state"]
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(120)), "a graph without pictures leaves them as they are"
    assert state in ("ONLINE", "DEGRADED_INPUT"), "nothing is wrong with the graph"
    offsets = av_offsets_ms(received.path)
    assert len(offsets) == 4
    assert max(map(abs, offsets)) < 40
    assert not holes(received.path)
    signs = polarity(received.path, clip, published)
    assert min(map(abs, signs)) > 0.9
    assert sum(sign < 0 for sign in signs) == 3, f"the graph's sound, but for the edges of the stream: {signs}"


async def test_engine_that_goes_away_leaves_no_hole(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=180, audio="aac")
    backend = SoundBackend()
    async with network(tmp_path, backend=backend, **CALM) as net:
        stream = await net.start(params={"prompts": workflow(buffer_ms=200)})
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        await until(lambda: len(backend.heard) >= 10)
        sound = net.shim.streams.active["cam"]._sound.out
        assert sound.expects
        await net.stop_engine()
        await until(lambda: not sound.expects)
        published = await publishing
        await stream.end_input()
        received = await stream.received()
    assert received.arrivals.pts == sorted(published.video)
    assert not holes(received.path)
    assert max(map(abs, av_offsets_ms(received.path))) < 40
    signs = polarity(received.path, clip, published)
    assert sum(abs(sign) > 0.9 for sign in signs) >= len(signs) - 1, "the change may lie within a burst"
    assert min(signs) < 0, "the graph's sound before"
    assert signs[-1] > 0, "the input's sound after"


async def test_graph_that_hangs_is_replaced_by_the_inputs_sound(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=120, audio="aac")
    backend = SoundBackend()
    async with network(tmp_path, backend=backend, latency_budget_ms=200) as net:
        stream = await net.start(params={"prompts": workflow(buffer_ms=100)})
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        await until(lambda: len(backend.heard) >= 5)
        backend.gate.clear()
        published = await publishing
        await stream.end_input()
        received = await stream.received()
        backend.gate.set()
    assert received.arrivals.pts == sorted(published.video)
    assert not holes(received.path)
    assert polarity(received.path, clip, published)[-1] > 0.9


class Reader:
    """The gateway's reader of a data channel."""

    def __init__(self, net: Network) -> None:
        self._net = net
        self.url = net.broker.create("cam-data", "application/jsonl")
        self.lines: list[dict[str, Any]] = []
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with Subscriber(self._net.http, self.url) as subscriber:
            async for segment in subscriber:
                assert not segment.gap
                self.lines += map(json.loads, (await segment.read(1 << 21)).decode().splitlines())

    async def texts(self) -> list[dict[str, Any]]:
        """All of them, when the stream is over."""
        await self._net.shim.streams.wait_idle()
        await self._net.broker.delete("cam-data")
        await self._task
        return [line for line in self.lines if line["type"] == "text"]


async def test_text_of_every_run_arrives_although_the_stream_stops(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=90, audio="aac")
    backend = SoundBackend()
    async with network(tmp_path, backend=backend, **CALM) as net:
        reader = Reader(net)
        prompt = workflow(buffer_ms=100, picture=False, sound=False, text="so\nloud")
        stream = await net.start(params={"prompts": prompt}, data_url=reader.url)
        await stream.publish(clip, realtime=True)
        await until(lambda: len(backend.heard) >= 20)
        status, _ = await net.post("/stream/stop", {"gateway_request_id": "cam"})
        assert status == 200
        texts = await reader.texts()
    assert len(texts) == len(backend.heard)
    assert {(line["node"], line["text"]) for line in texts} == {("5", "so\nloud")}
    steps = np.diff([line["pts"] for line in texts])
    assert set(steps.tolist()) == {9000}, "pts are those of the stream"


async def test_text_without_any_output_of_pictures(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=30)
    long = "x" * 100_000
    backend = SoundBackend()
    async with network(tmp_path, backend=backend, **CALM) as net:
        reader = Reader(net)
        params = {"prompts": workflow(sound=False, text=long)}
        stream = await net.start(params=params, data_url=reader.url, without=("publish_url",))
        await stream.publish(clip, realtime=True)
        await until(lambda: backend.runs >= 1)
        await stream.end_input()
        texts = await reader.texts()
    assert texts
    assert texts[0]["text"] + texts[1]["text"] == long
    assert [(line["part"], line["parts"]) for line in texts[:2]] == [(1, 2), (2, 2)]


async def test_size_of_the_graph_is_the_streams_from_its_first_picture(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=60)
    backend = SoundBackend(scale=2)
    backend.may_build.clear()
    async with network(tmp_path, backend=backend, latency_budget_ms=200) as net:
        stream = await net.start(params={"prompts": workflow()})
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        session = net.shim.streams.active["cam"]
        await until(lambda: session.status()["frames"]["received"] >= 15)  # well beyond the budget
        backend.may_build.set()
        await publishing
        await stream.end_input()
        received = await stream.received()
    assert sizes(received.path) == {(640, 480)}
    assert len(received.arrivals.pts) == 60, "what waited for the size is not lost"


async def test_stream_without_input_runs_at_its_own_rate(tmp_path: Path) -> None:
    prompt = {
        "1": {"class_type": "LoadTensor", "inputs": {}},
        "2": {"class_type": "SaveTensor", "inputs": {"images": ["1", 0]}},
    }
    async with network(tmp_path, backend=SoundBackend(), **CALM) as net:
        params = {"prompts": prompt, "max_framerate": 30, "width": 320, "height": 256}
        stream = await net.start(params=params, without=("subscribe_url",))
        await stream.flow(45)
        status = net.shim.streams.active["cam"].status()
        assert status["input_status"]["fps"] > 20
        await net.post("/stream/stop", {"gateway_request_id": "cam"})
        received = await stream.received()
    assert sizes(received.path) == {(320, 256)}
    assert set(np.diff(received.arrivals.pts).tolist()) == {FRAME}
    assert status["frames"]["received"] >= 45
