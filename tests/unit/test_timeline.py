"""Stamps that are damaged move nothing behind them, and true steps of the source's clock go through as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from gateway_shim.media.decode import Decoder
from gateway_shim.media.timeline import Timeline
from gateway_shim.media.ts import AccessUnit, Track
from tests.fakes.media_clips import clip, decoded, numbers, pictures, units_of

S = 90_000
VIDEO = Track(0x100, "h264", "video")
AUDIO = Track(0x101, "aac", "audio")
SOUND = 1920  # one AAC frame at 48 kHz


def unit(track: Track, at: int) -> AccessUnit:
    """Its data is the true time, to find it by."""
    return AccessUnit(track, at, at, b"%d" % at, True, False)


def stream(step: int, seconds: int, first: int = 10 * S, packet: int = 1) -> list[AccessUnit]:
    """Pictures and sound as they come: ``packet`` frames of sound at once, after the picture of their first one."""
    units = [(at, 0, unit(VIDEO, at)) for at in range(first, first + seconds * S, step)]
    for index, at in enumerate(range(first, first + seconds * S, SOUND)):
        units.append((first + index // packet * packet * SOUND, 1, unit(AUDIO, at)))
    return [each for *_, each in sorted(units, key=lambda entry: entry[:2])]


def moved(each: AccessUnit, by: int) -> AccessUnit:
    assert each.pts is not None
    return replace(each, pts=each.pts + by, dts=each.pts + by)


def placed(line: Timeline, units: Iterable[AccessUnit]) -> list[AccessUnit]:
    out = [each for unit in units for each in line.place(unit)]
    return out + line.flush()


def is_kept(given: Sequence[AccessUnit], out: Sequence[AccessUnit]) -> None:
    """Every unit once, in the order of its track, with the stamp that it came with."""
    for track in (VIDEO, AUDIO):
        mine = [(each.data, each.pts, each.dts) for each in given if each.track == track]
        assert [(each.data, each.pts, each.dts) for each in out if each.track == track] == mine


@pytest.mark.parametrize("bit", range(14, 20))
@pytest.mark.parametrize("step", [1500, 3000, 3600, 9000, 45_000, 90_000, 180_000])
@pytest.mark.parametrize("with_sound", [True, False])
def test_picture_whose_stamp_is_damaged_forward_moves_nothing(bit: int, step: int, with_sound: bool) -> None:
    units = [each for each in stream(step, 30, packet=8) if with_sound or each.track == VIDEO]
    index = [at for at, each in enumerate(units) if each.track == VIDEO][-8]
    units[index] = moved(units[index], 1 << bit)
    line = Timeline()
    out = placed(line, units)
    assert line.jumps == 0
    damaged = units[index].data
    is_kept([each for each in units if each.data != damaged], [each for each in out if each.data != damaged])
    assert sum(each.data == damaged for each in out) == sum(each.data == damaged for each in units)


@pytest.mark.parametrize("by", [1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19, -(1 << 15), -(1 << 19)])
@pytest.mark.parametrize("with_pictures", [True, False])
def test_sound_whose_stamp_is_damaged_moves_nothing(by: int, with_pictures: bool) -> None:
    units = [each for each in stream(3000, 10, packet=1) if with_pictures or each.track == AUDIO]
    sounds = [at for at, each in enumerate(units) if each.track == AUDIO]
    name = units[sounds[10]].data
    units[sounds[10]] = moved(units[sounds[10]], by)
    line = Timeline()
    out = placed(line, units)
    assert line.jumps == 0
    kept = [each for each in units if each.track == VIDEO or each.data != name]
    is_kept(kept, [each for each in out if each.track == VIDEO or each.data != name])
    assert [each.data for each in out if each.track == AUDIO] == [units[index].data for index in sounds]


def test_damaged_picture_takes_its_place_among_the_others() -> None:
    units = units_of(clip(60, audio="aac"))
    before = [shown.pts for shown in pictures(decoded(units))]
    index = [at for at, each in enumerate(units) if each.track.kind == "video"][20]
    units[index] = moved(units[index], 1 << 19)
    decoder = Decoder()
    items = decoded(units, decoder)
    assert numbers(items) == list(range(60))
    assert [shown.pts for shown in pictures(items)] == before
    assert decoder.counters.clock_jumps == 0


@pytest.mark.parametrize("leap", [S // 3, S // 2, S, 3 * S, 5 * S, 9 * S, 100 * S])
@pytest.mark.parametrize("packet", [1, 8])
@pytest.mark.parametrize("step", [1500, 3000, 45_000, 90_000, 180_000])
def test_true_step_forward_keeps_every_stamp(leap: int, packet: int, step: int) -> None:
    units = [moved(each, leap * (int(each.data) >= 20 * S)) for each in stream(step, 20, packet=packet)]
    line = Timeline()
    is_kept(units, placed(line, units))
    assert line.jumps == 0


@pytest.mark.parametrize("leap", [S // 2, 5 * S])
def test_picture_after_a_step_forward_waits_for_the_next_one_only(leap: int) -> None:
    line = Timeline()
    for at in range(0, S, 3000):
        assert line.place(unit(VIDEO, at)) != []
    first, second, third = (unit(VIDEO, at + leap) for at in (S, S + 3000, S + 6000))
    assert line.place(first) == []
    assert line.place(second) == [first, second]
    assert line.place(third) == [third]


def test_step_forward_at_the_end_is_given_out() -> None:
    units = [*stream(3000, 1), unit(VIDEO, 20 * S)]
    out = placed(Timeline(), units)
    assert [each.data for each in out if each.track == VIDEO][-1] == units[-1].data
    assert out[-1].pts is None


def test_step_forward_before_a_unit_without_stamps_is_kept() -> None:
    """A track that stamps every second unit would never confirm it."""
    units = [unit(VIDEO, at + 5 * S * (at >= S)) for at in range(0, 2 * S, 3000)]
    units = [replace(each, pts=None, dts=None) if index % 2 else each for index, each in enumerate(units)]
    is_kept(units, placed(Timeline(), units))


@pytest.mark.parametrize("gap", [S, 2 * S, 5 * S])
def test_steady_slow_pictures_are_held_once_at_most(gap: int) -> None:
    line = Timeline()
    held = [at for at in range(0, 20 * gap, gap) if not line.place(unit(VIDEO, at))]
    assert held == [gap]


def test_picture_that_comes_now_and_then_waits_for_sound_and_no_picture() -> None:
    packet = 8 * SOUND
    times = [0, 3000, 6000, 3 * S, 8 * S, 8 * S + 3000, 9 * S]
    units = [each for each in stream(3000, 12, first=0, packet=8) if each.track == AUDIO or int(each.data) in times]
    line = Timeline()
    waiting: list[int] = []
    for each in units:
        if each.track == VIDEO:
            waiting.append(int(each.data))
        for out in line.place(each):
            if out.track == VIDEO:
                assert out.pts == waiting.pop(0)
        assert all(int(each.data) < at + 2 * packet for at in waiting)
    assert waiting == []


def test_sound_that_comes_back_beside_its_picture_is_not_held() -> None:
    line = Timeline()
    for each in stream(3000, 6, first=0):
        at = int(each.data)
        if each.track == VIDEO or not S <= at < 3 * S:
            assert line.place(each) == [each]


def test_damage_of_one_track_while_the_other_one_falls() -> None:
    """The held picture is decided by its own track; both go on with the same offset."""
    units = [moved(each, -8 * S * (int(each.data) >= 14 * S)) for each in stream(3000, 8)]
    index = next(at for at, each in enumerate(units) if each.track == VIDEO and int(each.data) >= 14 * S - 3000)
    units[index] = moved(units[index], 1 << 18)
    damaged = units[index].data
    line = Timeline()
    out = [each for each in placed(line, units) if each.data != damaged]
    assert line.jumps == 1
    for track in (VIDEO, AUDIO):
        ends = [each.pts - int(each.data) for each in out if each.track == track and each.pts is not None]
        assert max(map(abs, ends)) < S // 5


@pytest.mark.parametrize("fall", [0, 3 * S])
def test_damage_after_a_stream_was_taken_up_again(fall: int) -> None:
    line = Timeline()
    line.resume(9 * S, 7000, 0)
    units = [moved(each, -fall) for each in stream(3000, 4)]
    index = [at for at, each in enumerate(units) if each.track == VIDEO][30]
    units[index] = moved(units[index], 1 << 19)
    out = placed(line, units)
    assert line.jumps == (1 if fall else 0)
    ends = {each.pts - int(each.data) for each in out if each.pts is not None}
    assert len(ends) == 1
