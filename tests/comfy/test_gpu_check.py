"""``make gpu-check``: its whole code runs on the CPU with tiny models, and wrong pictures fail it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from engine.backend import PictureOut, RunResult
from engine.config import read
from engine.graph.device_pixels import DevicePixels

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def small(host: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import comfy.model_management
    import folder_paths

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})  # what it finds in folders that go with the test
    threads = torch.get_num_threads()
    yield replace(read([]), device="cpu")
    torch.set_num_threads(threads)
    comfy.model_management.unload_all_models()


def test_every_part_runs_and_gives_its_figures(small: Any) -> None:
    results = gpu.run(small, small=True)
    assert all(isinstance(value, float) and value >= 0 for value in results.values())
    expected = {"gpu_up_small_x_cpu", "gpu_down_small_x_cpu", "gpu_diffusion_device_fps", "gpu_streams_30fps"}
    assert expected | {
        "gpu_diffusion_cpu_fps",
        "gpu_diffusion_executor_fps",
        "gpu_nvenc",
        "gpu_encode_libx264_1080p_ms",
        "gpu_decode_cpu_1080p_ms",
    } <= set(results)


def test_a_wrong_conversion_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DevicePixels._rgb
    monkeypatch.setattr(DevicePixels, "_rgb", lambda *arguments: right(*arguments) + 1e-5)
    with pytest.raises(gpu.WrongOutput, match="up_device at small is off by 1"):
        gpu.conversion(torch.device("cpu"), gpu.SMALL, 1)


def test_a_graph_that_gives_the_same_picture_for_every_frame_fails_it() -> None:
    class Stuck:
        def run(self, *_: Any) -> RunResult:
            return RunResult([PictureOut(bytes(96), 8, 8)])

    with pytest.raises(gpu.WrongOutput, match="the last one once more"):
        gpu.frames_per_s([Stuck()], gpu.VideoFormat(8, 8), torch.device("cpu"), 2)  # type: ignore[list-item]


def test_without_a_gpu_it_says_so_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    assert capsys.readouterr().out == gpu.NO_GPU + "\n"


def test_figures_are_written_as_flat_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "run", lambda settings, *, small: {"gpu_up_512_x_cpu": 0.25})
    gpu.main(["--device", "cpu", "--json", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"gpu_up_512_x_cpu": 0.25}
