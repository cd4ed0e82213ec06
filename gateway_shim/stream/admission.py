"""What the input gives, on its way to the graph: its stamp, its due time, its place in mailbox and ledger."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from ..media.colour import Colour
from ..media.decode import Sound
from .engine_sound import EngineSound
from .intake import Decoded
from .ledger import Ledger, Outcome
from .mailbox import Entry, Mailbox
from .pacing import Pacer
from .pause import Pause
from .places import Places

logger = logging.getLogger(__name__)


class Admission:
    """Of one stream. Every picture has its line in the ledger, those too that are not let in."""

    def __init__(
        self,
        mailbox: Mailbox,
        sound: EngineSound,
        ledger: Ledger,
        *,
        budget_s: float,
        size: tuple[int, int] | None,
        last_pts: int | None,
        on_format: Callable[[int, int, Colour], None],
    ) -> None:
        """size: that was asked for. last_pts: of the latest picture that an earlier shim published.

        on_format: called with width, height and colour of the first picture before that is in the mailbox.
        """
        self.size = size  # of the pictures; None before the first one where nobody asked
        self.pacer = Pacer(budget_s)
        self.pause = Pause(self.pacer)
        self._mailbox = mailbox
        self._sound = sound
        self._ledger = ledger
        self._last_pts = last_pts
        self._on_format = on_format
        self._next_frame_id = 0
        self._places: Places | None = None  # from the first picture on
        self._told_s: float | None = None  # budget of which the log says that it is shorter than asked

    async def picture(self, decoded: Decoded) -> None:
        """Returns when there is room for another."""
        now = asyncio.get_running_loop().time()
        self._ledger.receive()
        pts = self.pause.picture(decoded.pts, now)
        if pts is None:
            self._ledger.settle(Outcome.DROPPED, "after_pause")
            return
        if self._last_pts is not None and pts <= self._last_pts:
            self._ledger.settle(Outcome.DROPPED, "not_increasing")
            return
        self._last_pts = pts
        if self._places is None:
            self.size = (decoded.frame.width, decoded.frame.height)
            self._places = Places(*self.size)
            self._make_room(self._places)
            self._on_format(*self.size, decoded.colour)
        self._places.add(pts)
        self._make_room(self._places)
        self._mailbox.put(
            Entry(
                frame_id=self._next_frame_id,
                pts=pts,
                frame=decoded.frame,
                colour=decoded.colour,
                arrived_at=now,
                due=self.pacer.due(pts, now),
            )
        )
        self._next_frame_id += 1
        await self._mailbox.room()

    def _make_room(self, places: Places) -> None:
        """As much as the latency budget needs at the rate of the pictures."""
        pacer, mailbox = self.pacer, self._mailbox
        pacer.longest_s = mailbox.longest_s = places.longest_s
        mailbox.limit = places.needed(pacer.budget_s)
        if pacer.budget_s < pacer.asked_s and pacer.asked_s != self._told_s:
            self._told_s = pacer.asked_s
            text = "no room for the pictures of a latency budget of %.2f s; it is %.2f s"
            logger.warning(text, pacer.asked_s, pacer.budget_s)

    def sound(self, sound: Sound) -> None:
        # Sound may wait as long as its picture could; twice the budget covers a picture that was late itself.
        now = asyncio.get_running_loop().time()
        pts = self.pause.sound(sound.pts, now)
        self._sound.put(sound if pts == sound.pts else replace(sound, pts=pts), now + 2 * self.pacer.budget_s + 1.0)
