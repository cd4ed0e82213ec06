"""Stop, restart and kill -9 of either program and of supervisord, at any moment: nothing is left behind.

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

import aiohttp
import pytest

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

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

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


def sockets_only(files: list[str]) -> bool:
    return all(".sock" in name or name.endswith(".pid") for name in files)


async def test_stop_with_stubborn_children_leaves_nothing(tmp_path: Path) -> None:
    async with ready(tmp_path) as it:
        assert len(it.traces.processes()) == 6, "supervisord, shim, engine, its warden and two strangers"
        assert await it.programs.stop() == 0
        assert it.traces.processes() == {}
        assert it.traces.files() == []
        await it.orchestrator.unregistered(NAME)
        account = (tmp_path / "r" / "log" / "supervisord.log").read_text()
        assert account.count("exit status 0") == 2, account


@pytest.mark.parametrize("moment", ["idle", "mid-stream"])
async def test_restart_of_everything_leaves_nothing_of_before(tmp_path: Path, moment: str) -> None:
    async with ready(tmp_path) as it, contextlib.AsyncExitStack() as stack:
        if moment == "mid-stream":
            await stack.enter_async_context(streaming(it, tmp_path))
        before = set(it.traces.processes()) - {it.programs.pid}
        await it.ask("stopAllProcesses")
        assert set(it.traces.processes()) == {it.programs.pid}
        await it.orchestrator.unregistered(NAME)
        await it.ask("startAllProcesses")
        await it.orchestrator.registered(NAME, timeout_s=DEADLINE_S)
        await it.until(lambda: len(it.nodes()) == 2)
        assert not before & set(it.traces.processes())
        assert len(it.traces.processes()) == 6


async def test_killed_engine_takes_its_children_along(tmp_path: Path) -> None:
    async with ready(tmp_path) as it, streaming(it, tmp_path) as stream:
        family, engine = it.nodes(), (await it.pids())["engine:engine-0"]
        os.kill(engine, signal.SIGKILL)
        await it.until(lambda: not set(family) & set(it.traces.processes()))
        await it.another("engine:engine-0", engine)
        await stream.next_event("restart", DEADLINE_S)
        await it.until(lambda: len(it.nodes()) == 2)
        await it.until(lambda: len(it.traces.processes()) == 6)  # with one warden again


async def start(it: Appliance, **body: Any) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as http, http.post(it.url + "/stream/start", json=body) as response:
        return response.status, await response.json()


async def test_sigterm_drains_hands_over_and_exits_with_zero(tmp_path: Path) -> None:
    async with ready(tmp_path, HEADRACE_DRAIN_S="3") as it, streaming(it, tmp_path) as stream:
        shim = (await it.pids())["shim"]
        os.kill(shim, signal.SIGTERM)
        await it.orchestrator.unregistered(NAME)
        events = it.orchestrator.broker.create("late-events")
        status, answer = await start(it, gateway_request_id="late", events_url=events)
        assert (status, answer["code"]) == (503, "not_ready")
        assert "shutting down" in answer["message"]
        assert f"{stream.id}-out" in it.orchestrator.broker.channels, "it may still end by itself"
        stopped = await stream.next_event("stream_stopped", DEADLINE_S)
        assert stopped["message"] == "this worker is shutting down"
        assert f"{stream.id}-out" not in it.orchestrator.broker.channels, "so that the gateway fails over at once"
        await it.another("shim", shim)
        account = (tmp_path / "r" / "log" / "supervisord.log").read_text()
        assert "exited: shim (exit status 0" in account, account
        await it.orchestrator.registered(NAME, timeout_s=DEADLINE_S)


async def test_stream_that_ends_during_the_drain_is_not_cut(tmp_path: Path) -> None:
    async with ready(tmp_path, HEADRACE_DRAIN_S="20") as it, streaming(it, tmp_path) as stream:
        shim = (await it.pids())["shim"]
        os.kill(shim, signal.SIGTERM)
        await it.orchestrator.unregistered(NAME)
        await stream.end_input()
        stopped = await stream.next_event("stream_stopped", DEADLINE_S)
        assert "shutting down" not in stopped["message"]
        assert f"{stream.id}-out" in it.orchestrator.broker.channels
        # Long before the drain is over.
        async with asyncio.timeout(15):
            await it.another("shim", shim)


#: What supervisord is doing when it is killed.
MOMENTS = ("starting", "idle", "mid-stream", "stopping")


@pytest.mark.parametrize("moment", MOMENTS)
async def test_killed_supervisord_takes_everything_along_and_the_next_start_is_clean(
    tmp_path: Path, moment: str
) -> None:
    async with Orchestrator() as orchestrator:
        async with appliance(tmp_path, orchestrator) as it, contextlib.AsyncExitStack() as stack:
            if moment == "starting":
                # Both are forked; what they are is not loaded yet.
                await it.until(lambda: len(it.traces.processes()) >= 3)
            else:
                await orchestrator.registered(NAME, timeout_s=DEADLINE_S)
                await it.until(lambda: len(it.nodes()) == 2)
            if moment in ("mid-stream", "stopping"):
                await stack.enter_async_context(streaming(it, tmp_path))
            if moment == "stopping":
                os.kill(it.programs.pid, signal.SIGTERM)
                await orchestrator.unregistered(NAME)
            os.kill(it.programs.pid, signal.SIGKILL)
            await it.traces.no_process(within_s=DEADLINE_S)
            assert sockets_only(it.traces.files())
        async with appliance(tmp_path, orchestrator) as it:
            await orchestrator.registered(NAME, timeout_s=DEADLINE_S)
            assert await it.programs.stop() == 0
            assert it.traces.processes() == {}
            assert it.traces.files() == []


async def test_engine_that_hangs_does_not_outlive_supervisord(tmp_path: Path) -> None:
    async with ready(tmp_path, HEADRACE_ENGINE_GRACE_S="0.1") as it:
        os.kill((await it.pids())["engine:engine-0"], signal.SIGSTOP)
        os.kill(it.programs.pid, signal.SIGKILL)
        await it.traces.no_process(within_s=DEADLINE_S)


@pytest.mark.parametrize("name", ["shim", "engine:engine-0"])
async def test_program_killed_while_it_stops_leaves_nothing(tmp_path: Path, name: str) -> None:
    async with ready(tmp_path) as it, streaming(it, tmp_path):
        victim = (await it.pids())[name]
        stopping = asyncio.create_task(it.programs.stop())
        await it.orchestrator.unregistered(NAME)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        assert await stopping == 0
        # Of a killed engine the warden ends the children, after supervisord perhaps.
        await it.traces.no_process(within_s=DEADLINE_S)
