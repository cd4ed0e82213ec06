"""True steps of the source's clock go through as they are, and hold nothing up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from gateway_shim.media.timeline import Timeline
from gateway_shim.media.ts import AccessUnit, Track

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


@pytest.mark.parametrize("leap", [S // 3, S // 2, S, 3 * S, 5 * S, 9 * S, 100 * S])
@pytest.mark.parametrize("packet", [1, 8])
@pytest.mark.parametrize("step", [1500, 3000, 45_000, 90_000, 180_000])
def test_true_step_forward_keeps_every_stamp(leap: int, packet: int, step: int) -> None:
    units = [moved(each, leap * (int(each.data) >= 20 * S)) for each in stream(step, 20, packet=packet)]
    line = Timeline()
    is_kept(units, placed(line, units))
    assert line.jumps == 0


def test_step_forward_before_a_unit_without_stamps_is_kept() -> None:
    """A track that stamps every second unit would never confirm it."""
    units = [unit(VIDEO, at + 5 * S * (at >= S)) for at in range(0, 2 * S, 3000)]
    units = [replace(each, pts=None, dts=None) if index % 2 else each for index, each in enumerate(units)]
    is_kept(units, placed(Timeline(), units))


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


def test_lone_pictures_without_sound_are_not_held() -> None:
    """Slides, or a camera that sends on motion: the next picture may come minutes later."""
    line = Timeline()
    for at in (*range(0, 2 * S, 3000), 7 * S, 12 * S, 12 * S + 3000, 20 * S):
        assert line.place(unit(VIDEO, at)) == [unit(VIDEO, at)]
