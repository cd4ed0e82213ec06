"""One output time line over a source whose clock may jump.

The stamps of the source are kept (protocol.md 7, rule 18) as long as they go forward, over any gap. Where the
source's clock falls back, for example because it was restarted, its stamps are moved up by an offset so that the
output still increases: a falling stamp breaks the gateway's ffmpeg for good. Picture and sound take the same offset.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .clock import TICKS_PER_S
from .pes import AccessUnit

# Less than this backwards is overlap, and whoever is late is dropped. Decode stamps of one track never fall, so it
# covers what muxers round and repair; a clock that begins again sooner than that costs its frames until then.
MAX_OVERLAP = TICKS_PER_S // 4
# What counts as near. A longer step forward is never believed before the next unit of the track says the same, a
# shorter one where it fits: see `Timeline._reach`.
MAX_STEP = 10 * TICKS_PER_S
# A picture is shown so long after it is decoded at most: what H.264 reorders, 16 pictures, at 3 fps. More is a
# damaged stamp beside a sound one, which would make every picture late until the clock has come there.
MAX_LEAD = 5 * TICKS_PER_S
# Distance between the last unit before a fall and the first after it, where the track has shown none: 30 fps.
_RESUME_STEP = 3_000
# The track that falls first goes on in its own step, and the other one with it, to the sample. Where the other one
# was further ahead than this it decides: its frames would be late, and a frozen picture is worse than silence.
_MAX_AHEAD = TICKS_PER_S // 5


@dataclass(slots=True)
class _Lane:
    """What is known of one kind of track, in the source's ticks."""

    last: int
    offset: int
    step: int = _RESUME_STEP  # latest distance between two units
    pace: int = _RESUME_STEP  # the same at any frame rate; it halves at most from one unit to the next
    beside: int | None = None  # where the other track's output was at this one's latest unit
    held: AccessUnit | None = None  # its stamp is a jump that the next unit has to confirm


class Timeline:
    """Places units on the output's time line. A unit that jumps is held until the next one of its kind, or until the
    sound has come there."""

    def __init__(self) -> None:
        self.jumps = 0  # falls of the source's clock
        self._lanes: dict[str, _Lane] = {}
        self._offset = 0  # of the latest fall
        self._source = 0  # latest source stamp under that offset
        self._end = 0  # latest output stamp
        self._floor: int | None = None  # what the first stamp must not be below, when a stream is taken up again

    @property
    def position(self) -> tuple[int, int]:
        """Latest stamp of the source, and what is added to it."""
        return self._source, self._offset

    def resume(self, source: int, offset: int, overlap: int) -> None:
        """Go on where another time line was at ``position``. ``overlap``: ticks that are read once more."""
        self._source, self._offset, self._end = source, offset, source + offset
        self._floor = source - max(overlap, MAX_OVERLAP)

    def place(self, unit: AccessUnit) -> list[AccessUnit]:
        """The unit with output stamps and those that were held for it; nothing where it is held itself.

        A unit whose pts cannot belong to its dts loses it: the decoder gives it its place among the others.
        """
        placed = self._place(unit)
        pictures = self._lanes.get("video")
        if (
            placed
            and pictures is not None
            and pictures.held is not None
            and self._has_paused(pictures, pictures.held)
        ):
            held, pictures.held = pictures.held, None
            placed.append(self._placed(pictures, held, _stamp(held)))
        return placed

    def _place(self, unit: AccessUnit) -> list[AccessUnit]:
        unit = _believed(unit)
        stamp = unit.dts if unit.dts is not None else unit.pts
        kind = unit.track.kind
        lane = self._lanes.get(kind)
        if stamp is None:
            return [unit] if lane is None else [*self._undecided(lane), unit]
        if lane is None:
            floor, self._floor = self._floor, None
            if floor is not None and stamp < floor:  # the source was restarted while nobody listened
                self.jumps += 1
                self._offset = self._end + _RESUME_STEP - stamp
            lane = self._lanes[kind] = _Lane(stamp, self._offset)
            return [self._placed(lane, unit, stamp)]
        if lane.held is not None:
            return self._decide(lane, lane.held, unit, stamp)
        if lane.offset != self._offset and self._is_nearer(lane, stamp):
            # It was silent when the clock fell, and its stamps of before and of after look alike.
            lane.offset = self._offset
            return [self._placed(lane, unit, stamp)]
        if self._fits(lane, stamp):
            return [self._placed(lane, unit, stamp)]
        lane.held = unit
        return []

    def flush(self) -> list[AccessUnit]:
        """What is still held, without stamps: nothing will confirm them."""
        units = [_unstamped(lane.held) for lane in self._lanes.values() if lane.held is not None]
        for lane in self._lanes.values():
            lane.held = None
        return units

    def _decide(self, lane: _Lane, held: AccessUnit, unit: AccessUnit, stamp: int) -> list[AccessUnit]:
        """What is held and the unit after it, by whether that goes on from the held one or from before it."""
        jumped, lane.held = _stamp(held), None
        goes_back = stamp < jumped or jumped < lane.last
        if (goes_back and _follows(lane.last, stamp)) or not _follows(jumped, stamp):
            if self._fits(lane, stamp, missing=1):
                return [_unstamped(held), self._placed(lane, unit, stamp)]
            lane.held = unit
            return [_unstamped(held)]
        if lane.last < jumped <= lane.last + MAX_STEP:
            if lane.offset != self._offset and self._is_nearer(lane, jumped):  # the other one fell in the meantime
                lane.offset = self._offset
        elif not self._joins(lane, jumped) and jumped < lane.last:
            self.jumps += 1
            after = lane.last + lane.offset + lane.step
            if self._end - after > _MAX_AHEAD:
                after = self._end + _RESUME_STEP
            self._offset = lane.offset = after - jumped
        lane.pace = max(stamp - jumped, _RESUME_STEP)  # or every unit of a track that has become slow were held
        return [self._placed(lane, held, jumped), self._placed(lane, unit, stamp)]

    def _has_paused(self, lane: _Lane, held: AccessUnit) -> bool:
        """Whether sound went on to where a held picture is, over no fall."""
        stamp = _stamp(held)
        return lane.offset == self._offset and lane.last < stamp and self._fits(lane, stamp)

    def _undecided(self, lane: _Lane) -> list[AccessUnit]:
        """What is held, where the next unit has no stamp to tell by. A step forward is believed: a track that stamps
        only some units would never confirm it, and would be without stamps from there on."""
        held, lane.held = lane.held, None
        if held is None:
            return []
        if lane.last < (stamp := _stamp(held)) <= lane.last + MAX_STEP:
            return [self._placed(lane, held, stamp)]
        return [_unstamped(held)]

    def _fits(self, lane: _Lane, stamp: int, missing: int = 0) -> bool:
        """Whether a stamp is believed without the next one. missing: units before it that were damaged."""
        return lane.last - MAX_OVERLAP <= stamp <= lane.last + min(self._reach(lane, missing), MAX_STEP)

    def _reach(self, lane: _Lane, missing: int) -> int:
        """How far a stamp may be ahead of the lane's latest and do no harm if it is damaged.

        The sound one after it is two steps ahead, and one that is less than an overlap below is no fall of the clock.
        So it goes by the pace: 0.3 s at 30 fps, 2.3 s at 1 fps, and a steady track of any rate is held once at most.
        As far as the other track has gone on it was a pause of this one, which is believed: a picture that comes now
        and then must not wait for the next.
        """
        beside = self._beside(lane)
        passed = 0 if beside is None or lane.beside is None else beside - lane.beside
        return max(lane.pace * (2 + missing) + MAX_OVERLAP, passed + _RESUME_STEP)

    def _beside(self, lane: _Lane) -> int | None:
        """Where the output of the other track is."""
        return next((each.last + each.offset for each in self._lanes.values() if each is not lane), None)

    def _joins(self, lane: _Lane, stamp: int) -> bool:
        """Whether the other kind has fallen to where this stamp is, so that this one only follows it."""
        if lane.offset == self._offset or not _follows(self._source, stamp) or self._is_behind(lane, stamp):
            return False
        lane.offset = self._offset
        return True

    def _is_nearer(self, lane: _Lane, stamp: int) -> bool:
        """Whether the latest fall brings a stamp to where the output is, and the lane's own offset does not."""
        moved, kept = stamp + self._offset, stamp + lane.offset
        if self._is_behind(lane, stamp):
            return False
        return abs(moved - self._end) <= min(MAX_STEP, abs(kept - self._end) - 1)

    def _is_behind(self, lane: _Lane, stamp: int) -> bool:
        """Whether the latest fall would bring a stamp far behind what the lane has given."""
        return stamp + self._offset < lane.last + lane.offset - MAX_OVERLAP

    def _placed(self, lane: _Lane, unit: AccessUnit, stamp: int) -> AccessUnit:
        distance = stamp - lane.last
        if 0 < distance <= MAX_OVERLAP:
            lane.step = distance
        if 0 < distance <= 2 * lane.pace + MAX_OVERLAP:  # more is a pause or a leap
            lane.pace = max(distance, lane.pace // 2)
        lane.last = stamp
        lane.beside = self._beside(lane)
        if lane.offset == self._offset:
            self._source = stamp
        latest = stamp if unit.pts is None else max(stamp, unit.pts)
        self._end = max(self._end, latest + lane.offset)
        if lane.offset == 0:
            return unit
        return replace(
            unit,
            pts=None if unit.pts is None else unit.pts + lane.offset,
            dts=None if unit.dts is None else unit.dts + lane.offset,
        )


def _believed(unit: AccessUnit) -> AccessUnit:
    """Without a pts that is far from its dts. Where the dts is the damaged one it is a jump, and goes too."""
    if unit.pts is None or unit.dts is None or -MAX_OVERLAP <= unit.pts - unit.dts <= MAX_LEAD:
        return unit
    return replace(unit, pts=None)


def _follows(last: int, stamp: int) -> bool:
    return last - MAX_OVERLAP <= stamp <= last + MAX_STEP


def _stamp(unit: AccessUnit) -> int:
    """Of a unit that was held for it."""
    stamp = unit.dts if unit.dts is not None else unit.pts
    assert stamp is not None
    return stamp


def _unstamped(unit: AccessUnit) -> AccessUnit:
    return replace(unit, pts=None, dts=None)
