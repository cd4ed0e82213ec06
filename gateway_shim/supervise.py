"""From ``headrace up`` to supervisord: its configuration file, its run directory, its environment.

Nothing here reads or changes the environment of this process; the caller hands it in and execs the result.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

#: Longest path of a Unix socket, in bytes: ``sun_path`` is 108 with its terminating zero (unix(7)).
MAX_SOCKET_PATH_BYTES = 107
#: supervisord writes its socket under the final name plus ``.<pid>`` first (supervisor/http.py); pids have 7 digits.
_LONGEST_SOCKET = "supervisor.sock.1234567"

#: Of the shim in supervisord.conf, seconds, and how much of it a shim needs besides its ``drain_s``: the end of what
#: still runs then (manager.END_S, CUT_OFF_S), unregistering, requests under way.
STOP_WAIT_S = 30
_BEYOND_DRAIN_S = 24

#: Engine N sees GPU N; supervisord counts.
_ONE_GPU_EACH = 'CUDA_VISIBLE_DEVICES="%(process_num)d"'


class CannotStart(Exception):
    """The programs cannot be started; the message is one sentence for the operator."""


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Launch:
    """One supervisord to be: ``os.execve(argv[0], argv, environment)`` runs it in the foreground."""

    run_dir: Path
    engines: int
    configuration: Path
    argv: tuple[str, ...]
    environment: dict[str, str]
    stop_wait_s: int = STOP_WAIT_S  # what the shim has from SIGTERM to SIGKILL

    @property
    def logs(self) -> dict[str, Path]:
        """Log file of each program, by the name supervisord gives it."""
        names = {"shim": "shim", **{f"engine:engine-{n}": f"engine-{n}" for n in range(self.engines)}}
        names["watchdog"] = "watchdog"
        return {name: self.run_dir / "log" / f"{file}.log" for name, file in names.items()}

    @property
    def control_socket(self) -> Path:
        return self.run_dir / "supervisor.sock"

    @property
    def pid_file(self) -> Path:
        return self.run_dir / "supervisord.pid"


def configuration() -> Path:
    """``supervisord.conf``: beside the packages in a checkout, inside ``gateway_shim`` when installed."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "supervisord.conf", package.parent / "supervisord.conf"):
        if candidate.is_file():
            return candidate
    raise CannotStart(f"supervisord.conf is missing beside {package}; reinstall headrace")


def prepare(launch: Launch) -> None:
    """Make the run directory and, where it needs one of its own, the configuration: for several engines, each with
    its own GPU, and for a shim that drains for long.

    Raises CannotStart: the path is too long for a socket, belongs to someone else, or cannot be made.
    """
    _make_run_directory(launch.run_dir)
    for half_made in launch.run_dir.glob("supervisor.sock.*"):  # of one that was killed while it started
        half_made.unlink(missing_ok=True)
    if launch.configuration.parent == launch.run_dir:
        text = configuration().read_text(encoding="utf-8")
        if launch.engines > 1:
            # With one engine the variable stays the operator's: it may name any device, by number or by UUID.
            text = text.replace("environment=HEADRACE_ENGINE", f"environment={_ONE_GPU_EACH},HEADRACE_ENGINE", 1)
        before, shim, after = text.partition("[program:shim]")
        after = after.replace(f"stopwaitsecs={STOP_WAIT_S}", f"stopwaitsecs={launch.stop_wait_s}", 1)
        launch.configuration.write_text(before + shim + after, encoding="utf-8")


def _make_run_directory(run_dir: Path) -> None:
    """Make ``run_dir`` (0700) and its ``log`` folder, and refuse one where others could put or read our sockets."""
    if len(os.fsencode(run_dir / _LONGEST_SOCKET)) > MAX_SOCKET_PATH_BYTES:
        room = MAX_SOCKET_PATH_BYTES - len(_LONGEST_SOCKET) - 1
        raise CannotStart(f"the run directory {run_dir} is too long for a socket; choose one of at most {room} bytes")
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = run_dir.stat(follow_symlinks=False)
        # The default lies in a folder where anybody may create names: a foreign owner or a link is an attack.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise CannotStart(f"the run directory {run_dir} is not a folder of this user; choose another")
        if found.st_mode & 0o022:
            run_dir.chmod(0o700)
        (run_dir / "log").mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise CannotStart(f"the run directory {run_dir} cannot be used: {exc.strerror}") from exc


def running_pid(run_dir: Path) -> int | None:
    """Process id of a supervisord that lives in ``run_dir``, or None."""
    try:
        pid = int((run_dir / "supervisord.pid").read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return pid
    # After a crash of the machine the number may belong to anything.
    return pid if b"supervisord" in command else None


def plan(environment: Mapping[str, str], run_dir: Path, *, engines: int = 1, drain_s: float = 0.0) -> Launch:
    """What to exec for ``engines`` engines with ``environment`` as the base of theirs; ``drain_s`` is the shim's.

    supervisord knows no defaults for ``%(ENV_X)s``, so each variable that the file names is set here.
    Raises CannotStart when supervisor is not installed or another one lives in ``run_dir``.
    """
    # Found without importing: this process is about to become supervisord and only needs the answer.
    from importlib.util import find_spec

    if find_spec("supervisor") is None:
        raise CannotStart("supervisor is not installed; `pip install 'headrace[shim]'` brings it")
    if engines < 0:
        raise CannotStart(f"the number of engines is {engines}, it cannot be negative")
    if engines > 1 and environment.get("CUDA_VISIBLE_DEVICES"):
        raise CannotStart("CUDA_VISIBLE_DEVICES is set, but with several engines each gets its own: unset it")
    run_dir = run_dir.absolute()
    if (pid := running_pid(run_dir)) is not None:
        raise CannotStart(f"headrace runs already in {run_dir} (process {pid}); stop it or choose another folder")
    ours = {
        "HEADRACE_RUN_DIR": str(run_dir),
        "HEADRACE_PYTHON": sys.executable,
        "HEADRACE_ENGINES": str(engines),
        # A log line has to be in its file when the process dies.
        "PYTHONUNBUFFERED": "1",
    }
    stop_wait_s = max(STOP_WAIT_S, math.ceil(drain_s) + _BEYOND_DRAIN_S)
    as_it_is = engines <= 1 and stop_wait_s == STOP_WAIT_S
    file = configuration() if as_it_is else run_dir / "supervisord.conf"
    argv = (sys.executable, "-P", "-m", "supervisor.supervisord", "-n", "-c", str(file))
    return Launch(run_dir, engines, file, argv, dict(environment) | ours, stop_wait_s)


def execute(launch: Launch, *, follow: bool) -> NoReturn:
    """Become supervisord. follow: the programs' logs also go to our stdout, be it a terminal, a pipe or the journal.

    The logs themselves are files, because supervisord can neither rotate what it writes to a stream nor open the
    socket that systemd gives as stdout.
    """
    os.umask(0o077)
    if follow:
        for path in launch.logs.values():
            path.touch()
        try:
            # A group of its own: Ctrl-C is for supervisord, and the programs' last words are still to be printed.
            subprocess.Popen(
                ["tail", "-q", "-n", "0", "-F", *map(str, launch.logs.values())],
                stderr=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=end_with_parent(),
            )
        except OSError as exc:
            sys.stderr.write(f"headrace: tail did not start, the logs are only in {launch.run_dir}/log: {exc}\n")
    os.execve(launch.argv[0], launch.argv, launch.environment)  # noqa: S606


def end_with_parent() -> Callable[[], None]:
    """A ``preexec_fn``: the child gets SIGTERM when the thread that started it ends, in whatever way.

    `tail --pid` is no help: a parent whose own parent waits for the end of our output is a zombie, which is there.
    The library is loaded here, because a child between fork and exec may take no lock.
    """
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask
