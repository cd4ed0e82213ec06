"""Engines that died of a stream's own workflow, as far as the stream can tell."""

from __future__ import annotations

import random
from typing import Final

#: An engine that dies so often in a row of one session, before that has given pictures for `FRUITFUL_S`, dies of its
#: workflow. After two what was good before is taken back; if nothing was, from the third on the next tries come
#: ever later: other streams want the engine too, and each try costs it a start.
VAIN_DEATHS = 2
FRUITFUL_S = 2.0
VAIN_FIRST_S = 2.0
VAIN_MAX_S = 30.0


_RANDOM: Final = random.Random()


class VainDeaths:
    """Sessions in a row that ended with their engine, without pictures for a while."""

    def __init__(self, random: random.Random | None = None) -> None:
        self._random = random or _RANDOM
        self.in_a_row = 0
        self._pid = 0  # of the last one's engine
        self._first_picture_at: float | None = None  # of this session, loop time
        self._fruitful = False  # it gave pictures for a while

    def begin(self) -> None:
        """The next session is to be opened."""
        self._fruitful, self._first_picture_at = False, None

    def worked(self, now: float) -> None:
        """The session gave a picture."""
        if self._first_picture_at is None:
            self._first_picture_at = now
        self._fruitful = now - self._first_picture_at >= FRUITFUL_S

    def died(self, pid: int) -> None:
        """The session ended with its engine, the process ``pid``."""
        if self._fruitful:
            self.in_a_row = 0
        elif pid != self._pid:  # until its death is noticed, one process refuses several tries
            self._pid = pid
            self.in_a_row += 1

    def forgive(self) -> None:
        """The parameters are others now."""
        self.in_a_row = 0

    @property
    def pause_s(self) -> float:
        """Before the next try, from the death after `VAIN_DEATHS` on; another one each time it is asked for.

        Streams of one engine die together, whosever workflow it was. At random times of their own they come back one
        by one, and who is not to blame gives pictures until the other one's turn.
        """
        longest_s = min(VAIN_FIRST_S * 2.0 ** (self.in_a_row - VAIN_DEATHS - 1), VAIN_MAX_S)
        return longest_s * self._random.uniform(0.5, 1.5)
