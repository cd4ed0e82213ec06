"""What the client of a session is told of its frames: their results, what else a run gave, and what went wrong."""

from __future__ import annotations

from collections.abc import Sequence

from proto import engine_pb2 as pb
from proto.results import FrameResult, Picture

from .backend import FrameIn, GraphFailed, PictureOut, RunResult
from .books import Books
from .outbox import Outbox
from .parameters import Parameters
from .run import Run
from .utf8 import utf8
from .wire import VideoFormat


class Answers:
    """Makes the results, counted in the books, for the session to send; all else it sends at once."""

    def __init__(self, video: VideoFormat, parameters: Parameters, books: Books, outbox: Outbox) -> None:
        self._video = video
        self._parameters = parameters
        self._books = books
        self._outbox = outbox
        self._deaf_spell = False  # the graph's sound cannot be used, and the client knows

    def of_run(
        self, run: Run, result: RunResult, frames: Sequence[FrameIn], waiting_us: Sequence[int]
    ) -> list[FrameResult]:
        """One for each of these frames of the run, which gave ``result``; text and sound go out here."""
        results = []
        for index, frame in enumerate(frames):
            picture = result.pictures[index] if index < len(result.pictures) else None
            if picture is None:
                message = self._books.dropped(frame.frame_id, frame.pts, pb.Dropped.REASON_NO_OUTPUT)
            else:
                self._books.processed += 1
                message = FrameResult(frame.frame_id, frame.pts, picture=_shown(picture))
            message.version = run.revision.version
            message.graph_us = result.graph_us
            message.convert_us = result.convert_us
            message.waiting_us = waiting_us[index]
            results.append(message)
        if result.texts:
            at = frames[0].pts if frames else self._picture_pts(run)
            items = [pb.TextItem(pts=at, node_id=utf8(node), text=utf8(text)) for node, text in result.texts]
            self._outbox.put(pb.ProcessResponse(text=pb.TextBatch(items=items)))
        if result.sound is not None:
            block = pb.AudioBlock(pts=result.sound.pts, samples=result.sound.samples)
            self._outbox.put(pb.ProcessResponse(audio=pb.AudioBatch(blocks=[block])))
        if result.sound_problem and not self._deaf_spell:
            self.tell(self.fault("bad_sound", result.sound_problem))
        self._deaf_spell = bool(result.sound_problem)
        return results

    def _picture_pts(self, run: Run) -> int:
        """The moment of a run for sound alone as pictures tell it, where there are some."""
        if run.sound is None or not self._video.width:
            return run.pts
        return round(run.pts * run.sound.format.time_base / self._video.time_base)

    def failed(self, run: Run, error: GraphFailed, frames: Sequence[FrameIn]) -> list[FrameResult]:
        """One for each of these frames of the run, which raised ``error``."""
        self._books.failed += len(frames)
        fault = self.fault(error.code, error.message, error, run.revision.version)
        self.tell(fault)
        return [
            FrameResult(frame.frame_id, frame.pts, failed=fault, version=run.revision.version, waiting_us=waited)
            for frame, waited in zip(frames, run.waiting_us, strict=False)
        ]

    def fault(
        self, code: str, message: str, error: GraphFailed | None = None, version: int | None = None
    ) -> pb.Fault:
        """Noted in the books. ``error``: which node is to blame; ``version``: if not of the parameters in force."""
        fault = pb.Fault(code=code, message=utf8(message))
        fault.version = self._parameters.current.version if version is None else version
        if error is not None:
            fault.node_id, fault.class_type, fault.exception = error.node_id, error.class_type, error.exception
        return self._books.fault(fault)

    def tell(self, fault: pb.Fault) -> None:
        """Of what is no frame's."""
        self._outbox.put(pb.ProcessResponse(fault=fault))


def _shown(picture: PictureOut) -> Picture:
    """As the client gets it: by its slot, or with its planes."""
    planes = b"" if picture.slot else picture.planes
    return Picture(planes, picture.slot, picture.width, picture.height)
