"""The benchmarks of the real programs, very short: they run, their outputs are checked, their keys are there."""

from __future__ import annotations

import os

import pytest

from bench import lanes, latency, material, trip
from bench.appliance import running
from gateway_shim.localnet.programs import embedded_comfyui

pytestmark = [pytest.mark.process, pytest.mark.alone, pytest.mark.comfy, pytest.mark.timeout(180)]


@pytest.fixture(autouse=True)
def comfyui_is_there() -> None:
    if not (embedded_comfyui() or os.environ.get("COMFYUI_DIR")):
        if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1":
            pytest.fail("there is no ComfyUI; run make comfyui")
        pytest.skip("needs a ComfyUI; run make comfyui")


async def test_the_parts_of_the_appliance_give_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trip.QUICK_WINDOWS, "512", 2)
    monkeypatch.setattr(lanes, "QUICK_BATCHES", 4)
    monkeypatch.setattr(lanes, "QUICK_ROUNDS", 1)
    monkeypatch.setattr(latency, "QUICK_FRAMES", 40)
    monkeypatch.setattr(latency, "QUICK_STARTS", 1)
    async with running() as appliance:
        clips = {size: material.write(appliance.folder / f"{size}.mp4", size) for size in ("512", "720p")}
        found = await lanes.run(appliance, quick=True)
        found |= await trip.run(appliance, clips, quick=True, sizes=("512",))
        found |= await latency.run(appliance, clips, quick=True)
    wanted = {
        "lane_bytes_s_per_gb",
        "trip_overhead_512_x_codec",
        "trip_http_512_ms",
        "latency_inside_720p_p50_ms",
        "latency_inside_720p_p99_ms",
        "decode_lag_ms",
        "first_picture_ms",
        *(f"cpu_{stage}_512_ms" for stage in ("ts", "decode", "convert", "graph", "encode", "mux", "http", "python")),
    }
    assert wanted <= set(found)
    assert all(isinstance(value, float) for value in found.values())
    for table in (lanes.table, trip.table, latency.table):
        assert table(found)
    for stage in ("decode", "encode", "convert", "graph", "mux", "ts"):
        assert found[f"cpu_{stage}_512_ms"] > 0, f"nothing was timed as {stage}"
