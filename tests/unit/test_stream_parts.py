"""The pure parts of a stream: due times, the gate for sound, fallback, ledger, state."""

import asyncio
from dataclasses import dataclass, replace

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_shim.media.colour import Colour
from gateway_shim.media.rows import planes_size
from gateway_shim.stream.admission import Admission
from gateway_shim.stream.av_sync import AudioGate
from gateway_shim.stream.engine_sound import EngineSound
from gateway_shim.stream.fallback import Fallback
from gateway_shim.stream.intake import Decoded
from gateway_shim.stream.ledger import Ledger, Outcome
from gateway_shim.stream.mailbox import Entry, Mailbox
from gateway_shim.stream.pacing import JITTER_S, TICKS, WINDOW_S, Pacer
from gateway_shim.stream.places import MAX_BYTES, USUAL, Places
from gateway_shim.stream.state import StreamFacts, StreamState, stream_state

FRAME = TICKS // 30


@dataclass(frozen=True)
class Samples:
    samples: int


@dataclass
class Block:
    pts: int
    frame: Samples = Samples(960)  # 20 ms


SOURCE, PROCESSED = av.VideoFrame(4, 4, "yuv420p"), av.VideoFrame(2, 2, "yuv420p")


def entry(frame_id: int, *, due: float = 1e9, pts: int | None = None) -> Entry:
    pts = frame_id * FRAME if pts is None else pts
    return Entry(frame_id, pts, SOURCE, Colour(), 0.0, due)


# ---- pacing


def test_frames_in_step_have_exactly_the_budget() -> None:
    pacer = Pacer(0.4)
    for number in range(300):
        now = 100 + number / 30
        assert pacer.due(number * FRAME, now) == pytest.approx(now + 0.4)


def test_a_frame_that_is_a_little_late_makes_no_other_wait() -> None:
    pacer = Pacer(0.4)
    arrivals = [100 + number / 30 + (0.012 if number % 20 == 7 else 0.0) for number in range(100)]
    for number, now in enumerate(arrivals):
        assert pacer.due(number * FRAME, now) == pytest.approx(now + 0.4)


def test_last_frame_of_a_burst_is_due_when_its_picture_is() -> None:
    pacer = Pacer(0.4)
    due = [pacer.due(number * FRAME, 100.0) for number in range(60)]
    assert due[0] == pytest.approx(100.4)
    assert due[59] == pytest.approx(100.4 + 59 / 30 - JITTER_S)
    # The next burst comes two seconds later, and its first frame has no less than the budget.
    assert pacer.due(60 * FRAME, 102.0) == pytest.approx(102.4)


def test_a_late_start_is_forgotten() -> None:
    pacer = Pacer(0.4, window_s=3.0)
    pacer.due(0, 102.0)  # two seconds late
    last = [pacer.due(number * FRAME, 100 + number / 30) for number in range(60, 300)][-1]
    assert last == pytest.approx(100 + 299 / 30 + 0.4)


def test_a_jump_of_the_clock_does_not_move_due_times_away() -> None:
    pacer = Pacer(0.4)
    pacer.due(0, 100.0)
    assert pacer.due(1000 * TICKS, 100.1) == pytest.approx(100.5)
    assert pacer.due(0, 100.2) == pytest.approx(100.6)
    assert pacer.due(3 * TICKS, 100.3) == pytest.approx(100.7)


@given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 5 * FRAME)), max_size=60))
def test_no_frame_ever_has_less_than_the_budget(steps: list[tuple[float, int]]) -> None:
    pacer, now, pts = Pacer(0.25), 50.0, 0
    for wait, ticks in steps:
        now, pts = now + wait, pts + ticks
        assert pacer.due(pts, now) >= now + 0.25 - 1e-9


# ---- sound


def test_sound_goes_out_with_its_picture_and_never_before_the_first() -> None:
    gate: AudioGate[Block] = AudioGate()
    for pts in (0, 1800, 3600, 5400):
        gate.put(Block(pts), due=10.0)
    assert [block.pts for block in gate.overdue(11.0)] == []
    assert [block.pts for block in gate.release(3000)] == [0, 1800]
    assert [block.pts for block in gate.release(4000)] == [3600]
    assert [block.pts for block in gate.overdue(9.0)] == []
    assert [block.pts for block in gate.overdue(10.0)] == [5400]


def test_sound_from_long_before_the_first_picture_is_dropped() -> None:
    gate: AudioGate[Block] = AudioGate()
    for pts in (0, 80_000, 90_000):
        gate.put(Block(pts), due=10.0)
    assert [block.pts for block in gate.release(90_000)] == [90_000]
    assert gate.dropped == 2


def test_sound_waiting_for_a_picture_that_never_comes_is_bounded() -> None:
    gate: AudioGate[Block] = AudioGate(hold_s=1.0)
    for number in range(1000):
        gate.put(Block(number * 1800), due=1e9)
    assert len(gate) == 50


@pytest.mark.parametrize("step", [0, -1800, -TICKS, 1])
def test_sound_whose_stamps_stand_still_or_fall_is_bounded(step: int) -> None:
    gate: AudioGate[Block] = AudioGate(hold_s=1.0)
    for number in range(1000):
        gate.put(Block(number * step), due=1e9)
    assert len(gate) == 50
    assert gate.dropped == 950


def test_blocks_without_samples_are_bounded_too() -> None:
    gate: AudioGate[Block] = AudioGate(hold_s=1.0)
    for _ in range(1000):
        gate.put(Block(0, Samples(0)), due=1e9)
    assert len(gate) == 400


def test_sound_that_waits_over_a_leap_of_the_clock_is_kept() -> None:
    gate: AudioGate[Block] = AudioGate(hold_s=1.0)
    stamps = [0, 1800, 3600, 1000 * TICKS, 1000 * TICKS + 1800]
    for pts in stamps:
        gate.put(Block(pts), due=1e9)
    assert [block.pts for block in gate.release(1001 * TICKS)] == []
    assert gate.dropped == 5, "long before the first picture"
    for pts in stamps:
        gate.put(Block(pts + 2000 * TICKS), due=1e9)
    assert [block.pts for block in gate.release(5000 * TICKS)] == [pts + 2000 * TICKS for pts in stamps]


# ---- fallback


def test_a_late_frame_repeats_the_last_picture_then_passes_through() -> None:
    fallback = Fallback(hold_s=0.5)
    good = entry(0)
    good.outcome, good.result = Outcome.PROCESSED, PROCESSED
    late = [entry(number) for number in range(1, 30)]
    for each in late:
        each.outcome = Outcome.DROPPED
    assert fallback.choose(late[0]).frame is SOURCE, "nothing to repeat yet"
    assert fallback.choose(good).frame is PROCESSED
    shown = [fallback.choose(each) for each in late]
    assert [each.pts for each in shown] == [each.pts for each in late]
    assert [each.repeated for each in shown] == [True] * 14 + [False] * 15, "half a second at 30 fps"
    assert shown[13].frame is PROCESSED
    assert shown[14].frame is SOURCE


# ---- mailbox


async def test_frames_leave_in_order_whatever_order_the_answers_have() -> None:
    box = Mailbox(10)
    for number in range(3):
        box.put(entry(number))
    box.resolve(2, Outcome.PROCESSED)
    box.resolve(0, Outcome.PROCESSED)
    assert (await box.pop()).frame_id == 0  # type: ignore[union-attr]
    waiting = asyncio.create_task(box.pop())
    await asyncio.sleep(0)
    assert not waiting.done(), "frame 1 has no answer yet, frame 2 must wait for it"
    box.resolve(1, Outcome.FAILED)
    assert (await waiting).frame_id == 1  # type: ignore[union-attr]
    assert (await box.pop()).frame_id == 2  # type: ignore[union-attr]


async def test_what_is_settled_behind_the_first_leaves_with_it_and_makes_room() -> None:
    mailbox = Mailbox(limit=4)
    for frame_id in range(4):
        mailbox.put(entry(frame_id))
    for frame_id in (0, 1, 3):
        mailbox.resolve(frame_id, Outcome.PROCESSED)
    first = await mailbox.pop()
    assert first is not None
    assert first.frame_id == 0
    assert [other.frame_id for other in mailbox.settled(1)] == [1]
    assert mailbox.settled(3) == [], "2 has no answer yet, and 3 does not overtake it"
    await asyncio.wait_for(mailbox.room(), 1)
    mailbox.resolve(2, Outcome.PROCESSED)
    assert [other.frame_id for other in mailbox.settled(9)] == [2, 3]
    assert len(mailbox) == 0


async def test_a_frame_without_an_answer_leaves_when_it_is_due() -> None:
    box = Mailbox(10)
    now = asyncio.get_running_loop().time()
    box.put(entry(0, due=now + 0.05))
    popped = await box.pop()
    assert popped is not None
    assert (popped.outcome, popped.reason) == (Outcome.DROPPED, "late")
    assert asyncio.get_running_loop().time() >= now + 0.05
    assert box.resolve(0, Outcome.PROCESSED) is None, "an answer after that is too late"


async def test_what_the_output_needs_is_part_of_the_budget() -> None:
    box = Mailbox(10)
    box.lead_s = 60.0
    now = asyncio.get_running_loop().time()
    box.put(entry(0, due=now + 59))
    popped = await asyncio.wait_for(box.pop(), 10)
    assert popped is not None
    assert popped.reason == "late", "it would be out behind its time"
    box.put(entry(1, due=now + 59))
    box.put(entry(2, due=now + 3600))
    assert (await box.take(0.0)).frame_id == 2
    box.put(entry(3, due=now + 59))
    assert box.take_waiting(0.0) is None


async def test_second_answer_for_a_frame_is_ignored() -> None:
    box = Mailbox(10)
    box.put(entry(0))
    assert box.resolve(0, Outcome.PROCESSED) is not None
    assert box.resolve(0, Outcome.FAILED) is None
    assert box.resolve(77, Outcome.PROCESSED) is None
    assert (await box.pop()).outcome is Outcome.PROCESSED  # type: ignore[union-attr]


async def test_taker_skips_frames_that_cannot_make_it() -> None:
    box = Mailbox(10)
    now = asyncio.get_running_loop().time()
    box.put(entry(0, due=now + 0.05))
    box.put(entry(1, due=now + 0.1))
    box.put(entry(2, due=now + 9))
    assert (await box.take(0.5)).frame_id == 2
    assert (await box.pop()).reason == "late"  # type: ignore[union-attr]


async def test_refused_frames_pass_at_once() -> None:
    box = Mailbox(10)
    box.put(entry(0))
    box.refuse("engine_gone")
    box.put(entry(1))
    for _ in range(2):
        popped = await box.pop()
        assert popped is not None
        assert (popped.outcome, popped.reason) == (Outcome.PASSED_THROUGH, "engine_gone")
    box.accept()
    box.put(entry(2))
    assert (await box.take(0.0)).frame_id == 2


async def test_a_full_mailbox_holds_the_producer_until_one_leaves() -> None:
    box = Mailbox(2)
    box.put(entry(0))
    await asyncio.wait_for(box.room(), 1)
    box.put(entry(1))
    blocked = asyncio.create_task(box.room())
    await asyncio.sleep(0)
    assert not blocked.done()
    box.resolve(0, Outcome.PROCESSED)
    await box.pop()
    await asyncio.wait_for(blocked, 1)


async def test_places_may_become_fewer_and_more_while_frames_wait() -> None:
    box = Mailbox(3)
    for number in range(3):
        box.put(entry(number))
    box.limit = 2
    blocked = asyncio.create_task(box.room())
    box.resolve(0, Outcome.PROCESSED)
    box.resolve(1, Outcome.PROCESSED)
    await box.pop()
    await asyncio.sleep(0)
    assert not blocked.done(), "two wait"
    await box.pop()
    await asyncio.wait_for(blocked, 1)
    box.put(entry(3))
    box.limit = 3
    await asyncio.wait_for(box.room(), 1)


async def test_pop_ends_after_close_when_all_are_out() -> None:
    box = Mailbox(2)
    box.put(entry(0))
    box.close()
    box.resolve(0, Outcome.PROCESSED)
    assert await box.pop() is not None
    assert await box.pop() is None


# ---- places


def places(rate: int, width: int = 1280, height: int = 720) -> Places:
    made = Places(width, height)
    for number in range(60):
        made.add(number * TICKS // rate)
    return made


@pytest.mark.parametrize("rate", [15, 24, 25, 30, 60])
def test_there_are_more_places_than_frames_within_any_budget_that_is_accepted(rate: int) -> None:
    for size in ((320, 240), (1280, 720), (1920, 1080), (4096, 2304)):
        of_stream = places(rate, *size)
        for asked_s in (0.02, 0.4, 1.0, 3.0, 30.0):
            budget_s = min(asked_s, of_stream.longest_s)
            count = of_stream.needed(budget_s)
            assert count > rate * budget_s, "with fewer the reader waits for each, and falls behind"
            assert count == USUAL or count * planes_size(*size) <= MAX_BYTES
    assert places(rate).longest_s > 2.0


def test_default_budget_takes_no_more_places_than_a_burst() -> None:
    for rate in (24, 30, 60):
        assert places(rate).needed(0.4) == 60
    assert Places(1280, 720).needed(0.4) == 60, "before the rate is known"
    assert Places(8192, 8192).needed(0.4) == 60


async def test_budget_for_which_there_is_no_room_is_lowered_and_told(caplog: pytest.LogCaptureFixture) -> None:
    box, ledger = Mailbox(60), Ledger()
    admission = Admission(
        box,
        EngineSound(AudioGate()),
        ledger,
        budget_s=30.0,
        size=None,
        last_pts=None,
        on_format=lambda *_: None,
    )
    frame = av.VideoFrame(1280, 720, "yuv420p")
    for number in range(61):
        if number == 30:
            admission.pacer.budget_s = 3.0
        box.refuse("engine_gone")
        await admission.picture(Decoded(frame, number * FRAME, Colour()))
        popped = await box.pop()
        assert popped is not None
        budget_s = 3.0 if number >= 30 else box.longest_s
        assert popped.due - popped.arrived_at <= budget_s + WINDOW_S + 1e-6
    assert box.longest_s == pytest.approx(185 * 0.8 / 30)
    assert box.limit == 113, "for 3 s at 30 fps"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "30.00 s; it is 4.93 s" in caplog.text


# ---- ledger


@given(st.lists(st.sampled_from(["receive", *Outcome]), max_size=200))
def test_every_frame_has_one_line(steps: list[str]) -> None:
    ledger = Ledger()
    for step in steps:
        if step == "receive":
            ledger.receive()
        elif ledger.in_flight:
            ledger.settle(Outcome(step), "reason")
        account = ledger.as_json()
        assert account["received"] == sum(account[key] for key in (*map(str, Outcome), "in_flight"))  # type: ignore[misc]


def test_settling_twice_is_a_fault_of_ours() -> None:
    ledger = Ledger()
    ledger.receive()
    ledger.settle(Outcome.PROCESSED)
    with pytest.raises(AssertionError):
        ledger.settle(Outcome.PROCESSED)


# ---- state

HEALTHY = StreamFacts(
    running=True,
    engine_open=True,
    ever_processed=True,
    age_s=60,
    input_age_s=0.1,
    input_fps=30,
    output_age_s=0.1,
    inference_fps=30,
    error_age_s=None,
    restart_age_s=None,
    workflow_refused=False,
)


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, StreamState.ONLINE),
        ({"running": False}, StreamState.OFFLINE),
        ({"input_age_s": None, "age_s": 5}, StreamState.LOADING),
        ({"input_age_s": 3.0}, StreamState.DEGRADED_INPUT),
        ({"input_age_s": 91.0}, StreamState.ERROR),
        ({"ever_processed": False}, StreamState.LOADING),
        ({"engine_open": False}, StreamState.DEGRADED_INFERENCE),
        ({"workflow_refused": True}, StreamState.DEGRADED_INFERENCE),
        ({"inference_fps": 4}, StreamState.DEGRADED_INFERENCE),
        ({"error_age_s": 2.0}, StreamState.DEGRADED_INFERENCE),
        ({"error_age_s": 20.0}, StreamState.ONLINE),
        ({"restart_age_s": 20.0}, StreamState.DEGRADED_INFERENCE),
        ({"input_fps": 12, "inference_fps": 12}, StreamState.DEGRADED_INPUT),
    ],
)
def test_state_follows_from_facts(change: dict[str, object], state: StreamState) -> None:
    assert stream_state(replace(HEALTHY, **change)) is state  # type: ignore[arg-type]
