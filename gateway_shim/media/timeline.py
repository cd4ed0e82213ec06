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
# A longer step forward than this is believed only when the next unit of the track says the same: a single damaged
# stamp must not move everything after it.
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
    held: AccessUnit | None = None  # its stamp is a jump that the next unit has to confirm


class Timeline:
    """Places units on the output's time line. A unit that jumps is held until the next one of its kind."""

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
        """The unit with output stamps, after the one that was held for it; nothing where it is held itself.

        A unit whose pts cannot belong to its dts loses it: the decoder gives it its place among the others.
        """
        unit = _believed(unit)
        stamp = unit.dts if unit.dts is not None else unit.pts
        kind = unit.track.kind
        lane = self._lanes.get(kind)
        if stamp is None:
            if lane is None or lane.held is None:
                return [unit]
            held, lane.held = lane.held, None
            return [_unstamped(held), unit]
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
        if _follows(lane.last, stamp):
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
        jumped = held.dts if held.dts is not None else held.pts
        assert jumped is not None
        lane.held = None
        if _follows(lane.last, stamp):
            return [_unstamped(held), self._placed(lane, unit, stamp)]
        if not _follows(jumped, stamp):
            lane.held = unit
            return [_unstamped(held)]
        if not self._joins(lane, jumped) and jumped < lane.last:
            self.jumps += 1
            after = lane.last + lane.offset + lane.step
            if self._end - after > _MAX_AHEAD:
                after = self._end + _RESUME_STEP
            self._offset = lane.offset = after - jumped
        return [self._placed(lane, held, jumped), self._placed(lane, unit, stamp)]

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
        if 0 < stamp - lane.last <= MAX_OVERLAP:
            lane.step = stamp - lane.last
        lane.last = stamp
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


def _unstamped(unit: AccessUnit) -> AccessUnit:
    return replace(unit, pts=None, dts=None)
