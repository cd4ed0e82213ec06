"""A whole appliance for tests that kill parts of it: supervisord, both programs, an orchestrator, its own folder.

The engine runs without ComfyUI, which is up in a second. What a custom node may do, start processes that nobody asked
for, is done in its place by a `sitecustomize` module.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway_shim import supervise
from gateway_shim.localnet.live_stream import LiveStream
from gateway_shim.localnet.numbered import write_clip
from gateway_shim.localnet.orchestrator import Orchestrator
from gateway_shim.localnet.programs import Programs, free_port, plain_environment
from gateway_shim.localnet.source import publish_file
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import Publisher
from gateway_shim.trickle.wire import ChannelError

from .traces import Traces

#: Generous: the machine may be busy with anything, and waiting ends with the event.
DEADLINE_S = 60
NAME = "life"

#: Two processes that ignore SIGTERM: one in the engine's process group, one that left it.
NODES = """
import os, subprocess, sys, threading, time
def start():
    while "HEADRACE_ENGINE_LIFE" not in os.environ:
        time.sleep(0.02)
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-I", "-c", child, "node"])
    subprocess.Popen([sys.executable, "-I", "-c", child, "node"], start_new_session=True)
if sys.orig_argv[-2:] == ["-m", "engine"]:
    threading.Thread(target=start, daemon=True).start()
"""


@dataclass
class Appliance:
    programs: Programs
    orchestrator: Orchestrator
    traces: Traces

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.programs.launch.environment['HEADRACE_LISTEN_PORT']}"

    async def pids(self) -> dict[str, int]:
        return {program.name: program.pid for program in await self.programs.programs()}

    def nodes(self) -> list[int]:
        return [pid for pid, command in self.traces.processes().items() if command.rstrip().endswith("node")]

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():  # noqa: ASYNC110  other processes
                await asyncio.sleep(0.05)

    async def another(self, name: str, than: int) -> int:
        """The process id of the successor of a program, once there is one."""
        async with asyncio.timeout(DEADLINE_S):
            while (pid := (await self.pids()).get(name, 0)) in (0, than):  # noqa: ASYNC110  another process
                await asyncio.sleep(0.1)
        return pid

    async def ask(self, method: str, *arguments: str) -> Any:
        """Call supervisord, as supervisorctl does."""
        import xmlrpc.client

        from supervisor.xmlrpc import SupervisorTransport

        def call() -> Any:
            socket = self.programs.launch.control_socket
            transport = SupervisorTransport("headrace", "headrace", f"unix://{socket}")
            server = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
            try:
                return getattr(server.supervisor, method)(*arguments)
            finally:
                transport.close()

        return await asyncio.to_thread(call)


@contextlib.asynccontextmanager
async def appliance(tmp_path: Path, orchestrator: Orchestrator, **more: str) -> AsyncIterator[Appliance]:
    temporary, nodes = tmp_path / "t", tmp_path / "nodes"
    for folder in (temporary, nodes):
        folder.mkdir(exist_ok=True)
    (nodes / "sitecustomize.py").write_text(NODES)
    run_dir = tmp_path / "r"
    environment = plain_environment(os.environ) | {
        "COMFYUI_DIR": "none",
        "HEADRACE_LISTEN_PORT": str(free_port()),
        "ORCH_URL": orchestrator.url,
        "CAPABILITY_NAME": NAME,
        "HEADRACE_DRAIN_S": "1",
        "HEADRACE_ENGINE_GRACE_S": "1",
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join([str(nodes), os.environ.get("PYTHONPATH", "")]),
    }
    traces = Traces(run_dir, temporary)
    async with Programs(supervise.plan(environment | more, run_dir)) as programs:
        yield Appliance(programs, orchestrator, traces)
    # Whatever a test did, it leaves this machine as it was.
    for pid in traces.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def ready(tmp_path: Path, **more: str) -> AsyncIterator[Appliance]:
    """An appliance that is registered, its engine with two children that nobody asked for."""
    async with Orchestrator() as orchestrator, appliance(tmp_path, orchestrator, **more) as it:
        await orchestrator.registered(NAME, timeout_s=DEADLINE_S)
        await it.until(lambda: len(it.nodes()) == 2)
        yield it


@contextlib.asynccontextmanager
async def streaming(it: Appliance, tmp_path: Path) -> AsyncIterator[LiveStream]:
    """A stream that is in full flow; it is published until the block or the input channel ends."""
    clip = write_clip(tmp_path / "clip.ts", frames=60, width=128, height=128, audio="aac")
    stream = await it.orchestrator.start_stream(name=NAME)

    async def publish() -> None:
        with contextlib.suppress(ChannelError):
            async with Publisher(http, stream.subscribe_url, content_type="video/MP2T") as publisher:
                await publish_file(publisher, clip)

    async with open_http() as http:
        publishing = asyncio.create_task(publish())
        try:
            await it.orchestrator.broker.wait_for_segment(f"{stream.id}-out", 0)
            yield stream
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            await stream.close()
