"""Log lines on stderr: key=value for people and grep, or JSON for collectors, each with the stream it is about.

Times are UTC. Text from outside stands in quotes with its control characters escaped: nobody writes lines of ours.
"""

from __future__ import annotations

import contextvars
import json
import logging
import time
from typing import Final

#: The stream that the current task works for; every line of it says so.
current_stream: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("current_stream", default="")


class Formatter(logging.Formatter):
    """One line per event: ``time level logger msg stream=id``, or the same as JSON; a traceback follows the line."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        level, message, stream = record.levelname.lower(), record.getMessage(), current_stream.get()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._json:
            line = {"time": at, "level": level, "logger": record.name, "message": message}
            line |= {"stream": stream} if stream else {}
            line |= {"traceback": trace} if trace else {}
            return json.dumps(line)
        text = f"time={at} level={level} logger={record.name} msg={json.dumps(message)}"
        text += f" stream={json.dumps(stream)}" if stream else ""
        return f"{text}\n{trace}" if trace else text


def configure(form: str, level: str) -> None:
    """form: ``text`` or ``json``; level: a logging level's name in lower case. For the whole process, once."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # A client that sends no HTTP is not our failure: its traceback says nothing that the 400 does not.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
