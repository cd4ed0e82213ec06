"""The books of a session: every frame has one result, and the counters add up at every read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.audio import AudioFormat, SoundFeed
from engine.backend import FrameIn, GraphFailed, PictureOut, RunResult
from engine.credits import PIPELINE_FRAMES, Credits
from engine.graph.workflow import Prompt
from engine.outbox import Outbox
from engine.pace import VISIT_FRAMES
from engine.parameters import Parameters
from engine.run import Run
from engine.session import Session
from engine.wire import VideoFormat
from proto import engine_pb2 as pb
from proto.frames import Frame
from proto.results import FrameResult, Results

VIDEO = VideoFormat(4, 2)
PLANES = bytes(VIDEO.frame_bytes)
BUDGET_MS = 100


class FakeGraph:
    runner = "fake"
    runner_reason = ""
    inline = False
    shares = False

    def run(self, prompt: Prompt, frames: Sequence[FrameIn]) -> RunResult:
        raise AssertionError("the test makes the results")

    def close(self) -> None:
        pass


def outcome(result: FrameResult) -> str:
    """Exactly one, by name."""
    [name] = [name for name in ("picture", "dropped", "failed") if getattr(result, name) is not None]
    return name


class Books(RuleBasedStateMachine):
    """What a client and a scheduler can do, in any order."""

    @initialize(max_batch=st.integers(0, 3))
    def open(self, max_batch: int) -> None:
        self.now = 0.0
        self.outbox = Outbox()
        self.discarded: list[Any] = []
        self.graph = FakeGraph()
        self.session = Session(
            "s",
            VIDEO,
            Parameters({}, self.graph, self.discarded.append),
            self.outbox,
            latency_budget_ms=BUDGET_MS,
            max_batch=max_batch,
            clock=lambda: self.now,
        )
        self.window = PIPELINE_FRAMES + max(max_batch, 1)
        self.session.opened(pb.SessionOpened(session_id="s"))
        self.sent: list[int] = []
        self.results: dict[int, FrameResult] = {}
        self.uncredited = 0
        self.spent = 0
        self.granted = 0
        self.run: Run | None = None
        self.ended = False

    @precondition(lambda self: not self.ended)
    @rule(count=st.integers(1, 12), short=st.sampled_from([False, False, True]), age_ms=st.sampled_from([0, 0, 150]))
    def send(self, count: int, short: bool, age_ms: int) -> None:
        frames = []
        for _ in range(count):
            self.sent.append(len(self.sent))
            planes = PLANES[:-1] if short else PLANES
            frames.append(Frame(frame_id=self.sent[-1], pts=self.sent[-1], planes=planes, age_ms=age_ms))
        self.session.accept(frames)

    @rule(milliseconds=st.integers(1, 60))
    def wait(self, milliseconds: int) -> None:
        self.now += milliseconds / 1000

    @precondition(lambda self: self.run is None)
    @rule()
    def take(self) -> None:
        self.run = self.session.take()

    @precondition(lambda self: self.run is not None)
    @rule(
        pictures=st.integers(0, 3),
        failed=st.sampled_from([False, False, True]),
        graph_us=st.sampled_from([0, 300, 300, 5_000]),
    )
    def settle(self, pictures: int, failed: bool, graph_us: int) -> None:
        assert self.run is not None
        run, self.run = self.run, None
        if failed:
            self.session.fail(run, GraphFailed("no"))
        elif run.taken:  # each by itself; the last may have failed
            ran = max(1, len(run.taken) - (pictures == 0))
            part = RunResult([PictureOut(PLANES, 4, 2)], graph_us=graph_us)
            self.session.finish(run, RunResult([*part.pictures] * ran, graph_us=graph_us, apart=[part] * ran))
            if not self.session.closed:
                assert len(self.session._waiting) >= len(run.taken) - ran, "what did not run still waits"
        else:
            result = RunResult([PictureOut(PLANES, 4, 2)] * pictures, graph_us=graph_us)
            self.session.finish(run, result)

    # The ends come late, or most runs would be over before anything happened.
    @precondition(lambda self: len(self.sent) >= 20)
    @rule()
    def end_input(self) -> None:
        self.ended = True
        self.session.end_input()

    @precondition(lambda self: len(self.sent) >= 30)
    @rule()
    def close(self) -> None:
        self.ended = True
        self.session.close()
        assert self.discarded == [self.graph]
        assert self.session.in_flight == 0

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "session"):
            return
        for response in list(self.outbox._waiting):
            self.granted += response.credits
            for result in response.results if isinstance(response, Results) else ():
                assert result.frame_id not in self.results, "two results of one frame"
                assert result.pts == result.frame_id
                assert outcome(result)
                self.results[result.frame_id] = result
        self.outbox._waiting.clear()
        state = self.session.state()
        dropped = state.frames_dropped_late + state.frames_dropped_other
        answered = state.frames_processed + state.frames_failed + dropped
        assert state.frames_received == answered + state.frames_in_flight == len(self.sent)
        assert answered == len(self.results)
        in_flight = len(self.session._waiting) + (len(self.run.frames) if self.run and not self.session.closed else 0)
        assert state.frames_in_flight == in_flight
        outcomes = [outcome(result) for result in self.results.values()]
        assert outcomes.count("picture") == state.frames_processed
        assert outcomes.count("failed") == state.frames_failed
        reasons = [result.dropped.reason for result in self.results.values() if result.dropped is not None]
        assert reasons.count(pb.Dropped.REASON_LATE) == state.frames_dropped_late
        if not self.session.closed:
            without = reasons.count(pb.Dropped.REASON_NO_CREDIT)
            assert self.granted - (len(self.sent) - without) == self.session._credits.left
            window = self.window + self.session._credits.extra
            assert self.session._credits.left + state.frames_in_flight == window, "a credit was lost or made up"
            assert 0 <= self.session._credits.extra <= 2 * (VISIT_FRAMES - 1)


class TestBooks(Books.TestCase):  # type: ignore[misc, valid-type, name-defined]
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_budget_counts_age_and_waiting() -> None:
    now = 10.0
    session = Session(
        "s",
        VIDEO,
        Parameters.__new__(Parameters),
        Outbox(),
        latency_budget_ms=BUDGET_MS,
        clock=lambda: now,
    )
    session.parameters.current = object()  # type: ignore[assignment]
    session.opened(pb.SessionOpened())
    session.accept([Frame(frame_id=1, planes=PLANES, age_ms=60), Frame(frame_id=2, planes=PLANES, age_ms=59)])
    now += 0.041
    run = session.take()
    assert run is not None
    assert [frame.frame_id for frame in run.frames] == [2]
    assert session.books.dropped_late == 1


def test_another_budget_holds_for_frames_from_there_on() -> None:
    now = 10.0
    feed = SoundFeed(AudioFormat(), latency_budget_ms=BUDGET_MS)
    parameters = Parameters({}, FakeGraph(), lambda _: None)
    session = Session("s", VIDEO, parameters, Outbox(), latency_budget_ms=BUDGET_MS, sound=feed, clock=lambda: now)
    session.opened(pb.SessionOpened())
    session.accept([Frame(frame_id=1, planes=PLANES, age_ms=60)])
    session.set_latency_budget(1000)
    assert session.due_at() == pytest.approx(now + 0.04)
    session.accept([Frame(frame_id=2, planes=PLANES, age_ms=60)])
    now += 0.5
    assert session.due_at() == pytest.approx(10.0 + 0.94)
    assert session.books.dropped_late == 1
    session.set_latency_budget(0)
    session.accept([Frame(frame_id=3, planes=PLANES, age_ms=60)])
    now += 60.0
    assert session.due_at() == math.inf
    assert session.books.dropped_late == 2


def test_frames_that_the_quickest_run_would_finish_too_late_are_given_up() -> None:
    now = 10.0
    parameters = Parameters({}, FakeGraph(), lambda _: None)
    session = Session("s", VIDEO, parameters, Outbox(), latency_budget_ms=BUDGET_MS, clock=lambda: now)
    session.opened(pb.SessionOpened())
    assert session.due_at() is None
    for number, age_ms in enumerate((0, 50, 0, 61, 60)):
        session.accept([pb.Frame(frame_id=number, planes=PLANES, age_ms=age_ms)])
        if number < 2:  # nothing is known before the first run; the quickest counts
            run = session.take()
            assert run is not None
            session.finish(run, RunResult([PictureOut(PLANES, 4, 2)], graph_us=40_000 + 9000 * number))
    assert session.due_at() == now + 0.1
    run = session.take()
    assert run is not None
    session.finish(run, RunResult([PictureOut(PLANES, 4, 2)], graph_us=45_000))
    assert session.due_at() == now + 0.04
    assert (session.books.dropped_late, session.books.processed) == (1, 3)
    now += 0.001
    assert session.due_at() is None
    assert session.books.dropped_late == 2
    # The device may be quicker now: after a second a frame tries it.
    now += 1.0
    session.accept([pb.Frame(frame_id=9, planes=PLANES, age_ms=90)])
    assert session.due_at() == now + 0.01
    assert session.take() is not None


def test_frames_that_come_after_the_end_are_counted_and_run_nowhere() -> None:
    # Once they ran without an end: the session's last run stayed "running", and the scheduler took it again for ever.
    session = Session("s", VIDEO, Parameters({}, FakeGraph(), lambda _: None), Outbox())
    session.opened(pb.SessionOpened(session_id="s"))
    session.close()
    session.accept([Frame(frame_id=1, planes=PLANES)])
    assert session.take() is None
    assert not session.has_waiting()
    assert (session.books.received, session.books.dropped_other, session.in_flight) == (1, 1, 0)


def test_a_run_that_outlives_its_session_is_not_taken_again() -> None:
    session = Session("s", VIDEO, Parameters({}, FakeGraph(), lambda _: None), Outbox())
    session.opened(pb.SessionOpened(session_id="s"))
    session.accept([Frame(frame_id=1, planes=PLANES)])
    run = session.take()
    assert run is not None
    assert session.take() is None, "a batch is taken once"
    session.close()
    session.finish(run, RunResult([PictureOut(PLANES, 4, 2)]))
    assert session.take() is None


class PaintingGraph(FakeGraph):
    """Gives back what came, but for a batch that ``refuses`` says it cannot, and frames that fail alone too."""

    def __init__(self, refuses: str = "", bad: bytes = b"") -> None:
        self.refuses, self.bad = refuses, bad

    def run(self, prompt: Prompt, frames: Sequence[FrameIn]) -> RunResult:
        if any(frame.planes == self.bad for frame in frames):
            raise GraphFailed("this one")
        if len(frames) > 1 and self.refuses == "raises":
            raise GraphFailed("too large")
        pictures = [PictureOut(frame.planes, 4, 2) for frame in frames]
        return RunResult(pictures[:1] if self.refuses == "one" else pictures)


@pytest.mark.parametrize("refuses", ["", "raises", "one"])
@pytest.mark.parametrize("bad", [-1, 0, 1])
def test_each_of_a_shared_run_gets_its_own_picture_or_failure(refuses: str, bad: int) -> None:
    planes = [bytes([number]) * VIDEO.frame_bytes for number in range(3)]
    runs = []
    for number in range(3):
        graph = PaintingGraph(refuses, planes[bad] if bad >= 0 else b"")
        session = Session(str(number), VIDEO, Parameters({}, graph, lambda _: None), Outbox())
        session.opened(pb.SessionOpened())
        session.accept([pb.Frame(frame_id=1, planes=planes[number])])
        run = session.take()
        assert run is not None
        runs.append(run)
    for number, result in enumerate(runs[0].run_with(runs[1:])):
        if number == bad:
            assert isinstance(result, GraphFailed)
        else:
            assert isinstance(result, RunResult)
            assert [picture and picture.planes for picture in result.pictures] == [planes[number]]


class Slow(FakeGraph):
    """Takes so long by its own account, and fails on some frames."""

    def __init__(self, graph_us: int, bad: set[int] | None = None) -> None:
        super().__init__()
        self.graph_us, self.bad = graph_us, bad or set()
        self.ran: list[list[int]] = []

    def run(self, prompt: Prompt, frames: Sequence[FrameIn]) -> RunResult:
        self.ran.append([frame.frame_id for frame in frames])
        if self.bad & {frame.frame_id for frame in frames}:
            raise GraphFailed("no")
        return RunResult([PictureOut(frame.planes, 4, 2) for frame in frames], graph_us=self.graph_us)


def visited(graph: Slow, frames: int) -> tuple[Session, Outbox, list[list[int]]]:
    """A session that has run one frame, and then as many visits as it takes for ``frames`` that wait."""
    outbox = Outbox()
    session = Session("s", VIDEO, Parameters({}, graph, lambda _: None), outbox, clock=lambda: 0.0)
    session.opened(pb.SessionOpened())
    session.accept([Frame(frame_id=0, planes=PLANES)])
    visits = []
    session._credits.give(frames)  # as if it had been granted
    first = True
    while first or session.has_waiting():
        run = session.take()
        assert run is not None
        visits.append([frame.frame_id for frame in run.frames])
        try:
            session.finish(run, run.run())
        except GraphFailed as error:
            session.fail(run, error)
        if first:
            session.accept([Frame(frame_id=number, planes=PLANES) for number in range(1, frames + 1)])
            first = False
    return session, outbox, visits


def test_a_quick_graph_runs_what_waits_in_one_visit_frame_by_frame() -> None:
    graph = Slow(500)
    session, outbox, visits = visited(graph, 10)
    assert visits == [[0], list(range(1, 9)), [9, 10]]
    assert graph.ran == [[number] for number in range(11)], "each frame is a run of its own"
    assert session.books.processed == 11
    answers = [response for response in outbox._waiting if isinstance(response, Results)]
    assert [len(answer.results) for answer in answers] == [1, 8, 2], "one message for a visit"


def test_the_credits_of_a_quick_graph_come_back_by_not_being_given() -> None:
    credits = Credits(1)
    assert credits.of_run(1, 8) == 1 + 14
    assert [credits.of_run(frames, 1) for frames in (1, 8, 8, 1)] == [0, 0, 3, 1], "a message takes none away"
    assert credits.extra == 0


def test_a_graph_that_takes_its_time_answers_every_frame_at_once() -> None:
    _, _, visits = visited(Slow(17_000), 3)
    assert visits == [[0], [1], [2], [3]]


def test_a_frame_that_fails_in_a_visit_takes_no_other_with_it() -> None:
    graph = Slow(500, bad={3})
    session, _, visits = visited(graph, 5)
    assert visits[1] == [1, 2, 3, 4, 5]
    assert session.books.processed == 5
    assert session.books.failed == 1
    answered = [number for frames in graph.ran for number in frames if number != 3]
    assert answered == [0, 1, 2, 4, 5], "in order, and none twice"
