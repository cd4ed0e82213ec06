"""What goes to and fro while an engine session is open: frames that can be in time, and the engine's answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import av

from proto import engine_pb2 as pb
from proto.frames import Frame
from proto.results import FrameResult, Picture, Results

from ..engine_session import EngineSession
from ..media.planes import frame_of, rows_of
from ..media.settings import MAX_SIDE, MIN_SIDE, can_encode
from .engine_sound import EngineSound
from .estimate import Estimate
from .failures import Failures
from .ledger import Outcome, Rate
from .loading import Loading
from .mailbox import Entry, Mailbox
from .parameters import Parameters
from .vain_deaths import VainDeaths

logger = logging.getLogger(__name__)

_DROP_REASONS = {
    pb.Dropped.REASON_LATE: "late",
    pb.Dropped.REASON_NO_OUTPUT: "no_output",
    pb.Dropped.REASON_NO_CREDIT: "no_credit",
    pb.Dropped.REASON_CLOSED: "closed",
}

#: Pictures in a row that cannot be shown after which the last good parameters come back, as after a graph that fails.
MAX_UNUSABLE = 15


class Traffic:
    """Of one stream, over one session after the other. Opens none and ends none: see `Inference`."""

    def __init__(
        self,
        stream_id: str,
        mailbox: Mailbox,
        parameters: Parameters,
        *,
        budget_s: float,
        sound: EngineSound,
        loading: Loading,
        failures: Failures,
        vain_deaths: VainDeaths,
        on_text: Callable[[pb.TextItem], None],
    ) -> None:
        """It tells `parameters`, `loading`, `failures` and `vain_deaths` what concerns them of the answers."""
        self._asked_s = budget_s
        self.estimate = Estimate()
        self.rate = Rate()  # of frames with an answer that is worth something
        self.ever_processed = False
        #: Of the graph's pictures, when the engine has said it and an output can have it.
        self.picture_size: tuple[int, int] | None = None
        self.gives_pictures = True
        self._stream_id = stream_id
        self._mailbox = mailbox
        self._parameters = parameters
        self._sound = sound
        self._loading = loading
        self._failures = failures
        self._vain_deaths = vain_deaths
        self._on_text = on_text
        self.unusable = asyncio.Event()  # the last so many pictures of the graph cannot be shown
        self._unusable_pictures = 0  # in a row
        self._answered = asyncio.Event()  # frames came back
        self._told_budget_s = budget_s  # what the engine's session counts ages against
        self._heard_at = 0.0  # loop time of the session's last message

    def begin(self, opened: pb.SessionOpened, budget_s: float) -> None:
        """A session is open, with that budget; before `send` and `read`."""
        self._told_budget_s = budget_s
        self._take_ends(opened)
        self.estimate.reset()
        self._heard_at = asyncio.get_running_loop().time()

    @property
    def budget_s(self) -> float:
        """The latency budget, as far as frames may wait for it. May change at any time."""
        return min(self._asked_s, self._mailbox.longest_s)

    @budget_s.setter
    def budget_s(self, asked_s: float) -> None:
        self._asked_s = asked_s

    @property
    def silent_s(self) -> float:
        """How long the engine has had frames and said nothing."""
        return self.estimate.waiting_s(asyncio.get_running_loop().time(), self._heard_at)

    # ---- frames out

    async def send(self, session: EngineSession) -> None:
        """Until cancelled. Raises EngineGone."""
        now = asyncio.get_running_loop().time
        while True:
            await session.credit()
            while not self.estimate.room_for_another(self.budget_s, now()):
                self._answered.clear()
                await self._answered.wait()
            if self.budget_s > self._told_budget_s:  # a shorter one is in the ages
                self._told_budget_s = self.budget_s
                await session.set_latency_budget(self._told_budget_s)
            await session.send(await self._batch(session))

    async def _batch(self, session: EngineSession) -> list[Frame]:
        """The oldest frame that can be in time, and those that wait behind it as far as one message takes them.

        Not in the loop above: when the engine dies a traceback keeps that loop, with it the last entry, the picture
        that it got and the session's shared memory, until the garbage collector comes by.
        """
        now = asyncio.get_running_loop().time
        needed_s = self.estimate.needed_s
        batch: list[Frame] = []
        entry = await self._mailbox.take(needed_s)
        most = min(session.batch, session.credits)
        while True:
            self.estimate.sent(entry.frame_id, now())
            batch.append(session.load(_frame(entry, now(), self._told_budget_s), rows_of(entry.frame)))
            if len(batch) >= most or not self.estimate.room_for_another(self.budget_s, now()):
                return batch
            waiting = self._mailbox.take_waiting(needed_s)
            if waiting is None:
                return batch
            entry = waiting

    # ---- answers in

    async def read(self, session: EngineSession) -> None:
        """Until the engine has ended the session. Raises EngineGone when it is lost."""
        now = asyncio.get_running_loop().time
        async for response in session.responses():
            self._heard_at = now()
            if isinstance(response, Results):
                for result in response.results:
                    self._settle(result)
                self._answered.set()
                continue
            match response.WhichOneof("message"):
                case "audio":
                    self._sound.answer(response.audio)
                case "opened":
                    self._take_ends(response.opened)
                case "text":
                    for item in response.text.items:
                        self._on_text(item)
                case "fault":
                    fault = response.fault
                    self._failures.tell(fault.code, _sentence(fault), node_id=fault.node_id)
                    if fault.code == "update_reverted":
                        self._parameters.reverted()
                case "progress":
                    self.progressed(response.progress)

    def progressed(self, progress: pb.Progress) -> None:
        """The engine works on an update, or on a session that it opens."""
        self._parameters.heard()
        self._loading.heard(progress)

    def _take_ends(self, opened: pb.SessionOpened) -> None:
        """What the workflow takes and gives."""
        size = opened.video_output.width, opened.video_output.height
        self.picture_size = size if can_encode(*size) else None
        self.gives_pictures = opened.HasField("video_output")
        self._sound.opened(opened)

    def _settle(self, result: FrameResult) -> None:
        self.estimate.answered(result, asyncio.get_running_loop().time())
        if result.picture is not None:
            self._show(result, result.picture)
        elif result.failed is not None:
            self._mailbox.resolve(result.frame_id, Outcome.FAILED, result.failed.code)
            self._failures.tell(
                result.failed.code or "node_failed",
                _sentence(result.failed),
                node_id=result.failed.node_id,
                class_type=result.failed.class_type,
            )
        else:
            number = result.dropped.reason if result.dropped is not None else pb.Dropped.REASON_UNSPECIFIED
            reason = _DROP_REASONS.get(number, "dropped")
            self._mailbox.resolve(result.frame_id, Outcome.DROPPED, reason)
            if reason == "no_output" and not self.gives_pictures:
                self.ever_processed = True  # that is all it can say of a frame
                self._worked()

    def _show(self, result: FrameResult, picture: Picture) -> None:
        try:
            frame = _shown(picture)
        except ValueError as exc:
            self._mailbox.resolve(result.frame_id, Outcome.FAILED, "bad_picture")
            self._failures.tell("bad_picture", f"the engine's picture cannot be shown: {exc}")
            self._unusable_pictures += 1
            if self._unusable_pictures >= MAX_UNUSABLE:
                self._unusable_pictures = 0
                self.unusable.set()
            return
        self._unusable_pictures = 0
        self._mailbox.resolve(result.frame_id, Outcome.PROCESSED, "", frame)
        self._parameters.worked(result.version)
        if not self.ever_processed:
            self.ever_processed = True
            logger.info("stream %s: first processed picture", self._stream_id)
        self._worked()

    def _worked(self) -> None:
        self._vain_deaths.worked(asyncio.get_running_loop().time())
        self.rate.tick()


def _frame(entry: Entry, now: float, budget_s: float) -> Frame:
    return Frame(
        frame_id=entry.frame_id,
        pts=entry.pts,
        # Measured against the due time, not the arrival: the last frame of a burst has waited long and is not late.
        age_ms=max(0, round((budget_s - (entry.due - now)) * 1000)),
    )


def _shown(picture: Picture) -> av.VideoFrame:
    """Raises ValueError for what no encoder takes, whatever it would be scaled to: the stream must not end of it."""
    planes, width, height = picture.planes, picture.width, picture.height
    assert not isinstance(planes, tuple), "what was read is one piece"
    picture.planes = b""  # the frame alone holds a slot: the last response stays here until the next comes
    if not can_encode(width, height):
        raise ValueError(f"it is {width}x{height}, both must be even and {MIN_SIDE} to {MAX_SIDE}")
    return frame_of(planes, width, height)


def _sentence(fault: pb.Fault) -> str:
    where = f"node {fault.node_id} ({fault.class_type}): " if fault.node_id else ""
    return f"{where}{fault.message}"
