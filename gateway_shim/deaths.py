"""Why an engine ended: written by the watchdog beside the engine's socket, read by the shim for whoever asks."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Characters of the log that go with it: a Python traceback, or what faulthandler says of a crash in native code.
MAX_LOG_CHARS = 4000


@dataclass(frozen=True)
class Death:
    """The last end of one engine's process."""

    at_ms: int  # wall clock
    reason: str  # one sentence for people
    log: str = ""  # the end of what the process wrote
    recent: int = 1  # ends within the last ten minutes, this one included

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def path_of(address: str) -> Path | None:
    """Where the note on the engine at a gRPC address lies; None: elsewhere, on its own machine."""
    if not address.startswith("unix:"):
        return None
    return Path(address.removeprefix("unix:")).with_suffix(".death.json")


def write(path: Path, death: Death) -> None:
    """Replace the note, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(death.as_json()), encoding="utf-8")
    os.replace(part, path)


def read(address: str) -> Death | None:
    """The note, if there is a readable one."""
    if (path := path_of(address)) is None:
        return None
    with contextlib.suppress(OSError, ValueError, TypeError):
        death = Death(**json.loads(path.read_text(encoding="utf-8")))
        if isinstance(death.at_ms, int) and isinstance(death.reason, str) and isinstance(death.log, str):
            return death
    return None


def last_words(log: str) -> str:
    """The line of a log's end that says most: a crash in native code with its place, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for index, line in reversed(list(enumerate(lines))):
        if line.startswith("Fatal Python error"):
            after = lines[index:]
            # Of several threads, each with its stack, the one that crashed is called the current one.
            current = next((at for at, each in enumerate(after) if each.startswith("Current thread")), 0)
            place = next((each for each in after[current:] if each.startswith("File ")), "")
            return f"{line} at {place}" if place else line
    return lines[-1] if lines else ""
