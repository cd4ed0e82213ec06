"""When frames must be sent, and how many a second a graph can do, from the engine's answers."""

import pytest

from gateway_shim.stream.estimate import BUSY_MEMORY_S, Estimate
from gateway_shim.stream.pacing import Pacer
from gateway_shim.stream.state import slow_hint
from proto import engine_pb2 as pb
from proto.results import FrameResult, Picture


def picture(frame_id: int, graph_us: int = 0, convert_us: int = 0) -> FrameResult:
    return FrameResult(frame_id=frame_id, picture=Picture(), graph_us=graph_us, convert_us=convert_us)


def late(frame_id: int) -> FrameResult:
    return FrameResult(frame_id=frame_id, dropped=pb.Dropped(reason=pb.Dropped.REASON_LATE))


def test_nothing_is_known_before_the_first_picture():
    estimate = Estimate()
    assert estimate.sustainable_fps(0.0) is None
    assert slow_hint(30.0, None, 0.4) is None
    estimate.sent(1, 0.0)
    estimate.answered(late(1), 0.2)
    assert estimate.sustainable_fps(0.2) is None
    assert estimate.needed_s == pytest.approx(0.36), "but the round trip of a late one counts"


def test_fast_graph_can_do_what_its_own_times_leave_room_for():
    estimate = Estimate()
    for number in range(100):
        estimate.sent(number, number / 30)
        estimate.answered(picture(number, 8000, 2000), number / 30 + 0.012)
    assert estimate.sustainable_fps(3.4) == pytest.approx(100)
    assert slow_hint(30.0, 100.0, 0.4) is None


def test_busy_engine_is_measured_with_all_that_it_does_besides():
    # The graph says 40 ms, but another stream's frames run between ours: one each 100 ms, two always in the engine.
    estimate = Estimate()
    estimate.sent(0, 0.0)
    for number in range(50):
        estimate.sent(number + 1, number * 0.1 + 0.05)
        estimate.answered(picture(number, 40_000), number * 0.1 + 0.1)
    assert estimate.sustainable_fps(5.0) == pytest.approx(10)
    assert "10.0 of 30.0" in slow_hint(30.0, 10.0, 0.4)
    assert "max_framerate 10" in slow_hint(30.0, 10.0, 0.4)
    assert estimate.sustainable_fps(5.0 + BUSY_MEMORY_S) == pytest.approx(25), "measured long ago"


def test_engine_gets_no_more_frames_than_come_back_within_the_budget():
    estimate = Estimate()
    estimate.sent(0, 0.0)
    assert estimate.room_for_another(0.4, 0.0), "nothing is known"
    estimate.answered(picture(0, 140_000), 0.14)
    for number in (1, 2):
        assert estimate.room_for_another(0.4, 0.14)
        estimate.sent(number, 0.14)
    assert not estimate.room_for_another(0.4, 0.14), "0.42 s"
    assert estimate.room_for_another(0.5, 0.14)
    estimate.answered(picture(1, 140_000), 0.28)
    assert estimate.room_for_another(0.4, 0.28)
    assert Estimate().room_for_another(0.02, 0.0)


def test_graph_that_takes_longer_than_the_budget_is_named():
    assert "takes the graph 500 ms" in slow_hint(1.0, 2.0, 0.4)
    assert "latency_budget_ms" in slow_hint(1.0, 2.0, 0.4)


def test_pauses_of_the_input_are_no_slowness_of_the_graph():
    estimate = Estimate()
    for number in range(20):
        estimate.sent(number, number * 1.0)
        estimate.answered(picture(number, 10_000), number + 0.01)
    assert estimate.sustainable_fps(20.0) == pytest.approx(100)


def test_new_session_forgets_what_was_under_way():
    estimate = Estimate()
    estimate.sent(1, 0.0)
    assert estimate.waiting_s(3.0, heard_at=-1.0) == 3.0
    assert estimate.waiting_s(3.0, heard_at=2.5) == 0.5
    estimate.reset()
    assert estimate.waiting_s(3.0, heard_at=0.0) == 0.0
    estimate.answered(picture(1), 3.0)
    assert estimate.needed_s == 0.0


def test_clock_that_runs_ahead_holds_no_frame_longer_than_window_and_budget():
    pacer = Pacer(0.4, window_s=3.0)
    due = [pacer.due(round(number * 0.9 * 90_000), 100.0) for number in range(10)]
    assert due[0] == pytest.approx(100.4)
    assert max(due) == due[-1] == pytest.approx(103.4)


def test_budget_of_a_running_stream_may_change():
    pacer = Pacer(0.4)
    assert pacer.due(0, 100.0) == pytest.approx(100.4)
    pacer.budget_s = 0.1
    assert pacer.due(3000, 100.0 + 1 / 30) == pytest.approx(100.1 + 1 / 30)
