"""Short runs of `make chaos`; docs/chaos.md says how to go on from one that fails."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import processes

pytestmark = [pytest.mark.process, pytest.mark.alone, pytest.mark.timeout(180)]


async def chaos(output: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, figures, everything that was said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.chaos", "--output", str(output), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    text = (await process.communicate())[0].decode()
    assert process.returncode is not None
    try:
        return process.returncode, json.loads(text.strip().splitlines()[-1]), text
    except ValueError:
        raise AssertionError(text) from None


async def test_stream_outlives_a_killed_engine(tmp_path: Path) -> None:
    code, figures, text = await chaos(tmp_path, "--seed", "1", "--kills", "1", "--seconds", "10", "--graph", "pass")
    assert code == 0, text
    assert figures["kills"] == figures["streams"] == 1
    assert figures["ledger_exact"]
    assert (figures["audio_samples_lost"], figures["leaked"]) == (0, 0)
    assert figures["max_output_gap_ms"] <= 200
    assert figures["processed_back_s"][0] is not None


async def test_random_faults_break_nothing(tmp_path: Path) -> None:
    runs = [chaos(tmp_path, "--seed", str(seed), "--seconds", "10", "--graph", "pass") for seed in (1, 5)]
    for code, figures, text in await asyncio.gather(*runs):
        assert code == 0, text
        assert figures["faults"] > 3
        assert figures["frames_out"] > 0


async def test_crash_of_the_shim_is_noticed(tmp_path: Path) -> None:
    running = asyncio.create_task(chaos(tmp_path, "--seed", "2", "--kills", "1", "--seconds", "8", "--graph", "pass"))
    async with asyncio.timeout(60):
        while not (tmp_path / "seed-2" / "plan.json").exists():  # noqa: ASYNC110 another process's file
            await asyncio.sleep(0.05)
        while not (pids := shims()):  # noqa: ASYNC110 another process
            await asyncio.sleep(0.1)
    await asyncio.sleep(5)  # past its warm-up, in the stream that counts
    for pid in pids:
        os.kill(pid, 9)
    code, _, text = await running
    assert code == 1
    assert "it crashed" in text, text


def shims() -> list[int]:
    """Of runs below this process."""
    from gateway_shim.localnet.programs import descendants

    found = []
    for pid in descendants(os.getpid()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[2:4] == [b"-m", b"gateway_shim"]:
            found.append(pid)
    return found


def test_leaks_are_seen_from_outside(tmp_path: Path) -> None:
    before = processes.holdings(os.getpid())
    memory = os.memfd_create("chaos")
    try:
        more = processes.holdings(os.getpid(), tasks=2).beyond(before)
    finally:
        os.close(memory)
    assert more == {"descriptors": 1, "shared_memory": 1, "tasks": 2}
    (tmp_path / "run" / "log").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    for name in ("run/log/shim.log", "run/engine-0.sock", "tmp/x"):
        (tmp_path / name).touch()
    assert processes.left_in(tmp_path / "run", tmp_path / "tmp") == ["engine-0.sock", "tmp/x"]
