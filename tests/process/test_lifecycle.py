"""Stop, restart and kill -9 of either program and of supervisord, at any moment: nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway_shim.localnet.orchestrator import Orchestrator

from .appliance import DEADLINE_S, NAME, Appliance, appliance, ready, streaming

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

#: supervisord, shim, engine, its warden, the watchdog, and two strangers.
EVERYBODY = 7


def sockets_only(files: list[str]) -> bool:
    return all(".sock" in name or name.endswith(".pid") for name in files)


async def test_stop_with_stubborn_children_leaves_nothing(tmp_path: Path) -> None:
    async with ready(tmp_path) as it:
        assert len(it.traces.processes()) == EVERYBODY
        assert await it.programs.stop() == 0
        assert it.traces.processes() == {}
        assert it.traces.files() == []
        await it.orchestrator.unregistered(NAME)
        account = (tmp_path / "r" / "log" / "supervisord.log").read_text()
        assert account.count("exit status 0") >= 2, account


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
        assert len(it.traces.processes()) == EVERYBODY


async def test_killed_engine_takes_its_children_along(tmp_path: Path) -> None:
    async with ready(tmp_path) as it, streaming(it, tmp_path) as stream:
        family, engine = it.nodes(), (await it.pids())["engine:engine-0"]
        os.kill(engine, signal.SIGKILL)
        await it.until(lambda: not set(family) & set(it.traces.processes()))
        await it.another("engine:engine-0", engine)
        await stream.next_event("restart", DEADLINE_S)
        await it.until(lambda: len(it.nodes()) == 2)
        await it.until(lambda: len(it.traces.processes()) == EVERYBODY)  # with one warden again


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
