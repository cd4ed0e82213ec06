"""A note beside the socket of how often the engine began to load ComfyUI and died before it was through."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

#: Deaths in a row that are no pattern yet: an operator who changes his mind, a machine short of memory for a moment.
FREE: Final = 2
FIRST_PAUSE_S: Final = 2.0
MAX_PAUSE_S: Final = 60.0


class Starts:
    """``path`` None: an engine without a place of its own (TCP) keeps no account."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def begin(self) -> tuple[int, float]:
        """Another load begins: how many before it, in a row, did not end; and the seconds to wait before it."""
        if self._path is None:
            return 0, 0.0
        deaths = 0
        with contextlib.suppress(OSError, ValueError):
            deaths = min(max(int(self._path.read_text()), 0), 1000)
        with contextlib.suppress(OSError):  # a full disk is no reason not to start
            self._path.write_text(str(deaths + 1))
        return deaths, pause_s(deaths)

    def done(self) -> None:
        """The load ended, well or not, or somebody asked the process to end."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def pause_s(deaths: int) -> float:
    """2, 4, 8 ... 60 s from the third death on."""
    return min(FIRST_PAUSE_S * 2 ** min(deaths - FREE - 1, 10), MAX_PAUSE_S) if deaths > FREE else 0.0
