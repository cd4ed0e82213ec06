"""The shim as a process: what it loads, how fast it answers, how it ends. No engine runs here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from gateway_shim.localnet.orchestrator import Orchestrator

pytestmark = pytest.mark.process

#: The limit is one second on a machine of its own; test machines are shared.
START_S = 5.0

FRESH = """
import json, sys, time
began = time.process_time()
import gateway_shim.__main__
print(json.dumps({"cpu_s": time.process_time() - began, "modules": sorted(sys.modules)}))
"""


async def python(*arguments: str, **environment: str) -> Process:
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("HEADRACE_", "ORCH_", "CAPABILITY_"))
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-P", *arguments, stdout=PIPE, stderr=STDOUT, env=clean | environment
    )


@contextlib.asynccontextmanager
async def shim(run_dir: Path, **environment: str) -> AsyncIterator[tuple[Process, str]]:
    """The process and its URL, from the line in its log."""
    process = await python("-m", "gateway_shim", "--listen-port", "0", HEADRACE_RUN_DIR=str(run_dir), **environment)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            while (match := re.search(rb"listening on (\S+),", line := await process.stdout.readline())) is None:
                assert line, "the shim ended"
        yield process, match[1].decode()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_fresh_interpreter_loads_no_torch_no_engine_and_little_else() -> None:
    process = await python("-c", FRESH)
    output, _ = await process.communicate()
    assert process.returncode == 0, output
    report = json.loads(output)
    packages = {name.partition(".")[0] for name in report["modules"]}
    assert not packages & {"torch", "engine", "cext", "comfy", "scipy", "transformers"}
    assert report["cpu_s"] < 2.0


async def test_starts_without_an_engine_reports_loading_and_stops_on_sigterm(tmp_path: Path) -> None:
    began = time.monotonic()
    async with shim(tmp_path) as (process, url), aiohttp.ClientSession() as http:
        async with http.get(url + "/health") as response:
            assert await response.json() == {"status": "LOADING"}
        assert time.monotonic() - began < START_S
        start = {"gateway_request_id": "a", "events_url": "http://127.0.0.1:1/ai/trickle/a-events"}
        async with http.post(url + "/stream/start", json=start) as response:
            assert (response.status, (await response.json())["code"]) == (503, "not_ready")
        async with http.get(url + "/hardware/info") as response:
            assert (await response.json())["gpu_info"] == {}
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0


async def test_does_not_register_before_the_engine_is_ready(tmp_path: Path) -> None:
    async with Orchestrator() as orchestrator, shim(tmp_path, ORCH_URL=orchestrator.url) as (process, url):
        async with aiohttp.ClientSession() as http, http.get(url + "/health") as response:
            assert response.status == 200
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert orchestrator.registrations == orchestrator.refused_registrations == 0


async def test_wrong_settings_are_said_on_stderr_with_exit_code_2(tmp_path: Path) -> None:
    workflow = tmp_path / "w.json"
    workflow.write_text("[]")
    for environment, sentence in (
        ({"CAPABILITY_CAPACITY": "many"}, "capacity from environment CAPABILITY_CAPACITY"),
        ({"HEADRACE_DEFAULT_WORKFLOW": str(workflow)}, "holds no workflow"),
    ):
        process = await python("-m", "gateway_shim", "--listen-port", "0", **environment)
        output, _ = await process.communicate()
        assert process.returncode == 2
        assert sentence in output.decode()
        assert "Traceback" not in output.decode()


async def test_a_port_in_use_is_said_with_exit_code_1(tmp_path: Path) -> None:
    async with shim(tmp_path) as (_, url):
        process = await python("-m", "gateway_shim", "--listen-port", url.rpartition(":")[2])
        output, _ = await process.communicate()
        assert process.returncode == 1
        assert "cannot serve" in output.decode()
        assert "Traceback" not in output.decode()


async def test_logs_are_json_when_asked(tmp_path: Path) -> None:
    process = await python("-m", "gateway_shim", "--listen-port", "0", "--log-format", "json")
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            line = json.loads(await process.stdout.readline())
        assert {"time", "level", "logger", "message"} <= line.keys()
    finally:
        process.terminate()
        await process.communicate()
