"""supervisord over XML-RPC on its Unix socket: which programs run, and what their logs end with."""

from __future__ import annotations

import base64
import http.client
import re
import socket
import xmlrpc.client
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

TIMEOUT_S = 2.0

#: What a terminal would act on: ECMA-48's control sequences, and control characters but tab and line feed.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")

#: User and password of supervisord.conf; the socket's mode is the protection.
_AUTHORIZATION = "Basic " + base64.b64encode(b"headrace:headrace").decode()


class Unreachable(Exception):
    """supervisord does not answer, or says no: it is being shut down."""


@dataclass(frozen=True)
class Process:
    name: str  # engine-0
    group: str
    state: str  # RUNNING, STARTING, ...
    pid: int  # 0 when it does not run


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__(headers=[("Authorization", _AUTHORIZATION)])
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _Connection(self._path)


class Supervisor:
    def __init__(self, socket_path: Path) -> None:
        self._server = xmlrpc.client.ServerProxy("http://localhost", transport=_Transport(socket_path))

    def processes(self) -> list[Process]:
        """Raises Unreachable."""
        rows = self._ask("getAllProcessInfo")
        return [Process(row["name"], row["group"], row["statename"], int(row["pid"])) for row in rows]

    def start(self, process: Process) -> None:
        """Have it started; does not wait for that. Raises Unreachable, also where it runs by now."""
        self._ask("startProcess", f"{process.group}:{process.name}", False)

    def log_of(self, process: str, length: int) -> str:
        """The last ``length`` bytes of what a program (``group:name``) wrote, as plain text; empty without any.

        From the file itself: supervisord sends no log that is not UTF-8, as where its tail begins in the middle of a
        character, and XML takes none with the colours of a terminal.
        """
        try:
            path = Path(self._ask("getProcessInfo", process)["stdout_logfile"])
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - length))
                text = file.read(length).decode(errors="replace")
        except (OSError, Unreachable):
            return ""
        return _CONTROL.sub("", text.replace("\r", "\n"))

    def account(self, length: int) -> str:
        """The last ``length`` bytes of supervisord's own log; empty when they cannot be had."""
        try:
            return str(self._ask("readLog", -length, 0))
        except Unreachable:
            return ""

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._server.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException, xmlrpc.client.Error, ExpatError) as exc:
            raise Unreachable(str(exc)) from exc
