"""Ends what an engine leaves behind: a small process beside it, which outlives it by a moment.

Nodes of custom packs start processes. Nothing but another process can end those when the engine itself was killed,
and nothing else can kill an engine that hangs while supervisord is gone.

Runs as a file, ``python -I -S warden.py ENGINE GROUPED PARENT_FD PATIENCE_S MARK``, with nothing but the standard
library. A byte or the end on standard input dismisses it: the engine is about to end and wants its children gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

#: For what is left to end by itself, after SIGTERM.
TERM_S = 2.0
#: For the kernel to end what was killed.
KILL_S = 1.0
_LOOK_S = 0.02


def main(engine: int, grouped: bool, parent_fd: int, patience_s: float, mark: str) -> None:
    """Wait for the end of the engine, our parent, or for its word; then end what bears ``mark``.

    grouped: the engine leads a process group, as supervisord starts it; otherwise its group is somebody else's.
    parent_fd: reading end of a pipe that supervisord holds the other end of.
    patience_s: for an engine without supervisord, which ends by itself unless it hangs.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        engine_fd = os.pidfd_open(engine)
    except ProcessLookupError:
        engine_fd = -1
    # Asked after the descriptor was opened: the number is that of our parent and of nobody who came after it.
    if engine_fd >= 0 and os.getppid() == engine:
        _wait(engine_fd, parent_fd, patience_s)
    sweep(engine, grouped, f"HEADRACE_ENGINE_LIFE={mark}".encode())


def _wait(engine_fd: int, parent_fd: int, patience_s: float) -> None:
    """Until the engine has ended or wants its children ended."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(parent_fd, 0)  # of the end of a pipe one is always told
    poll.register(engine_fd, select.POLLIN)
    deadline: float | None = None
    while True:
        left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = {fd for fd, _ in poll.poll(left_ms)}
        if 0 in ready or engine_fd in ready:
            return
        if parent_fd in ready:
            poll.unregister(parent_fd)
            deadline = time.monotonic() + patience_s
        elif deadline is not None and time.monotonic() >= deadline:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(engine_fd, signal.SIGKILL)
            deadline = None


def sweep(engine: int, grouped: bool, mark: bytes) -> None:
    """Ask, wait, kill. What a dying process starts meanwhile is found in the next look."""
    asked: set[int] = set()
    began = time.monotonic()
    while found := _left(engine, grouped, mark):
        late = time.monotonic() - began > TERM_S
        for pid in found:
            if late:
                _send(pid, signal.SIGKILL)
            elif pid not in asked:
                asked.add(pid)
                _send(pid, signal.SIGTERM)
                _send(pid, signal.SIGCONT)  # a stopped one would never get it
        if time.monotonic() - began > TERM_S + KILL_S:
            return
        time.sleep(_LOOK_S)


def _left(engine: int, grouped: bool, mark: bytes) -> list[int]:
    """Processes of the engine's group, and those that inherited its environment, but the engine and us."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) in (engine, os.getpid()):
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, _, group = file.read().rpartition(b")")[2].split()[:3]
            if state in (b"Z", b"X"):
                continue
            if not (grouped and int(group) == engine):
                with open(f"/proc/{name}/environ", "rb") as file:
                    if mark not in file.read().split(b"\0"):
                        continue
        except (OSError, ValueError):  # ended meanwhile, or somebody else's
            continue
        found.append(int(name))
    return found


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "1", int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
