"""One run of a plan: the programs come up, the faults come at their times, and the account is drawn."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gateway_shim.localnet.orchestrator import WorkerRefused
from gateway_shim.localnet.programs import free_port

from .appliance import COMFYUI, Appliance, appliance, comfyui_with_slow_node
from .plan import Plan
from .processes import Holdings, clients_of, connections, holdings, left_in, marked
from .source import Recipe
from .stream import Stream
from .strike import Striker

#: The stream before the one that counts: what a process makes once (thread pools, connections) is there after it.
_WARM_UP_S = 2.0
#: What was let go of may take this long to be gone.
_SETTLE_S = 10.0
_START_S = 30.0

#: Lines of a program's log that tell of a bug.
_COMPLAINTS = re.compile(
    r"Traceback|never retrieved|never awaited|Unclosed|was destroyed but it is pending|Fatal Python"
)


@dataclass
class Found:
    """Everything that a run found out; `report` makes figures and sentences of it."""

    plan: Plan
    streams: list[Stream] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    shim_kills: int = 0
    hang_repaired_s: list[float] = field(default_factory=list)
    leaked: dict[str, int] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    seen: Appliance | None = None
    exit_code: int | None = None
    budget_ms: float = 400.0


async def run(plan: Plan, output: Path, say: Callable[[str], None]) -> Found:
    """``output``: an existing folder, which gets the logs."""
    found = Found(plan)
    mark = secrets.token_hex(4)
    with tempfile.TemporaryDirectory(prefix="hrc") as name:  # short: sockets lie below it
        folder = Path(name)
        comfyui = None
        if plan.graph != "pass":
            comfyui = COMFYUI if plan.graph == "invert" else comfyui_with_slow_node(folder / "comfyui")
        try:
            # A shim that comes back is asked at its old address, which no registration has to repeat.
            port = free_port() if any(event.fault == "kill_shim" for event in plan.events) else 0
            async with appliance(folder, mark, comfyui=comfyui, HEADRACE_LISTEN_PORT=str(port)) as it:
                found.seen = it
                await _play(plan, it, found, say)
                found.exit_code = await it.programs.stop()
            found.leftovers += await _gone(mark)
            found.leftovers += left_in(folder / "run", folder / "tmp")
        finally:
            for pid in marked(mark):  # of an interrupted run
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                shutil.copytree(folder / "run" / "log", output / "log", dirs_exist_ok=True)
        found.wrong += _complaints(output / "log")
    return found


async def _play(plan: Plan, it: Appliance, found: Found, say: Callable[[str], None]) -> None:
    await _warm_up(it, plan)
    before = await _holdings(it)
    striker = Striker(it, plan.graph)
    stream = await _open(it, plan, found)
    began = time.monotonic()
    try:
        for event in plan.events:
            await asyncio.sleep(max(0.0, began + event.at - time.monotonic()))
            say(f"{event.at:8.3f} s  {event.fault} {dict(event.arguments) or ''}")
            if not await striker.strike(event, stream):
                continue
            if not await stream.gone():
                found.wrong.append(f"the stream did not end within 20 s of {event.fault} at {event.at} s")
            await stream.close()
            stream = await _open(it, plan, found)
        await asyncio.sleep(max(0.0, began + plan.seconds - time.monotonic()))
        if plan.only_kills:
            await _engine_back(it)
            await asyncio.sleep(_WARM_UP_S)
    finally:
        await striker.close()
        await stream.close(stops=plan.seed % 3 + 1)
    found.wrong += striker.wrong
    found.kills, found.shim_kills = striker.kills, striker.shim_kills
    found.hang_repaired_s = striker.hang_repaired_s
    await _engine_back(it)
    if not striker.shim_kills:
        found.leaked = await _leaked(it, before)
        if found.leaked and (pid := it.shim_pid) is not None:
            found.wrong.append(f"the shim's connections at the end: {', '.join(connections(pid))}")
    elif (pid := it.engine_pid) is not None and (held := holdings(pid).shared_memory):
        found.leaked = {"engine shared_memory": held}


async def _open(it: Appliance, plan: Plan, found: Found) -> Stream:
    """Start a stream; the worker may refuse while its engine boots."""
    until = time.monotonic() + _START_S
    while True:
        stream = Stream(it, plan.recipe, plan.graph)
        try:
            await stream.open()
        except (WorkerRefused, KeyError) as exc:
            if time.monotonic() > until:
                raise RuntimeError(f"no stream could be started within {_START_S:.0f} s: {exc}") from exc
            await asyncio.sleep(0.2)
            continue
        found.streams.append(stream)
        return stream


async def _warm_up(it: Appliance, plan: Plan) -> None:
    stream = Stream(it, Recipe(fps=10), plan.graph)
    await stream.open()
    await asyncio.sleep(_WARM_UP_S)
    await stream.close()


async def _engine_back(it: Appliance) -> None:
    """Until the engine serves again, for at most half a minute: what it holds is looked at after that."""
    for _ in range(300):
        status = await it.status()
        if status is not None and status["additional_info"]["engine"] == "READY":
            return
        await asyncio.sleep(0.1)


async def _holdings(it: Appliance) -> Holdings:
    """Of the shim."""
    status = await it.status()
    pid = it.shim_pid
    if pid is None or status is None:
        raise RuntimeError("the shim is not there")
    info = status["additional_info"]
    await asyncio.sleep(0.2)  # the connection of this call is among the tasks, and not to be among the sockets
    return holdings(pid, info["tasks"], info["threads"], clients_of(pid, int(it.worker.url.rpartition(":")[2])))


async def _leaked(it: Appliance, before: Holdings) -> dict[str, int]:
    """What the shim holds more than before the stream, and shared memory of an engine without a stream."""
    until = time.monotonic() + _SETTLE_S
    while True:
        try:
            leaked = {f"shim {name}": more for name, more in (await _holdings(it)).beyond(before).items()}
            if (pid := it.engine_pid) is not None and (held := holdings(pid).shared_memory):
                leaked["engine shared_memory"] = held
        except (OSError, RuntimeError):
            leaked = {"shim is gone": 1}
        if not leaked or time.monotonic() > until:
            return leaked
        await asyncio.sleep(0.25)


async def _gone(mark: str) -> list[str]:
    """Processes that outlive the supervisor by more than a moment."""
    for _ in range(20):
        if not (left := marked(mark)):
            return []
        await asyncio.sleep(0.1)
    return [f"process {pid}: {words}" for pid, words in left.items()]


def _complaints(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.glob("*.log*")):
        lines = path.read_text(errors="replace").splitlines()
        for number, line in enumerate(lines):
            if _COMPLAINTS.search(line):
                found.append(f"{path.name}:{number + 1}: {' | '.join(lines[max(0, number - 1) : number + 2])[:400]}")
    return found[:5]
