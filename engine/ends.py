"""What a session's workflow takes and gives, as SessionOpened says it."""

from __future__ import annotations

from proto import engine_pb2 as pb

from . import wire
from .audio import AudioFormat, buffer_samples
from .errors import InvalidRequest, Violation
from .graph.workflow import Workflow
from .parameters import Revision
from .wire import VideoFormat

#: Of a session without pictures.
NO_VIDEO = VideoFormat(0, 0)


def require_ends(workflow: Workflow, video: VideoFormat) -> None:
    """Raises InvalidRequest if the workflow is about pictures and the session has none."""
    if video.width:
        return
    nodes = (*workflow.image_inputs, *workflow.image_outputs)
    if nodes or not workflow.audio_inputs:
        text = "the workflow needs pictures, and the session is without; give OpenSession.video"
        raise InvalidRequest(text, [Violation("video", text, "missing")])


def opened_message(
    session_id: str, revision: Revision, video: VideoFormat, audio: AudioFormat | None
) -> pb.SessionOpened:
    """With the picture's size as the warm-up gave it; 0 where there was none."""
    graph, workflow = revision.graph, Workflow(revision.prompt)
    message = pb.SessionOpened(
        session_id=session_id,
        version=revision.version,
        text_output=bool(workflow.text_outputs),
        runner=graph.runner,
        runner_reason=graph.runner_reason,
        audio_input=audio is not None and bool(workflow.audio_inputs),
    )
    if workflow.image_outputs and video.width:
        width, height = graph.picture_size
        message.video_output.CopyFrom(wire.video_message(video, width=width, height=height))
    if workflow.audio_outputs and message.audio_input and audio is not None:
        message.audio_output.CopyFrom(
            pb.AudioFormat(
                sample_rate=audio.sample_rate,
                channels=audio.channels,
                time_base=pb.Rational(numerator=audio.time_base.numerator, denominator=audio.time_base.denominator),
                block_samples=buffer_samples(revision.prompt, audio.sample_rate),
            )
        )
    return message


class KnownEnds:
    """What the client of a session knows of its workflow's ends, after ``message`` told it those of ``revision``."""

    def __init__(self, message: pb.SessionOpened, revision: Revision, video: VideoFormat, audio: AudioFormat) -> None:
        self._message = message
        self._revision = revision
        self._video = video
        self._audio = audio

    def change(self, revision: Revision) -> pb.SessionOpened | None:
        """What to tell it now that ``revision`` is in force; None: it knows."""
        if revision is self._revision:
            return None
        self._revision = revision
        message = opened_message(self._message.session_id, revision, self._video, self._audio)
        if _same(self._message, message):
            return None
        message.shared_memory = self._message.shared_memory
        self._message = message
        return message


def _same(one: pb.SessionOpened, other: pb.SessionOpened) -> bool:
    """Whether a client has to know of the change; a size that became known is in every picture."""
    return (
        one.HasField("video_output") == other.HasField("video_output")
        and one.audio_output == other.audio_output
        and (one.audio_input, one.text_output) == (other.audio_input, other.text_output)
    )
