"""A place in the file system for the engine's socket."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

#: How long a connection attempt to a socket in our place may take before its owner counts as alive but stuck.
PROBE_TIMEOUT_S: Final = 1.0


class PlaceTaken(Exception):
    """The engine cannot listen there; the sentence says why."""


def make_place(path: Path) -> None:
    """A directory for the socket, ours alone if it has to be made, and no dead predecessor in it.

    Raises PlaceTaken when somebody answers there, or the place is not ours to use.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.parent.stat().st_uid
    except OSError as exc:
        raise PlaceTaken(f"the directory {path.parent} cannot be made: {exc.strerror}") from None
    if owner not in (os.getuid(), 0):
        raise PlaceTaken(f"the directory {path.parent} belongs to user {owner}, who could take our socket's place")
    _remove_stale(path)


@contextlib.contextmanager
def owner_only() -> Iterator[None]:
    """Files made inside are 0600: gRPC binds with the process's umask, and between bind and a chmod anybody could
    connect."""
    previous = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(previous)


def identity(path: Path) -> tuple[int, int]:
    """Tells one socket from its successor in the same place."""
    status = path.stat()
    return status.st_dev, status.st_ino


def remove(path: Path, ours: tuple[int, int]) -> None:
    """Remove the socket if it is still ours: a successor may have put its own there."""
    with contextlib.suppress(FileNotFoundError):
        if identity(path) == ours:
            path.unlink()


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise PlaceTaken(f"{path} is there and is no socket; move it away")
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
            raise PlaceTaken(f"{path} belongs to somebody else") from None
    raise PlaceTaken(f"another engine answers at {path}; stop it, or choose another address")
