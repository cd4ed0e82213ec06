"""A graph layer without torch whose graphs take and give sound and text: the sound is turned upside down."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.audio import Sound
from engine.backend import FrameIn, PictureOut, Report, RunResult
from engine.graph.schema import NodeDefinition, OutputDefinition
from engine.graph.workflow import Finding, Prompt, Workflow
from engine.wire import VideoFormat, plane_bytes
from tests.fakes.engine_backend import StubBackend


def workflow(*, buffer_ms: float = 100.0, picture: bool = True, sound: bool = True, text: str = "") -> dict[str, Any]:
    """``picture``: through and unchanged, else none at all. ``text``: said in every run."""
    nodes: dict[str, Any] = {"1": {"class_type": "LoadAudioTensor", "inputs": {"buffer_size": buffer_ms}}}
    if sound:
        nodes["2"] = {"class_type": "SaveAudioTensor", "inputs": {"audio": ["1", 0]}}
    if picture:
        nodes["3"] = {"class_type": "LoadTensor", "inputs": {}}
        nodes["4"] = {"class_type": "SaveTensor", "inputs": {"images": ["3", 0]}}
    if text:
        nodes["5"] = {"class_type": "SaveTextTensor", "inputs": {"data": text}}
    return nodes


class SoundGraph:
    runner = "stub"
    runner_reason = "a test"
    inline = False
    shares = False

    def __init__(self, backend: SoundBackend, video: VideoFormat) -> None:
        self.backend = backend
        self.video = video
        scale = backend.scale
        self.picture_size = (video.width * scale, video.height * scale)

    def run(self, prompt: Prompt, frames: Sequence[FrameIn], sound: Sound | None = None) -> RunResult:
        self.backend.runs += 1
        if sound is not None:
            self.backend.heard.append(sound)
        assert self.backend.gate.wait(60), "the test forgot to open the gate"
        workflow = Workflow(prompt)
        out = None
        if sound is not None and workflow.audio_outputs:
            samples = -np.frombuffer(sound.samples, np.int16)
            out = Sound(sound.pts, samples.astype(np.int16).tobytes(), sound.format)
        texts = [(node, prompt[node]["inputs"]["data"]) for node in workflow.text_outputs]
        width, height = self.picture_size
        pictures: list[PictureOut | None] = [None] * len(frames)
        if workflow.image_outputs and self.backend.scale == 1 and workflow.image_inputs:
            pictures = [PictureOut(frame.planes, width, height) for frame in frames]
        elif workflow.image_outputs:
            grey = bytes([60]) * plane_bytes(width, height, self.video.pixel_format)
            pictures = [PictureOut(grey, width, height) for _ in frames]
        return RunResult(pictures, texts, out)

    def close(self) -> None:
        pass


class SoundBackend(StubBackend):
    """``scale``: of the pictures. ``heard``: every buffer. ``gate`` holds up every run while it is clear."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale
        self.heard: list[Sound] = []
        self.runs = 0
        self.may_build = threading.Event()
        self.may_build.set()

    def definitions(self) -> Sequence[NodeDefinition]:
        return [
            NodeDefinition(
                name, name, "live", "", (), (OutputDefinition("OUT", "*"),), name.startswith("Save"), "stub"
            )
            for name in ("LoadTensor", "SaveTensor", "LoadAudioTensor", "SaveAudioTensor", "SaveTextTensor")
        ]

    def check(self, workflow: Workflow) -> list[Finding]:
        return []

    def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Any:
        assert self.may_build.wait(60), "the test forgot to let it build"
        yield None
        return SoundGraph(self, video)


def as_json(**options: Any) -> str:
    return json.dumps(workflow(**options))
