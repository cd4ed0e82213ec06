"""What time a stream has while its pictures stay away, and how they come back into it.

The gateway drops a worker of which it has read no whole segment for 30 s while input came in the last 15 (protocol.md
1.8), and a segment ends where the next one's first picture is. So the last picture goes out again, from the moment at
which another one is overdue, with the stamps that pictures would have now: nothing in the protocol tells repeated
pictures from others, and "repeat last" is what it says of an input that stalls (6.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from .pacing import TICKS, Pacer

#: Pictures are missed when they are overdue for this long. Lines that stall for two seconds lose nothing, and a
#: segment that is open then has seven seconds at most, which is far from 30 (protocol.md 7, rule 15).
QUIET_S = 3.0

#: A source that comes back with stamps that are over is watched for this long: it catches up if that much faster than
#: time. Its pictures came late over the network, and what they show was stood in for.
CATCH_UP_S = 0.3
CATCH_UP_RATE = 2

#: While it is watched nothing stands in for its pictures, for this long at most.
_WATCHED_S = 1.0

#: Whatever the clocks say, a picture goes out after so much silence: the longest segment of a source (2.1) and a
#: third more, and in time for the gateway.
LONGEST_S = 20.0

#: Distance between the last picture before a pause and the first after it, where its own stamp says less: 30 fps.
_STEP = TICKS // 30


@dataclass(frozen=True, slots=True)
class _Return:
    """The first unit after a pause, of one kind."""

    pts: int
    at: float

    def catches_up(self, pts: int, now: float) -> bool:
        gone_s = now - self.at
        return gone_s < CATCH_UP_S or (pts - self.pts) / TICKS > CATCH_UP_RATE * gone_s


class Pause:
    """Sees every picture and every sound of the input, and gives them the stamps that they go out with.

    Overdue is what `Pacer` says: a source that sends whole segments of 15 s is not silent between them. While there
    is sound, its stamps are the clock; otherwise, and when it stops too, time itself. A source that was stopped and
    goes on where it was would have to be dropped for as long as the pause; its stamps are moved up instead, those of
    picture and sound alike.
    """

    def __init__(self, pictures: Pacer) -> None:
        """pictures: the stream's pacer, which is given every picture that `picture` gives."""
        self.offset = 0  # ticks that were added so far
        self._pictures = pictures
        self._sounds = Pacer(0.0)  # by the source's own stamps
        self._last_pts: int | None = None  # of the latest picture
        self._out_at = 0.0  # when it came, or the latest one that stood in
        self._last_sound_at: float | None = None
        self._sound_delay_s: float | None = None  # when the latest picture came
        self._picture_offset = 0  # that the latest picture has
        self._shown: int | None = None  # pts of the latest picture that stood in since
        self._picture_back: _Return | None = None
        self._sound_back: _Return | None = None

    def picture(self, pts: int, now: float) -> int | None:
        """The stamp for a picture of the input; None for one that came too late, another one stood in for it."""
        pts += self.offset
        if self._shown is not None and pts <= self._shown:
            self._picture_back = self._picture_back or _Return(pts, now)
            if self._picture_back.catches_up(pts, now):
                return None
            pts = self._lifted(pts)
        self._shown = self._picture_back = self._sound_back = None
        self._out_at = now
        self._last_pts = pts if self._last_pts is None else max(pts, self._last_pts)
        self._sound_delay_s, self._picture_offset = self._sounds.delay_s, self.offset
        return pts

    def sound(self, pts: int, now: float) -> int:
        """The stamp for sound of the input. It moves nothing if it was there all the time."""
        self._sounds.due(pts, now)
        pts += self.offset
        if self._shown is not None and pts <= self._shown:
            if self._last_sound_at is not None and now - self._last_sound_at > QUIET_S:
                self._sound_back = _Return(pts, now)
            if self._sound_back is not None and not self._sound_back.catches_up(pts, now):
                pts = self._lifted(pts)
        self._last_sound_at = now
        if self._sound_delay_s is None:
            self._sound_delay_s = self._sounds.delay_s
        return pts

    def _lifted(self, pts: int) -> int:
        assert self._shown is not None
        self._picture_back = self._sound_back = None
        self.offset += self._shown + _STEP - pts
        return self._shown + _STEP

    def missing(self, now: float) -> int | None:
        """pts of the picture that should go out now and is not there; None while pictures come."""
        delay_s, sound_s = self._pictures.delay_s, self._sounds.delay_s
        if self._last_pts is None or delay_s is None:
            return None
        at_s = now - delay_s - self._pictures.budget_s
        if sound_s is not None and self._sound_delay_s is not None:
            at_s -= sound_s - self._sound_delay_s  # by how much the source's clock went slower than ours
        at_s += (self.offset - self._picture_offset) / TICKS
        for back in (self._picture_back, self._sound_back):
            if back is not None and now - back.at < _WATCHED_S:
                return None
        pts, shown = round(at_s * TICKS), self._last_pts if self._shown is None else self._shown
        if now - self._out_at > LONGEST_S:
            pts = max(pts, shown + round(QUIET_S * TICKS))
        if pts < self._last_pts + QUIET_S * TICKS or pts <= shown:
            return None
        self._shown, self._out_at = pts, now
        return pts
