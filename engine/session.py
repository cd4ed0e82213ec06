"""One session: its frames, credits, counters and parameters, and the responses that wait for its client.

Everything lives on the event loop; what runs on the executor thread gets a ``Run`` that is complete in itself. For
every frame that arrives exactly one result leaves, and at every moment
``received = processed + failed + dropped + in flight``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from proto import engine_pb2 as pb

from .backend import FrameIn, Graph, GraphFailed, RunResult
from .errors import EngineError, NoSuchSession, UpdateReverted
from .graph.workflow import Prompt
from .wire import VideoFormat

logger = logging.getLogger(__name__)

#: Frames a client may have under way beyond one batch: one on its way here, one waiting, one in the graph, one on
#: its way back. Fewer leave the graph idle between frames, more only wait and grow the latency.
PIPELINE_FRAMES: Final = 4

#: Frames of one run at most; a larger wish is cut to this. 16 frames of 1080p are 400 MB as float32 RGB.
MAX_BATCH: Final = 16

#: Responses that may wait for a client that does not read, before its own messages are no longer read either.
OUTBOX_LIMIT: Final = 64

#: Runs over which ``graph_ms_mean`` is taken.
MEAN_RUNS: Final = 64


class Outbox:
    """Responses on their way to the client, in order. One writer takes, the session puts."""

    def __init__(self) -> None:
        self._waiting: deque[pb.ProcessResponse] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False

    def put(self, response: pb.ProcessResponse) -> None:
        """Never blocks; what comes after ``close`` is discarded."""
        if self._closed:
            return
        self._waiting.append(response)
        self._changed.set()
        if len(self._waiting) >= OUTBOX_LIMIT:
            self._room.clear()

    def close(self) -> None:
        """No more follows; the writer still takes what waits."""
        self._closed = True
        self._changed.set()
        self._room.set()

    async def take(self) -> pb.ProcessResponse | None:
        """The next response; None at the end."""
        while not self._waiting:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        response = self._waiting.popleft()
        if len(self._waiting) < OUTBOX_LIMIT:
            self._room.set()
        return response

    async def room(self) -> None:
        """Wait until the client has read enough. Its frames then back up in HTTP/2's window, not in our memory."""
        await self._room.wait()


@dataclass(frozen=True, slots=True)
class Revision:
    """The parameters of a session at one version: immutable, so that a frame's result can name what made it."""

    version: int
    prompt: Prompt
    graph: Graph


@dataclass(slots=True)
class _Waiting:
    """A frame that waits for its run."""

    frame: FrameIn
    arrived: float  # time.monotonic() seconds
    age_ms: int  # when it arrived


@dataclass(frozen=True, slots=True)
class Run:
    """Frames of one run with what they run on."""

    revision: Revision
    frames: Sequence[FrameIn]
    waiting_us: Sequence[int]

    @property
    def inline(self) -> bool:
        return self.revision.graph.inline

    def run(self) -> RunResult:
        return self.revision.graph.run(self.revision.prompt, self.frames)


@dataclass(slots=True)
class Counters:
    """Frames since the session was opened."""

    received: int = 0
    processed: int = 0
    failed: int = 0
    dropped_late: int = 0
    dropped_other: int = 0


@dataclass(slots=True)
class _Effect:
    """Somebody waits for the first frame of a version."""

    version: int
    pts: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Session:
    """See the module. ``discard`` gets each graph that the session has no more use for, and closes it."""

    def __init__(
        self,
        session_id: str,
        video: VideoFormat,
        revision: Revision,
        outbox: Outbox,
        discard: Callable[[Graph], None],
        *,
        latency_budget_ms: int = 0,
        max_batch: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session_id = session_id
        self.video = video
        self.revision = revision
        self.outbox = outbox
        self.counters = Counters()
        self.last_fault: pb.Fault | None = None
        self.opened_at_ms = int(time.time() * 1000)
        self.updating = asyncio.Lock()
        self.end_error: EngineError | None = None
        self._discard = discard
        self._budget_ms = latency_budget_ms
        self._max_batch = min(max(max_batch, 1), MAX_BATCH)
        self._clock = clock
        self._frame_bytes = video.frame_bytes
        self._waiting: deque[_Waiting] = deque()
        self._running: Run | None = None
        self._credits = 0
        self._last_frame_id = -1
        self._ended = False
        self._closed = False
        self._graph_ms: deque[float] = deque(maxlen=MEAN_RUNS)
        # What held before the last update, until a frame has been made with the update.
        self._fallback: Revision | None = None
        self._proven = True  # by the warm-up
        self._effects: list[_Effect] = []

    # ---- what the client sends

    def opened(self, message: pb.SessionOpened) -> None:
        """Answer the open, with the credits that keep the pipe full."""
        self._credits = PIPELINE_FRAMES + self._max_batch
        self.outbox.put(pb.ProcessResponse(opened=message, credits=self._credits))

    def accept(self, frames: Sequence[pb.Frame]) -> None:
        """Take frames in; those that cannot run are answered at once."""
        refused: list[pb.FrameResult] = []
        credits = 0
        arrived = self._clock()
        for message in frames:
            self.counters.received += 1
            frame_id, pts = message.frame_id, message.pts
            if self._credits == 0:
                # The credit would be given back to somebody who never had it: none is.
                refused.append(self._dropped(frame_id, pts, pb.Dropped.REASON_NO_CREDIT))
                continue
            self._credits -= 1
            planes = message.planes
            problem = self._problem(frame_id, planes, message.slot)
            if problem is not None:
                self.counters.failed += 1
                refused.append(pb.FrameResult(frame_id=frame_id, pts=pts, failed=problem))
                self._credits += 1
                credits += 1
                continue
            self._last_frame_id = frame_id
            self._waiting.append(_Waiting(FrameIn(frame_id, pts, planes), arrived, message.age_ms))
        self._answer(refused, credits)

    def end_input(self) -> None:
        """No frame follows; the session ends when what it holds is answered."""
        self._ended = True
        self._end_if_drained()

    def _problem(self, frame_id: int, planes: bytes, slot: int) -> pb.Fault | None:
        if slot:
            return self._fault("bad_frame", "the frame names a slot, but no shared memory was agreed")
        if len(planes) != self._frame_bytes:
            text = (
                f"planes has {len(planes)} bytes; {self.video.width}x{self.video.height} {self.video.pixel_format} "
                f"has {self._frame_bytes}"
            )
            return self._fault("bad_frame", text)
        if frame_id <= self._last_frame_id:
            return self._fault("bad_frame", f"frame_id has to grow; {frame_id} came after {self._last_frame_id}")
        return None

    # ---- what the scheduler asks

    @property
    def inline(self) -> bool:
        return self.revision.graph.inline

    def has_waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def in_flight(self) -> int:
        """Frames that have no result yet."""
        return len(self._waiting) + (len(self._running.frames) if self._running is not None else 0)

    def take(self) -> Run | None:
        """The oldest frames that are still worth it, at most ``max_batch``; None: there are none."""
        now = self._clock()
        late: list[pb.FrameResult] = []
        frames: list[FrameIn] = []
        waiting_us: list[int] = []
        while self._waiting and len(frames) < self._max_batch:
            waiting = self._waiting.popleft()
            waited_us = int((now - waiting.arrived) * 1e6)
            if self._budget_ms and waiting.age_ms + waited_us / 1000 > self._budget_ms:
                late.append(self._dropped(waiting.frame.frame_id, waiting.frame.pts, pb.Dropped.REASON_LATE))
                late[-1].waiting_us = waited_us
                continue
            frames.append(waiting.frame)
            waiting_us.append(waited_us)
        if frames:
            self._running = Run(self.revision, frames, waiting_us)
        if late:
            self._credits += len(late)
            self._answer(late, len(late))
        self._end_if_drained()
        return self._running

    def finish(self, run: Run, result: RunResult) -> None:
        """``run`` gave ``result``."""
        if self._closed:
            return
        self._running = None
        self._graph_ms.append(result.graph_us / 1000)
        version = run.revision.version
        results = []
        for index, frame in enumerate(run.frames):
            picture = result.pictures[index] if index < len(result.pictures) else None
            if picture is None:
                message = self._dropped(frame.frame_id, frame.pts, pb.Dropped.REASON_NO_OUTPUT)
            else:
                self.counters.processed += 1
                message = pb.FrameResult(frame_id=frame.frame_id, pts=frame.pts)
                message.picture.planes = picture.planes
                message.picture.width = picture.width
                message.picture.height = picture.height
            message.version = version
            message.graph_us = result.graph_us
            message.convert_us = result.convert_us
            message.waiting_us = run.waiting_us[index]
            results.append(message)
        if run.revision is self.revision:
            self._prove()
        self._took_effect(run)
        if result.texts:
            items = [pb.TextItem(pts=run.frames[0].pts, node_id=node, text=text) for node, text in result.texts]
            self.outbox.put(pb.ProcessResponse(text=pb.TextBatch(items=items)))
        self._credits += len(results)
        self._answer(results, len(results))
        self._end_if_drained()

    def fail(self, run: Run, error: GraphFailed) -> None:
        """``run`` raised ``error``: its frames have failed, the session goes on."""
        if self._closed:
            return
        self._running = None
        fault = self._fault(
            error.code, error.message, error.node_id, error.class_type, error.exception, run.revision.version
        )
        self.counters.failed += len(run.frames)
        results = [
            pb.FrameResult(
                frame_id=frame.frame_id, pts=frame.pts, failed=fault, version=run.revision.version, waiting_us=waited
            )
            for frame, waited in zip(run.frames, run.waiting_us, strict=True)
        ]
        self.outbox.put(pb.ProcessResponse(fault=fault))
        if run.revision is self.revision:
            if self._fallback is not None:
                self._revert(fault)
            else:
                self._proven = False  # nothing may fall back to parameters that fail themselves
        self._credits += len(results)
        self._answer(results, len(results))
        self._end_if_drained()

    # ---- parameters

    def adopt(self, prompt: Prompt, graph: Graph) -> int:
        """Parameters for every frame that is not running yet; returns their version. They were checked before."""
        if self._proven:
            self._fallback, self._proven = self.revision, False
        elif self.revision.graph is not graph and (
            self._fallback is None or self.revision.graph is not self._fallback.graph
        ):
            self._discard(self.revision.graph)  # it never made a picture, so nothing falls back to it
        self.revision = Revision(self.revision.version + 1, prompt, graph)
        return self.revision.version

    async def effective_pts(self, version: int, timeout_s: float) -> int | None:
        """pts of the first frame made with ``version``; None when none came in time.

        Raises UpdateReverted when that frame failed and the parameters before it hold again.
        """
        effect = _Effect(version)
        self._effects.append(effect)
        try:
            return await asyncio.wait_for(effect.pts, timeout_s)
        except TimeoutError:
            return None
        finally:
            if effect in self._effects:
                self._effects.remove(effect)

    def _took_effect(self, run: Run) -> None:
        for effect in self._effects:
            if effect.version <= run.revision.version and not effect.pts.done():
                effect.pts.set_result(run.frames[0].pts)

    def _prove(self) -> None:
        self._proven = True
        fallback, self._fallback = self._fallback, None
        if fallback is not None and fallback.graph is not self.revision.graph:
            self._discard(fallback.graph)

    def _revert(self, fault: pb.Fault) -> None:
        assert self._fallback is not None
        bad, good = self.revision, self._fallback
        text = f"version {bad.version} failed on its first frames ({fault.message}); the last good parameters hold"
        # A number of its own: versions only grow, or a client could not tell the two apart.
        self.revision = Revision(bad.version + 1, good.prompt, good.graph)
        self._fallback, self._proven = None, True
        if bad.graph is not good.graph:
            self._discard(bad.graph)
        logger.warning("version %d of the parameters was reverted: %s", bad.version, fault.message)
        reverted = self._fault(
            "update_reverted", text, fault.node_id, fault.class_type, fault.exception, self.revision.version
        )
        self.outbox.put(pb.ProcessResponse(fault=reverted))
        for effect in self._effects:
            if not effect.pts.done():
                effect.pts.set_exception(UpdateReverted(text))

    # ---- the end

    def close(self, error: EngineError | None = None) -> None:
        """Answer what is left with CLOSED and free the graph. Safe to call twice; the first error stays."""
        if self._closed:
            return
        self._closed = True
        self.end_error = error
        left = [waiting.frame for waiting in self._waiting]
        if self._running is not None:
            left = [*self._running.frames, *left]
        self._waiting.clear()
        self._running = None
        self._answer([self._dropped(frame.frame_id, frame.pts, pb.Dropped.REASON_CLOSED) for frame in left], 0)
        self.outbox.close()
        for effect in self._effects:
            if not effect.pts.done():
                effect.pts.set_exception(NoSuchSession(f"session {self.session_id!r} ended"))
        self._discard(self.revision.graph)
        if self._fallback is not None and self._fallback.graph is not self.revision.graph:
            self._discard(self._fallback.graph)
        self._fallback = None

    @property
    def closed(self) -> bool:
        return self._closed

    def _end_if_drained(self) -> None:
        if self._ended and self.in_flight == 0:
            self.outbox.close()

    # ---- answers

    def state(self) -> pb.SessionState:
        counters = self.counters
        return pb.SessionState(
            session_id=self.session_id,
            version=self.revision.version,
            opened_at_ms=self.opened_at_ms,
            frames_received=counters.received,
            frames_processed=counters.processed,
            frames_failed=counters.failed,
            frames_dropped_late=counters.dropped_late,
            frames_dropped_other=counters.dropped_other,
            frames_in_flight=self.in_flight,
            last_fault=self.last_fault,
            graph_ms_mean=sum(self._graph_ms) / len(self._graph_ms) if self._graph_ms else 0.0,
        )

    def _answer(self, results: Sequence[pb.FrameResult], credits: int) -> None:
        if results:
            self.outbox.put(pb.ProcessResponse(results=pb.ResultBatch(results=results), credits=credits))

    def _dropped(self, frame_id: int, pts: int, reason: pb.Dropped.Reason) -> pb.FrameResult:
        if reason == pb.Dropped.REASON_LATE:
            self.counters.dropped_late += 1
        else:
            self.counters.dropped_other += 1
        return pb.FrameResult(frame_id=frame_id, pts=pts, dropped=pb.Dropped(reason=reason))

    def _fault(
        self,
        code: str,
        message: str,
        node_id: str = "",
        class_type: str = "",
        exception: str = "",
        version: int | None = None,
    ) -> pb.Fault:
        self.last_fault = pb.Fault(
            code=code,
            message=message,
            node_id=node_id,
            class_type=class_type,
            exception=exception,
            version=self.revision.version if version is None else version,
        )
        return self.last_fault
