"""An engine that hangs or dies under a real supervisord: what repairs it, how soon, and what is said of it."""

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from gateway_shim.localnet.programs import Program, Programs
from tests.process.test_supervisor import DEADLINE_S, alive, get, health, launch, until

pytestmark = [pytest.mark.process, pytest.mark.alone, pytest.mark.timeout(180)]


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r") / "d"


def engine_of(found: list[Program]) -> Program:
    return next(program for program in found if program.name == "engine:engine-0")


async def settled(programs: Programs) -> list[Program]:
    return await until(programs, lambda found: alive(found, 3) and engine_of(found).state == "RUNNING")


async def last_end(port: str, words: str) -> dict:
    """What the worker's status says of the engine's last end, once it says these words."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            (engine,) = (await asyncio.to_thread(get, port, "/stream/status"))["additional_info"]["engines"]
            if engine["last_end"] is not None and words in engine["last_end"]["reason"]:
                return engine
            await asyncio.sleep(0.1)


async def test_stopped_engine_is_replaced_within_ten_seconds_and_status_says_why(run_dir):
    plan = launch(run_dir)
    port = plan.environment["HEADRACE_LISTEN_PORT"]
    async with Programs(plan) as programs:
        found = await settled(programs)
        await health(port, "IDLE")
        before = engine_of(found).pid
        with (run_dir / "log" / "engine-0.log").open("ab") as log:  # of which the last bytes begin within a character
            log.write("é".encode() * 4000 + b"\x1b[34mblue words\x1b[0m 50 %\r100 %\n")
        os.kill(before, signal.SIGSTOP)
        stopped_at = time.monotonic()
        await until(programs, lambda now: engine_of(now).pid not in (0, before))
        took_s = time.monotonic() - stopped_at
        assert took_s < 10, took_s
        await health(port, "IDLE")
        engine = await last_end(port, "SIGSTOP")
        assert "restarted by the watchdog" in engine["last_end"]["reason"]
        assert engine["last_end"]["log"].endswith("éblue words 50 %\n100 %\n")
        assert engine["restarts"] == 1
        assert not psutil.pid_exists(before)
        watchdog = psutil.Process(next(program.pid for program in found if program.name == "watchdog"))
        assert watchdog.memory_info().rss < 70e6


async def test_engine_that_crashes_in_native_code_says_where(run_dir):
    plan = launch(run_dir)
    port = plan.environment["HEADRACE_LISTEN_PORT"]
    async with Programs(plan) as programs:
        await health(port, "IDLE")
        os.kill(engine_of(await settled(programs)).pid, signal.SIGSEGV)
        engine = await last_end(port, "SIGSEGV")
        assert "Segmentation fault" in engine["last_end"]["reason"]
        assert "engine/__main__.py" in engine["last_end"]["log"]
        await health(port, "IDLE")


async def test_engine_that_is_only_restarted_by_its_operator_is_no_news(run_dir):
    plan = launch(run_dir)
    port = plan.environment["HEADRACE_LISTEN_PORT"]
    async with Programs(plan) as programs:
        await health(port, "IDLE")
        before = engine_of(await settled(programs)).pid
        os.kill(before, signal.SIGTERM)
        await until(programs, lambda now: engine_of(now).pid not in (0, before))
        await health(port, "IDLE")
        (engine,) = (await asyncio.to_thread(get, port, "/stream/status"))["additional_info"]["engines"]
        assert engine["last_end"] is None
