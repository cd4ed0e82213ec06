"""supervisord's event listener protocol (supervisord.org/events.html): READY, one event, RESULT, and again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Event:
    """``facts``: what the payload's first line says, as in ``processname:engine-0 pid:1234``."""

    name: str
    facts: dict[str, str]


def _tokens(line: str) -> dict[str, str]:
    return dict(token.split(":", 1) for token in line.split() if ":" in token)


def events(source: TextIO, answers: TextIO) -> Iterator[Event]:
    """Events until supervisord closes the pipe. Each counts as handled when the next is asked for, well or not: one
    that is refused would come again."""
    while True:
        answers.write("READY\n")
        answers.flush()
        header = source.readline()
        if not header:
            return
        tokens = _tokens(header)
        payload = source.read(int(tokens["len"]))
        yield Event(tokens["eventname"], _tokens(payload.partition("\n")[0]))
        answers.write("RESULT 2\nOK")
        answers.flush()
