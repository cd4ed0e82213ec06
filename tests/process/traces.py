"""What an appliance has left on this machine: processes, sockets, shared memory, temporary files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path


class Traces:
    """Of whatever runs with this ``run_dir``; ``temporary`` is the folder it was given for temporary files."""

    def __init__(self, run_dir: Path, temporary: Path) -> None:
        self._mark = f"HEADRACE_RUN_DIR={run_dir}".encode()
        self._run_dir = run_dir
        self._temporary = temporary
        self._shared = set(os.listdir("/dev/shm"))

    def processes(self) -> dict[int, str]:
        """Command line by process id: every process that inherited our environment, whoever its parent is now."""
        return dict(self._processes())

    def _processes(self) -> Iterator[tuple[int, str]]:
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if command:  # a zombie has none
                        yield int(folder.name), command
            except OSError:
                continue

    def files(self) -> list[str]:
        """Everything but logs, and what is always there."""
        left = [path for path in self._run_dir.rglob("*") if path.is_file() or path.is_socket()]
        kept = {"lock"}  # of the journal: an empty file whose lock went with its owner
        return sorted(
            [str(path.relative_to(self._run_dir)) for path in left if path.suffix != ".log" and path.name not in kept]
            + [str(path) for path in self._temporary.iterdir()]
            + sorted(set(os.listdir("/dev/shm")) - self._shared)
        )

    async def no_process(self, within_s: float) -> None:
        """Wait until nothing of it runs; fails with what still does."""
        try:
            async with asyncio.timeout(within_s):
                while self.processes():  # noqa: ASYNC110  other processes' ends
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"still running after {within_s:g} s: {self.processes()}") from None
