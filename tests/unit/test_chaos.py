"""The parts of soak and chaos that need no process: plans from a seed, sound that knows its place, the judgement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.chaos import account as reckoning
from tests.chaos import figures, plan, tone
from tests.chaos.processes import Memory
from tests.chaos.source import Account, Sent
from tests.chaos.viewer import Heard, Seen, Unwrap, View

STEP = 3000
WINDOW_TICKS = tone.WINDOW * 90_000 // tone.SAMPLE_RATE


def test_plan_follows_from_its_seed_and_survives_a_file(tmp_path: Path) -> None:
    for seed in range(50):
        made = plan.chaos(seed, 20, "pass")
        assert made == plan.chaos(seed, 20, "pass")
        (tmp_path / "plan.json").write_text(made.as_json())
        assert plan.load(tmp_path / "plan.json") == made
        assert [event.at for event in made.events] == sorted(event.at for event in made.events)
    assert plan.chaos(1, 20, "pass") != plan.chaos(2, 20, "pass")
    everything = {event.fault for seed in range(300) for event in plan.chaos(seed, 20, "pass").events}
    assert everything == set(plan.FAULTS) - set(plan.OPTIONAL), "every fault comes sometimes"


def test_plan_of_unknown_faults_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan.kills(1, 1, 12, "pass").as_json().replace("kill_engine", "kill_everybody"))
    with pytest.raises(ValueError, match="kill_everybody"):
        plan.load(path)


def test_sound_is_found_where_it_lies_and_nowhere_else() -> None:
    piece = tone.samples(123_456, tone.WINDOW)
    assert tone.locate(piece, 123_456) == 123_456
    assert tone.locate(piece, 123_000) == 123_456
    assert tone.locate(piece, 123_456 + tone.PERIOD + 5) == 123_456 + tone.PERIOD
    assert tone.locate(np.zeros_like(piece), 123_456) is None
    other = np.random.default_rng(1).standard_normal(tone.WINDOW).astype(np.float32) * 0.2
    assert tone.locate(other, 123_456) is None


def test_stamps_of_33_bits_go_on_over_the_wrap() -> None:
    line = Unwrap()
    assert [line(stamp) for stamp in ((1 << 33) - 10, 5, 20, (1 << 33) - 1)] == [
        (1 << 33) - 10,
        (1 << 33) + 5,
        (1 << 33) + 20,
        (1 << 33) - 1,
    ]


def played(
    count: int = 90, *, offset: int = 0, lost: range = range(0), mute: range = range(0)
) -> tuple[Account, View]:
    """A stream at 30 fps that came through ``offset`` ticks later, without some pictures and windows of sound."""
    frames = [Sent(n, n / 30, 126_000 + n * STEP, 0, at=100 + n / 30) for n in range(count)]
    view = View()
    for sent in frames:
        if sent.number not in lost:
            pts = sent.stamp + offset
            view.pictures.append(Seen(pts, sent.number, inverted=False))
            view.order.append(pts)
            view.arrived[pts] = sent.at + 0.05
    windows = count * tone.SAMPLE_RATE // 30 // tone.WINDOW
    view.sound = [
        Heard(126_000 + offset + n * WINDOW_TICKS, n * tone.WINDOW, tone.WINDOW)
        for n in range(windows)
        if n not in mute
    ]
    return Account(frames, samples=count * tone.SAMPLE_RATE // 30), view


def test_stream_that_came_through_whole_has_no_gap_no_loss_and_no_offset() -> None:
    found = figures.judge(*played(offset=777), [], ended=True)
    assert (found.gap_ms, found.samples_lost, found.misplaced, found.backwards) == (0, 0, [], 0)
    assert max(map(abs, found.offsets_ms)) < 0.1
    assert figures.p99(found.latencies_ms) == 50


def test_missing_pictures_are_a_gap_beyond_the_inputs_own_step() -> None:
    found = figures.judge(*played(lost=range(40, 46)), [], ended=True)
    assert found.gap_ms == pytest.approx(200, abs=0.1)
    assert found.gap_at_s == pytest.approx(39 / 30, abs=0.05)


def test_missing_sound_is_counted_to_the_sample_and_excused_where_a_fault_took_it() -> None:
    account, view = played(mute=range(50, 53))
    assert figures.judge(account, view, [], ended=True).samples_lost == 3 * tone.WINDOW
    found = figures.judge(account, view, [figures.Span(0.9, 1.2)], ended=True)
    assert (found.samples_lost, found.samples_excused) == (0, 3 * tone.WINDOW)


def test_sound_that_ends_early_is_lost_too() -> None:
    account, view = played(mute=range(100, 1000))
    assert figures.judge(account, view, [], ended=True).samples_lost == account.samples - 100 * tone.WINDOW


def test_late_sound_is_an_offset_and_a_moved_picture_is_misplaced() -> None:
    account, view = played()
    view.sound = [Heard(heard.pts + 4500, heard.position, heard.count) for heard in view.sound]
    view.pictures[60] = Seen(view.pictures[60].pts + 100, 60, inverted=False)
    found = figures.judge(account, view, [], ended=True)
    assert figures.p99(found.offsets_ms) == pytest.approx(50, abs=2)
    assert found.misplaced == [(2.0, 100)]


def test_account_that_does_not_add_up_is_noticed() -> None:
    frames = {"received": 5, "processed": 2, "failed": 0, "passed_through": 1, "dropped": 1, "in_flight": 1}
    assert figures.ledger_gap(frames) == 0
    assert figures.ledger_gap(frames | {"processed": 1}) == 1


def test_slope_of_memory_is_a_leak_s_and_not_a_step_s() -> None:
    def slope(kb: Callable[[int], int]) -> float | None:
        return Memory({1: [(float(second), kb(second)) for second in range(600)]}).slope_kb_per_min({1})

    assert slope(lambda second: 50_000) == 0
    assert slope(lambda second: 50_000 + (8_000 if second > 450 else 0)) == 0, "a step"
    assert slope(lambda second: 50_000 + 10 * second) == 600, "a leak"
    assert slope(lambda second: 50_000 + 1000 * (second // 60)) == pytest.approx(1000, rel=0.1), "a leak in steps"
    assert Memory({1: [(0.0, 1), (5.0, 1)]}).slope_kb_per_min({1}) is None, "too short to say"


@pytest.mark.parametrize(
    ("kills", "wrong"),
    [
        ([(0.0, 10.0, 9.0), (12.0, 9.0, 8.0)], 0),
        ([(0.0, 11.5, 9.0), (12.0, 9.0, 8.0)], 1),
        ([(0.0, 19.0, 9.0), (9.5, 9.5, 9.0)], 0),  # taken away again before it was due
        ([(0.0, 10.0, 9.0), (9.5, 12.5, 9.0)], 1),
        ([(0.0, None, 9.0)], 1),
    ],
)
def test_picture_is_back_within_the_engines_boot_time_and_two_seconds(
    monkeypatch: pytest.MonkeyPatch, kills: list[tuple[float, float | None, float]], wrong: int
) -> None:
    monkeypatch.setattr(reckoning, "back_after", lambda _: kills)
    found = SimpleNamespace(plan=SimpleNamespace(only_kills=True, graph="invert", seconds=120), hang_repaired_s=[])
    assert len(reckoning._of_processes(found, {})) == wrong  # type: ignore[arg-type]
