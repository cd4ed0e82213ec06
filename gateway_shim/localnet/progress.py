"""One line that lives on a terminal; a line now and then where it would not be redrawn."""

from __future__ import annotations

import shutil
import time
from typing import TextIO


class Progress:
    """``say`` is permanent, ``live`` is replaced by whatever comes next."""

    def __init__(self, out: TextIO, *, every_s: float = 5.0) -> None:
        """every_s: between live lines when ``out`` is no terminal."""
        self._out = out
        self._terminal = out.isatty()
        self._every_s = every_s
        self._shown_at = float("-inf")
        self._open = False

    def live(self, text: str) -> None:
        if self._terminal:
            # One row: a longer line would wrap, and the next one only replaces its last row.
            columns = shutil.get_terminal_size().columns
            self._out.write(f"\r\x1b[K{text[: columns - 1]}")
            self._out.flush()
            self._open = True
        elif time.monotonic() - self._shown_at >= self._every_s:
            self._shown_at = time.monotonic()
            print(text, file=self._out, flush=True)

    def say(self, text: str) -> None:
        self.end()
        print(text, file=self._out, flush=True)

    def end(self) -> None:
        """Leave the live line as it stands."""
        if self._open:
            self._out.write("\n")
            self._out.flush()
            self._open = False
