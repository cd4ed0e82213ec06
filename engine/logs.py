"""How the engine's log looks: one line per event, key=value or JSON, with the session that it is about."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from typing import Final

from .config import Settings

#: The session that the current task works for; every line has it.
current_session: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("current_session", default="")


class Formatter(logging.Formatter):
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


def set_up(settings: Settings) -> None:
    """Everything to stderr, ours from ``log_level`` on, other people's from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(settings.log_format))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("engine").setLevel(settings.log_level.upper())
