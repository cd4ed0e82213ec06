"""Commands of the README, for tests: what it tells people to type has to work.

A fenced block is run when its opening fence says so: ```` ```sh test ````. Everything else is for people.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    marks: frozenset[str]
    text: str
    line: int  # of its first line, from 1


def blocks(path: Path) -> list[Block]:
    """Every fenced block of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        line = text.count("\n", 0, match.start("body")) + 1
        found.append(Block(language, frozenset(marks), match["body"], line))
    return found


def commands(path: Path) -> list[Block]:
    """Blocks marked to be run by a shell, in order."""
    return [block for block in blocks(path) if block.language == "sh" and "test" in block.marks]
