r"""Text of the editor's prompt widgets: ``{red|green} hat // a remark`` is queued as ``green hat``.

Comments (``//`` to the end of the line, ``/* */``) are left out; of ``{a|b}`` one is taken, which may hold others;
``\{``, ``\|`` and ``\}`` stand for themselves. The editor chooses anew for every prompt that it queues; a stream is
one prompt, so the text itself decides: the same one gives the same words, after a restart too.
"""

from __future__ import annotations

import random
import re
from typing import Final

_COMMENT: Final = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
#: A piece of text, with what is escaped in it, or one of the marks.
_PIECE: Final = re.compile(r"(?:\\.|[^{|}\\])+|[{|}]|\\", re.DOTALL)
_ESCAPED: Final = re.compile(r"\\([{|}])")


def chosen(text: str) -> str:
    """The words that go to the node."""
    choose = random.Random(text).choice
    open_blocks: list[list[str]] = []  # of each block that is open, the options so far
    now = ""  # what is being put together: the text, or the last option of the innermost block
    outside: list[str] = []  # what stands before each open block
    for piece in _PIECE.findall(_COMMENT.sub("", text)):
        if piece == "{":
            outside.append(now)
            open_blocks.append([])
            now = ""
        elif piece == "|" and open_blocks:
            open_blocks[-1].append(now)
            now = ""
        elif piece == "}" and open_blocks:
            now = outside.pop() + choose([*open_blocks.pop(), now])
        else:
            now += piece
    while open_blocks:  # never closed: the end of the text does it
        now = outside.pop() + choose([*open_blocks.pop(), now])
    return _ESCAPED.sub(r"\1", now)
