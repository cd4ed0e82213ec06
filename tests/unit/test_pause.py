"""Which stamps a stream has while pictures stay away, and after that."""

from __future__ import annotations

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway_shim.stream.pacing import TICKS, Pacer
from gateway_shim.stream.pause import CATCH_UP_S, LONGEST_S, QUIET_S, Pause

FRAME = TICKS // 30


class Line:
    """A stream's end of the input: what the session does with each unit."""

    def __init__(self) -> None:
        self.pacer = Pacer(0.4)
        self.pause = Pause(self.pacer)
        self.shown: list[int] = []  # pts that went out, stills among them
        self.stills: list[int] = []

    def picture(self, pts: int, now: float) -> int | None:
        moved = self.pause.picture(pts, now)
        if moved is not None and (not self.shown or moved > self.shown[-1]):
            self.pacer.due(moved, now)
            self.shown.append(moved)
            return moved
        return None

    def sound(self, pts: int, now: float) -> int:
        return self.pause.sound(pts, now)

    def look(self, now: float) -> int | None:
        pts = self.pause.missing(now)
        if pts is not None:
            self.shown.append(pts)
            self.stills.append(pts)
        return pts

    def plays(self, seconds: float, *, pts: int = 0, now: float = 0.0) -> None:
        """Pictures and sound in real time."""
        for number in range(round(seconds * 30)):
            self.picture(pts + number * FRAME, now + number / 30)
            self.sound(pts + number * FRAME, now + number / 30)


def test_nothing_is_missing_before_the_first_picture() -> None:
    line = Line()
    line.sound(0, 0.0)
    assert line.look(100.0) is None


def test_stills_have_the_stamps_that_pictures_would_have_had() -> None:
    line = Line()
    line.plays(2)
    assert line.look(2 + QUIET_S) is None, "they are due a budget later"
    assert [line.look(now) for now in (7.0, 8.0)] == [round(6.6 * TICKS), round(7.6 * TICKS)]
    assert line.picture(9 * TICKS, 9.0) == 9 * TICKS
    assert line.look(10.0) is None
    assert line.pause.offset == 0


def test_segments_of_fifteen_seconds_in_one_piece_are_no_pause() -> None:
    line = Line()
    for segment in range(4):
        now = 15.0 * (segment + 1)
        for number in range(450):
            line.picture((segment * 450 + number) * FRAME, now)
        for tenth in range(149):
            assert line.look(now + tenth / 10) is None
    assert line.pause.offset == 0


def test_sound_is_the_clock_while_pictures_stay_away() -> None:
    line = Line()
    line.plays(2)
    leap = 500 * TICKS
    for number in range(60, 180):
        line.sound(number * FRAME + leap, number / 30)
    assert line.look(6.0) == round((6.0 - 0.4) * TICKS) + leap


def test_sound_of_another_time_is_a_clock_too() -> None:
    """A publisher whose sound is stamped 5 s behind its pictures: it moves nothing by being there."""
    line = Line()
    for number in range(300):
        now = number / 30
        if number < 60:
            line.picture(number * FRAME + 5 * TICKS, now)
        line.sound(number * FRAME, now)
        if number % 20 == 0:
            line.look(now)
    assert line.pause.offset == 0
    assert abs(line.stills[-1] - round((280 / 30 - 0.4 + 5) * TICKS)) < TICKS // 100
    assert line.picture(15 * TICKS, 10.0) == 15 * TICKS


def test_source_that_stood_still_goes_on_behind_what_was_shown() -> None:
    line = Line()
    line.plays(2)
    for now in range(6, 22):
        line.look(float(now))
    assert line.stills[-1] == round(20.6 * TICKS)
    moved = []
    for number in range(60):
        now = 21.5 + number / 30
        moved.append(line.picture((60 + number) * FRAME, now))
        line.sound((60 + number) * FRAME, now)
        line.look(now)
    dropped = moved.count(None)
    assert dropped <= 2 * CATCH_UP_S * 30 + 2
    assert moved[dropped] == line.stills[-1] + FRAME
    assert line.sound(120 * FRAME, 23.5) == 120 * FRAME + line.pause.offset, "sound as well"


def test_sound_that_stood_still_and_comes_back_alone() -> None:
    """Otherwise its clock would have to run up to the pictures that stood in before another one could."""
    line = Line()
    line.plays(2)
    for now in range(6, 22):
        line.look(float(now))
    before = line.stills[-1]
    for number in range(60, 360):
        now = 21.5 + (number - 60) / 30
        line.sound(number * FRAME, now)
        if number % 20 == 0:
            line.look(now)
    assert before + 8 * TICKS < line.stills[-1] < before + 11 * TICKS
    assert 17 * TICKS < line.pause.offset < 20 * TICKS


def test_what_comes_late_in_one_piece_keeps_its_stamps() -> None:
    line = Line()
    line.plays(2)
    for now in (6.0, 7.0, 8.0):
        line.look(now)
    for number in range(60, 240):  # six seconds within one
        line.picture(number * FRAME, 8.0 + (number - 60) / 180)
    assert line.shown[-1] == 239 * FRAME
    assert line.pause.offset == 0


@settings(max_examples=300, deadline=None)
@example([("late", 8), ("both", 1), ("late", 11), ("sound", 12)])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["both"] * 4 + ["sound", "pictures", "nothing", "stopped", "late"]), st.integers(1, 12)
        ),
        max_size=12,
    )
)
def test_stamps_only_grow_and_pictures_are_never_away_for_long(parts: list[tuple[str, int]]) -> None:
    """Real time in steps of a fifth of a second; a source that stops stops its clock, late ones come in one piece."""
    line = Line()
    source, held = 0, []
    silent_since = 0
    for tick, kind in enumerate(itertools.chain.from_iterable([kind] * (5 * length) for kind, length in parts)):
        now = tick / 5
        before = len(line.shown)
        if kind != "late":
            for pts in held:
                line.picture(pts, now)
            held.clear()
        if kind in ("both", "pictures"):
            line.picture(source, now)
        if kind in ("both", "sound"):
            line.sound(source, now)
        if kind == "late":
            held.append(source)
        if kind != "stopped":
            source += TICKS // 5
        if tick % 3 == 0:
            line.look(now)
        if len(line.shown) > before or not line.shown:
            silent_since = tick
        assert (tick - silent_since) / 5 < LONGEST_S + 3, "in time for the gateway"
    assert all(before < after for before, after in itertools.pairwise(line.shown))
