"""One session: its frames, from their arrival to their result.

Everything lives on the event loop; what runs on the executor thread gets a ``Run`` that is complete in itself. For
every frame that arrives exactly one result leaves, and at every moment
``received = processed + failed + dropped + in flight``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from proto import engine_pb2 as pb
from proto.frames import Frame
from proto.results import FrameResult, Results

from .answers import Answers
from .audio import SoundFeed
from .backend import FrameIn, GraphFailed, RunResult
from .books import Books
from .credits import Credits
from .ends import KnownEnds
from .errors import EngineError, NoSuchSession
from .lane import Lane
from .outbox import Outbox
from .pace import Pace
from .parameters import Parameters, Revision
from .profile import Profile
from .run import Run, Waiting
from .run_clock import RunClock
from .wire import VideoFormat

logger = logging.getLogger(__name__)

#: Frames of one run at most; a larger wish is cut to this. 16 frames of 1080p are 400 MB as float32 RGB.
MAX_BATCH: Final = 16


class Session:
    """See the module."""

    def __init__(
        self,
        session_id: str,
        video: VideoFormat,
        parameters: Parameters,
        outbox: Outbox,
        *,
        latency_budget_ms: int = 0,
        max_batch: int = 1,
        sound: SoundFeed | None = None,
        lane: Lane | None = None,
        run_limit_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session_id = session_id
        self.video = video
        self.parameters = parameters
        self.outbox = outbox
        self.books = Books()
        self.opened_at_ms = int(time.time() * 1000)
        self.end_error: EngineError | None = None
        self._budget_ms = latency_budget_ms
        self._max_batch = min(max(max_batch, 1), MAX_BATCH)
        self._clock = clock
        self._frame_bytes = video.frame_bytes
        self._waiting: deque[Waiting] = deque()
        self._running: Run | None = None
        self._credits = Credits(self._max_batch)
        self._answers = Answers(video, parameters, self.books, outbox)
        self._last_frame_id = -1
        self._ended = False
        self._failing = False
        self._closed = False
        self._runs = RunClock(run_limit_s, clock)
        self._profile: Profile | None = None
        self._profiling = asyncio.Lock()  # one at a time
        self._pace = Pace()
        self._alike: tuple[Revision, Hashable] | None = None
        self._sound = sound
        self._lane = lane
        self._ends: KnownEnds | None = None

    # ---- what the client sends

    def opened(self, message: pb.SessionOpened) -> None:
        """Answer the open, with the credits that keep the pipe full."""
        message.shared_memory = self._lane is not None
        if self._sound is not None:
            revision = self.parameters.current
            self._sound.follow(revision.prompt)
            self._ends = KnownEnds(message, revision, self.video, self._sound.format)
        self.outbox.put(pb.ProcessResponse(opened=message, credits=self._credits.left))

    def accept(self, frames: Sequence[Frame]) -> None:
        """Take frames in; those that cannot run are answered at once."""
        if self._closed:  # the call ends, and these were on their way
            self.books.received += len(frames)
            self.books.dropped_other += len(frames)
            return
        refused: list[FrameResult] = []
        credits = 0
        arrived = self._clock()
        for message in frames:
            self.books.received += 1
            frame_id, pts = message.frame_id, message.pts
            if not self._credits.spend():
                # The credit would be given back to somebody who never had it: none is.
                refused.append(self.books.dropped(frame_id, pts, pb.Dropped.REASON_NO_CREDIT))
                continue
            problem = self._problem(frame_id, len(message.planes), message.slot)
            if problem:
                self.books.failed += 1
                refused.append(FrameResult(frame_id, pts, failed=self._answers.fault("bad_frame", problem)))
                self._credits.give(1)
                credits += 1
                continue
            self._last_frame_id = frame_id
            self._waiting.append(Waiting(self._frame(message), arrived, self._due(arrived, message.age_ms)))
        if refused:  # they have no slot, whatever frame they take for their own
            self.outbox.put(Results(refused, credits))

    def _frame(self, message: Frame) -> FrameIn:
        planes = message.planes
        assert not isinstance(planes, tuple), "what was read is one piece"
        if self._lane is None:
            return FrameIn(message.frame_id, message.pts, planes)
        if message.slot:
            planes = self._lane.claim(message.frame_id, message.slot)
        return FrameIn(message.frame_id, message.pts, planes, self._lane.place)

    def release(self, slots: Sequence[int]) -> None:
        """Reply slots that the client is done with."""
        if self._lane is not None:
            self._lane.release(slots)

    def hear(self, blocks: Sequence[pb.AudioBlock]) -> None:
        """Take sound in; it waits for a run."""
        if self._sound is not None:
            self._follow(self._sound)
            self._sound.put((block.pts, block.samples) for block in blocks)

    def set_latency_budget(self, budget_ms: int) -> None:
        """Of frames and sound from here on; frames that wait already keep their due time. 0: none."""
        self._budget_ms = budget_ms
        if self._sound is not None:
            self._sound.set_latency_budget(budget_ms)

    def end_input(self) -> None:
        """No frame follows; the session ends when what it holds is answered."""
        self._ended = True
        if self._sound is not None:
            self._sound.end()
        self._end_if_drained()

    def _problem(self, frame_id: int, size: int, slot: int) -> str:
        """Why the frame cannot run; empty when it can."""
        if slot and self._lane is None:
            return "the frame names a slot, but no shared memory was agreed"
        if slot and self._lane is not None and (text := self._lane.problem(slot)):
            return text
        if slot and size:
            return f"the frame has a slot and {size} bytes of planes; give one"
        if not slot and size != self._frame_bytes:
            return (
                f"planes has {size} bytes; {self.video.width}x{self.video.height} {self.video.pixel_format} "
                f"has {self._frame_bytes}"
            )
        if frame_id <= self._last_frame_id:
            return f"frame_id has to grow; {frame_id} came after {self._last_frame_id}"
        return ""

    # ---- what the scheduler asks

    @property
    def inline(self) -> bool:
        return self.parameters.current.graph.inline

    @property
    def alike(self) -> Hashable | None:
        """Sessions of which this is equal may share a run: same format, parameters and graph. None: it must not."""
        revision = self.parameters.current
        if self._max_batch > 1 or not revision.graph.shares:
            return None
        if self._alike is None or self._alike[0] is not revision:
            self._alike = revision, (self.video, json.dumps(revision.prompt, sort_keys=True))
        return self._alike[1]

    def has_waiting(self) -> bool:
        return bool(self._waiting) or (self._sound is not None and not self._closed and self._sound.ready())

    @property
    def in_flight(self) -> int:
        """Frames that have no result yet."""
        return len(self._waiting) + (len(self._running.frames) if self._running is not None else 0)

    def take(self) -> Run | None:
        """The oldest frames that are still worth it, at most ``max_batch``; None: there are none, or it is closed."""
        if self._closed:
            return None
        run: Run | None = None
        if self._sound is not None:
            self._follow(self._sound)
            if self._sound.is_pace:
                self._answer_without_picture()
        now = self._clock()
        self._give_up_late(now)
        most = max(self._max_batch, self._per_visit(now))
        taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        frames = [waiting.frame for waiting in taken]
        waiting_us = [int((now - waiting.arrived) * 1e6) for waiting in taken]
        sound = self._sound.take() if self._sound is not None and (frames or self._sound.is_pace) else None
        if frames or sound is not None:
            apart = taken if self._max_batch == 1 and len(taken) > 1 else ()
            run = self._running = Run(
                self.parameters.current, frames, waiting_us, self._runs, sound, apart, self._profile
            )
        self._end_if_drained()
        return run

    def _per_visit(self, now: float) -> int:
        """How many frames may run one after another before the first of them is answered."""
        most = self._pace.per_visit(self.parameters.current, now)
        if most == 1 or self._failing or self._max_batch > 1:
            return 1
        # A run that sessions share, or that a buffer of sound belongs to, is one run.
        if self.alike is not None or (self._sound is not None and self._sound.is_wanted):
            return 1
        return most

    def due_at(self) -> float | None:
        """When the next run should be over, on the session's clock; infinite without a budget.

        Frames that cannot be in time any more are answered first, so that they cost neither time nor a turn. None:
        nothing is left to run.
        """
        if self._closed:
            return None
        self._give_up_late(self._clock())
        if self._waiting:
            return self._waiting[0].due
        if self._sound is not None and self._sound.ready():
            return self._due(self._sound.waits_since)
        self._end_if_drained()
        return None

    def _due(self, arrived: float, age_ms: int = 0) -> float:
        return arrived + (self._budget_ms - age_ms) / 1000 if self._budget_ms else math.inf

    def _give_up_late(self, now: float) -> None:
        """Answer frames that would be past the budget after the quickest of the latest runs."""
        if not self._waiting or (self._sound is not None and self._sound.is_pace):
            return
        over_at = now + self._pace.least(self.parameters.current, now)
        late: list[FrameResult] = []
        for waiting in [waiting for waiting in self._waiting if over_at > waiting.due]:
            self._waiting.remove(waiting)
            late.append(self.books.dropped(waiting.frame.frame_id, waiting.frame.pts, pb.Dropped.REASON_LATE))
            late[-1].waiting_us = int((now - waiting.arrived) * 1e6)
        if late:
            self._answer(late, len(late))

    def _follow(self, feed: SoundFeed) -> None:
        """Serve the parameters in force, and say so if their ends are others."""
        revision = self.parameters.current
        feed.follow(revision.prompt)
        if self._ends is not None and (message := self._ends.change(revision)) is not None:
            self.outbox.put(pb.ProcessResponse(opened=message))

    def _answer_without_picture(self) -> None:
        """The graph runs on sound alone: frames need not wait for it."""
        results = [
            self.books.dropped(waiting.frame.frame_id, waiting.frame.pts, pb.Dropped.REASON_NO_OUTPUT)
            for waiting in self._waiting
        ]
        self._waiting.clear()
        self._answer(results, len(results))

    def finish(self, run: Run, result: RunResult) -> None:
        """``run`` gave ``result``."""
        if self._closed:
            return
        self._running = None
        self._failing = False
        self._runs.end(result.graph_us)
        if run.profile is not None:
            run.profile.run(run.waiting_us, result)
        if any(result.pictures):  # text is welcome later too
            self._pace.ran(run.revision, (result.graph_us + result.convert_us) / 1e6, self._clock())
        results: list[FrameResult] = []
        if run.taken:
            self._waiting.extendleft(reversed(run.taken[len(result.apart) :]))
            for waiting, waited, part in zip(run.taken, run.waiting_us, result.apart, strict=False):
                self.parameters.succeeded(run.revision, waiting.frame.pts)
                results += self._answers.of_run(run, part, [waiting.frame], [waited])
        else:
            self.parameters.succeeded(run.revision, run.pts)
            results = self._answers.of_run(run, result, run.frames, run.waiting_us)
        if self._lane is not None:
            self._lane.settle({each.picture.slot for each in results if each.picture is not None})
        self._answer(results, self._credits.of_run(len(results), self._per_visit(self._clock())))
        self._end_if_drained()

    def fail(self, run: Run, error: GraphFailed) -> None:
        """``run`` raised ``error``: its frames have failed, the session goes on."""
        if self._closed:
            return
        if self._lane is not None:
            self._lane.settle()
        self._running = None
        self._runs.end()
        failed = run.frames
        if run.taken:  # the first failed; the others did not run
            failed = run.frames[:1]
            self._waiting.extendleft(reversed(run.taken[1:]))
        if not self._failing:  # one line for any number of frames in a row
            logger.warning("the graph fails: node %s (%s): %s", error.node_id, error.class_type, error.message)
        self._failing = True
        results = self._answers.failed(run, error, failed)
        reverted = self.parameters.failed(run.revision, error)
        if reverted is not None:
            self._answers.tell(self._answers.fault("update_reverted", reverted, error))
        self._answer(results, len(results))
        self._end_if_drained()

    async def profile(self, frames: int, timeout_s: float) -> Profile:
        """Observe the next frames; fewer of them when the time is over, or the session."""
        async with self._profiling:
            self._profile = profile = Profile(frames)
            try:
                async with asyncio.timeout(0 if self._closed else timeout_s):
                    await profile.done.wait()
            except TimeoutError:
                logger.debug("a profile has %d of %d frames", profile.frames, frames)
            finally:
                self._profile = None
            return profile

    # ---- the end

    def close(self, error: EngineError | None = None) -> None:
        """Answer what is left with CLOSED and free the graph. Safe to call twice; the first error stays."""
        if self._closed:
            return
        self._closed = True
        self.end_error = error
        if self._profile is not None:
            self._profile.done.set()
        left = [waiting.frame for waiting in self._waiting]
        if self._running is not None:
            left = [*self._running.frames, *left]
        self._waiting.clear()
        self._running = None
        self._answer([self.books.dropped(frame.frame_id, frame.pts, pb.Dropped.REASON_CLOSED) for frame in left], 0)
        self.outbox.close()
        if self._lane is not None:
            self._lane.close()
        self.parameters.close(NoSuchSession(f"session {self.session_id!r} ended"))

    @property
    def closed(self) -> bool:
        return self._closed

    def _end_if_drained(self) -> None:
        if self._ended and self._running is None and not self.has_waiting():
            self.outbox.close()

    # ---- answers

    def state(self) -> pb.SessionState:
        return self.books.state(
            session_id=self.session_id,
            version=self.parameters.current.version,
            opened_at_ms=self.opened_at_ms,
            frames_in_flight=self.in_flight,
            graph_ms_mean=self._runs.mean_ms,
        )

    def _answer(self, results: list[FrameResult], credits: int) -> None:
        """Frames that were in flight, and the credits to give for them."""
        self._credits.give(credits)
        if self._lane is not None:
            for result in results:
                self._lane.answered(result.frame_id)
        if results:
            self.outbox.put(Results(results, credits))
