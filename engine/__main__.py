"""``python -m engine``: one engine process, from its first line of log to exit code 0."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

import cext
from proto import VERSION, WIRE_VERSION

from .backend import backend_of
from .config import Settings, SettingsError, read
from .core import Engine, current_session
from .service import Server

logger = logging.getLogger("engine")

#: How long a connection attempt to a socket in our place may take before its owner counts as alive but stuck.
PROBE_TIMEOUT_S: Final = 1.0


class StartRefused(Exception):
    """The engine cannot start; the sentence says why."""


class _Formatter(logging.Formatter):
    """One line per event: ``time level logger message session=id``, or the same as JSON."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        message = record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        session = current_session.get()
        if self._json:
            entry = {"time": at, "level": record.levelname.lower(), "logger": record.name, "message": message}
            entry |= {"session": session} if session else {}
            entry |= {"trace": trace} if trace else {}
            return json.dumps(entry)
        line = f"time={at} level={record.levelname.lower()} logger={record.name} msg={json.dumps(message)}"
        line += f" session={session}" if session else ""
        return f"{line}\n{trace}" if trace else line


def _set_up_logging(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(settings.log_format))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("engine").setLevel(settings.log_level.upper())


@contextlib.contextmanager
def unix_socket(path: Path) -> Iterator[None]:
    """A place for our socket: its directory ours alone, no dead predecessor in it; nothing of ours left at the end.

    Raises StartRefused when somebody answers there, or the place is not ours to use.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StartRefused(f"the directory {path.parent} cannot be made: {exc.strerror}") from None
    owner = path.parent.stat().st_uid
    if owner not in (os.getuid(), 0):
        raise StartRefused(f"the directory {path.parent} belongs to user {owner}, who could take our socket's place")
    _remove_stale(path)
    # gRPC makes the socket with the process's umask; between bind and chmod anybody could connect.
    previous = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(previous)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartRefused(f"{path} is there and is no socket; move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            pass
        except PermissionError:
            raise StartRefused(f"{path} belongs to somebody else") from None
    raise StartRefused(f"another engine answers at {path}; stop it, or choose another address")


async def serve(settings: Settings) -> bool:
    """Run until SIGTERM or SIGINT. False: a graph still runs; only the end of the process ends it."""
    if settings.pixel_backend != "auto":
        try:
            cext.use_backend(cast(cext.Backend, settings.pixel_backend))
        except ValueError as exc:
            raise StartRefused(f"pixel_backend: {exc}") from None
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(lambda on_settled: Engine(settings, backend_of(settings), on_settled), settings.max_message_bytes)
    inode = None
    try:
        if settings.socket_path is not None:
            with unix_socket(settings.socket_path):
                await server.start(settings.address)
            settings.socket_path.chmod(0o600)
            inode = settings.socket_path.stat().st_ino
        else:
            await server.start(settings.address)
    except (RuntimeError, OSError) as exc:
        await server.stop(0)
        raise StartRefused(f"cannot listen on {settings.address}: {exc}") from None
    logger.info("engine %s, wire version %d, pid %d, on %s", VERSION, WIRE_VERSION, os.getpid(), settings.address)
    await stop.wait()
    logger.info("stopping, up to %.1f s", settings.grace_s)
    ended = await server.stop(settings.grace_s)
    if settings.socket_path is not None:
        # Only if it is still ours: a successor may have put its own there.
        with contextlib.suppress(FileNotFoundError):
            if settings.socket_path.stat().st_ino == inode:
                settings.socket_path.unlink()
    return ended


def main() -> int:
    try:
        settings = read(sys.argv[1:])
    except SettingsError as exc:
        print(f"engine: {exc}", file=sys.stderr)  # noqa: T201
        return 2
    _set_up_logging(settings)
    try:
        ended = asyncio.run(serve(settings))
    except StartRefused as exc:
        logger.error("%s", exc)
        return 1
    logger.info("stopped")
    if not ended:
        logger.warning("a graph did not end within %.1f s; the process ends without it", settings.grace_s)
        logging.shutdown()
        # Interpreter shutdown would pull modules from under the thread that still runs one.
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
