"""The account of frames as a property: ledger, mailbox, fallback and output together, whatever happens when."""

import asyncio
import selectors
from collections.abc import Callable

import av
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway_shim.media.colour import Colour
from gateway_shim.stream.audio import StreamSound
from gateway_shim.stream.av_sync import AudioGate
from gateway_shim.stream.fallback import Fallback, Policy
from gateway_shim.stream.ledger import Ledger, Outcome
from gateway_shim.stream.mailbox import Entry, Mailbox
from gateway_shim.stream.output import OVERLOAD_S, Output
from gateway_shim.stream.pacing import TICKS, WINDOW_S, Pacer

FRAME = TICKS // 30
BUDGET_S = 0.4
LIMIT = 8
LONG_S = OVERLOAD_S + 5
SOURCE, PICTURE = av.VideoFrame(4, 4, "yuv420p"), av.VideoFrame(4, 4, "yuv420p")


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is the test's."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def spin(self, look: Callable[[], None]) -> None:
        """Do everything that can be done now; ``look`` after each step, as somebody who reads the counters might."""
        for _ in range(2 * LIMIT + 10):
            self.call_soon(self.stop)
            self.run_forever()
            look()


class Account(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = Clock()
        asyncio.set_event_loop(self.loop)
        self.ledger = Ledger()
        self.mailbox = Mailbox(LIMIT)
        self.pacer = Pacer(BUDGET_S)
        self.fallback = Fallback()
        self.shown: list[tuple[int, av.VideoFrame, bool]] = []
        self.taken: list[int] = []  # frames that the engine has
        self.answered: list[int] = []
        self.pts = self.frame_id = 0
        self.arrived: dict[int, float] = {}
        self.before: dict[str, int] = {}
        self.taking: asyncio.Task[Entry] | None = None

        async def nothing() -> None:
            return

        async def made() -> Output:
            return Output(
                None,
                self.mailbox,
                StreamSound(AudioGate()),
                self.ledger,
                settings=lambda entry: pytest.fail("nothing is encoded without a channel"),
                fallback=self.fallback,
                before_first=nothing,
            )

        self.output = self.loop.run_until_complete(made())
        choose = self.fallback.choose

        def watched(entry: Entry):
            choice = choose(entry)
            self.shown.append((entry.frame_id, choice.frame, choice.repeated))
            self.waits.append(self.loop.time() - self.arrived[entry.frame_id])
            return choice

        self.waits: list[float] = []
        self.fallback.choose = watched  # type: ignore[method-assign]
        self.running = self.loop.create_task(self.output.run())
        self.spin()

    def spin(self) -> None:
        self.loop.spin(self.exact)
        if self.taking is not None and self.taking.done():
            self.taken.append(self.taking.result().frame_id)
            self.taking = None

    # ---- what may happen

    @precondition(lambda self: len(self.mailbox) < LIMIT)
    @rule(ticks=st.sampled_from([FRAME, FRAME, FRAME, 1, 7 * TICKS]))
    def frame_arrives(self, ticks: int) -> None:
        self.pts += ticks
        now = self.loop.time()
        self.ledger.receive()
        self.arrived[self.frame_id] = now
        due = self.pacer.due(self.pts, now)
        assert now + self.pacer.budget_s - 1e-6 <= due <= now + WINDOW_S + self.pacer.budget_s
        self.mailbox.put(Entry(self.frame_id, self.pts, SOURCE, Colour(), now, due))
        self.frame_id += 1
        self.spin()

    @rule()
    def frame_that_goes_back_in_time_arrives(self) -> None:
        self.ledger.receive()
        self.ledger.settle(Outcome.DROPPED, "not_increasing")

    @precondition(lambda self: self.taking is None)
    @rule(needed_s=st.sampled_from([0.0, 0.1, 1.0]))
    def engine_grants_a_credit(self, needed_s: float) -> None:
        self.taking = self.loop.create_task(self.mailbox.take(needed_s))
        self.spin()

    @precondition(lambda self: self.taken)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([Outcome.PROCESSED, Outcome.PROCESSED, Outcome.FAILED, Outcome.DROPPED]),
        twice=st.booleans(),
    )
    def engine_answers(self, data: st.DataObject, outcome: Outcome, twice: bool) -> None:
        frame_id = data.draw(st.sampled_from(self.taken[-3:] + self.answered[-1:]))
        result = PICTURE if outcome is Outcome.PROCESSED else None
        first = self.mailbox.resolve(frame_id, outcome, "" if result else "told_to", result)
        assert first is None or frame_id not in self.answered, "the first answer counts"
        if twice:
            assert self.mailbox.resolve(frame_id, Outcome.FAILED, "told_to") is None
        self.answered.append(frame_id)
        self.spin()

    @precondition(lambda self: self.frame_id > 4)
    @rule(reason=st.sampled_from(["engine_gone", "loading"]))
    def engine_is_lost(self, reason: str) -> None:
        self.mailbox.refuse(reason)
        self.spin()

    @rule()
    def engine_is_back(self) -> None:
        self.mailbox.accept()

    @rule(policy=st.sampled_from(Policy), budget_s=st.sampled_from([0.02, BUDGET_S, 3.0]))
    def stream_is_updated(self, policy: Policy, budget_s: float) -> None:
        self.fallback.policy = policy
        self.pacer.budget_s = budget_s

    @rule(seconds=st.sampled_from([0.001, 1 / 30, 0.2, 0.5, LONG_S]))
    def time_passes(self, seconds: float) -> None:
        self.loop.now += seconds
        self.spin()

    # ---- what always holds

    @invariant()
    def exact(self) -> None:
        account = self.ledger.as_json()
        outcomes = {outcome.value: self.ledger.count(outcome) for outcome in Outcome}
        assert self.ledger.received == sum(outcomes.values()) + self.ledger.in_flight
        assert self.ledger.in_flight == len(self.mailbox)
        for outcome, reasons in account["reasons"].items():
            assert sum(reasons.values()) == outcomes[outcome], "each but a processed one has its reason"
        assert all(outcomes[name] >= count for name, count in self.before.items()), "an outcome is final"
        self.before = outcomes

    @invariant()
    def viewers_see_what_the_account_says(self) -> None:
        order = [frame_id for frame_id, _, _ in self.shown]
        assert order == sorted(set(order))
        assert self.ledger.repeated == sum(repeated for _, _, repeated in self.shown)
        inputs = sum(frame is SOURCE for _, frame, _ in self.shown)
        assert self.ledger.count(Outcome.PROCESSED) <= len(self.shown)
        # What failed is told as that, whatever stood in for it.
        passed = self.ledger.count(Outcome.PASSED_THROUGH)
        assert passed <= inputs <= passed + self.ledger.count(Outcome.FAILED)
        own = sum(frame is PICTURE and not repeated for _, frame, repeated in self.shown)
        assert own == self.ledger.count(Outcome.PROCESSED)

    @invariant()
    def nothing_waits_longer_than_it_may(self) -> None:
        # The pacer's window, the largest budget, what the output tolerates, and the longest step of time here.
        assert all(waited <= WINDOW_S + 3.0 + OVERLOAD_S + LONG_S for waited in self.waits)
        assert len(self.mailbox) <= LIMIT

    def teardown(self) -> None:
        self.mailbox.refuse("stream_ended")
        self.mailbox.close()
        self.spin()
        assert self.ledger.in_flight == 0
        assert sum(self.ledger.count(outcome) for outcome in Outcome) == self.ledger.received
        self.running.cancel()
        if self.taking is not None:
            self.taking.cancel()
        self.loop.run_until_complete(asyncio.gather(self.running, return_exceptions=True))
        self.loop.run_until_complete(self.output.close())
        asyncio.set_event_loop(None)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


Account.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAccount = Account.TestCase
