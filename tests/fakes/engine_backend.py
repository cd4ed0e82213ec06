"""A graph layer without torch: one node class that paints a level, fails or waits when the test says so."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from engine.backend import (
    Aside,
    Building,
    ComfyInfo,
    DeviceInfo,
    FrameIn,
    GraphFailed,
    NodeObserver,
    PictureOut,
    Report,
    RunResult,
    Stage,
)
from engine.graph import overrides as graph_overrides
from engine.graph.schema import InputDefinition, NodeDefinition, OutputDefinition
from engine.graph.workflow import Finding, Prompt, Severity, Workflow
from engine.wire import VideoFormat, plane_bytes

#: Frames after which "fail_later" fails.
FUSE = 5

IMAGE = OutputDefinition("IMAGE", "IMAGE")
DEFINITIONS = {
    definition.class_type: definition
    for definition in (
        NodeDefinition("LoadTensor", "Load Tensor", "live", "", (), (IMAGE,), False, "stub"),
        NodeDefinition(
            "SaveTensor", "Save Tensor", "live", "", (InputDefinition("images", "IMAGE", True),), (), True, "stub"
        ),
        NodeDefinition(
            "Level",
            "Level",
            "stub",
            "Paints one grey level.",
            (
                InputDefinition("image", "IMAGE", True),
                InputDefinition("level", "INT", True, "7", 0, 255, 1),
                InputDefinition("mode", "STRING", False, '"paint"'),
            ),
            (IMAGE,),
            False,
            "stub",
        ),
    )
}


def workflow(level: int = 7, mode: str = "paint", **inputs: Any) -> str:
    """``mode``: "paint"; "fail", "fail_later" and "bug" raise; "huge" fits into no memory; "nothing" and "half" (the
    width) say it; "text" adds a text."""
    return json.dumps(
        {
            "1": {"class_type": "LoadTensor", "inputs": {}},
            "5": {
                "class_type": "Level",
                "inputs": {"image": ["1", 0], "level": level, "mode": mode} | inputs,
                "_meta": {"title": "The level"},
            },
            "9": {"class_type": "SaveTensor", "inputs": {"images": ["5", 0]}},
        }
    )


def painted(frame: FrameIn, planes: bytes, width: int, height: int) -> PictureOut:
    """A picture where the session wants it."""
    place = frame.place(len(planes))
    if place is None:
        return PictureOut(planes, width, height)
    slot, memory = place
    memory[:] = planes
    return PictureOut(memory, width, height, slot)


class StubGraph:
    runner = "stub"
    runner_reason = "a test"
    inline = False
    picture_size = (0, 0)

    def __init__(self, backend: StubBackend, video: VideoFormat) -> None:
        self.backend = backend
        self.video = video
        self.closed = False
        self.observer: NodeObserver | None = None
        self.shares = backend.shares
        self.fuse = FUSE
        self.runs: list[tuple[int, ...]] = []

    def run(self, prompt: Prompt, frames: Sequence[FrameIn]) -> RunResult:
        assert not self.closed
        assert threading.current_thread().name == "executor"
        self.backend.log.append((self, tuple(frame.frame_id for frame in frames)))
        self.backend.running.set()
        assert self.backend.gate.wait(60), "the test forgot to open the gate"
        time.sleep(self.backend.run_s)
        inputs = prompt["5"]["inputs"]
        if self.observer is not None:
            self.observer("5", "Level", 0.0015)
        mode, level = inputs.get("mode", "paint"), inputs["level"]
        self.backend.first_made.setdefault(level, frames[0].frame_id)
        self.fuse = self.fuse - 1 if mode == "fail_later" else FUSE
        if mode == "fail" or self.fuse == 0:
            raise GraphFailed("told to", node_id="5", class_type="Level", exception="RuntimeError")
        if mode == "bug":
            raise KeyError("/secret/path")
        if mode == "nothing":
            return RunResult([None for _ in frames])
        width = self.video.width // 2 if mode == "half" else self.video.width
        size = plane_bytes(width, self.video.height, self.video.pixel_format)
        texts = [("5", f"level {level}")] if mode == "text" else []
        pictures = [painted(frame, bytes([level]) * size, width, self.video.height) for frame in frames]
        graph_us = 1500 + round(self.backend.run_s * 1e6)
        return RunResult(pictures, texts, graph_us=graph_us, convert_us=200, convert_in_us=150)

    def observe(self, observer: NodeObserver | None) -> None:
        self.observer = observer

    def close(self) -> None:
        assert threading.current_thread().name == "executor"
        self.closed = True


class StubBackend:
    """``gate`` holds up every run while it is clear; ``may_load`` holds up the load; ``log`` has every run.

    ``load_s`` and ``load_aside`` make a build begin with a load, ``warm_up_steps`` of ``step_s`` follow; ``run_s`` is
    the time of one run. Seconds. ``graph_class``: what it builds.
    """

    graph_class: type[StubGraph] = StubGraph

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.may_load = threading.Event()
        self.may_load.set()
        self.running = threading.Event()
        self.load_error: Exception | None = None
        self.load_s = 0.0
        self.load_aside = True
        self.warm_up_steps = 2
        self.step_s = 0.0
        self.run_s = 0.0
        self.shares = False  # what its graphs say
        self.lost = False  # the device, from the next failure on
        self.graphs: list[StubGraph] = []
        self.first_made: dict[int, int] = {}  # level to the first frame that got it
        self.log: list[tuple[StubGraph, tuple[int, ...]]] = []

    def load(self) -> ComfyInfo:
        assert self.may_load.wait(60), "the test forgot to let it load"
        if self.load_error is not None:
            raise self.load_error
        return ComfyInfo("0.0.1", len(DEFINITIONS), ["broken_pack"])

    def device(self) -> DeviceInfo:
        return DeviceInfo("cpu", "stub")

    def device_is_lost(self) -> bool:
        assert threading.current_thread().name == "executor"
        return self.lost

    def definitions(self) -> Sequence[NodeDefinition]:
        return list(DEFINITIONS.values())

    def check(self, workflow: Workflow) -> list[Finding]:
        return [
            Finding(
                Severity.ERROR,
                "unknown_node",
                f"there is no node class {node['class_type']!r}",
                "install its pack",
                f"nodes.{node_id}",
                node_id,
                node["class_type"],
            )
            for node_id, node in workflow.prompt.items()
            if node["class_type"] not in DEFINITIONS
        ]

    def override(self, prompt: Prompt, overrides: Mapping[str, Mapping[str, Any]]) -> Prompt:
        return graph_overrides.apply(prompt, overrides, DEFINITIONS)

    def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Building:
        graph = self.graph_class(self, video)
        try:
            report(Stage("loading", "model 1 of 1", 1, 1, "5"))
            if self.load_s and self.load_aside:
                yield Aside(lambda: time.sleep(self.load_s))
            elif self.load_s:
                time.sleep(self.load_s)
            for number in range(self.warm_up_steps):
                yield None
                report(Stage("warming", "", number + 1, self.warm_up_steps, "5"))
                time.sleep(self.step_s)
            if prompt["5"]["inputs"].get("mode") == "fail":
                raise GraphFailed("told to", node_id="5", class_type="Level", exception="RuntimeError")
            if prompt["5"]["inputs"].get("mode") == "huge":
                raise GraphFailed("no memory left", code="out_of_memory", node_id="5", class_type="Level")
        except BaseException:
            graph.close()
            raise
        self.graphs.append(graph)
        report(Stage("ready"))
        return graph

    def interrupt(self) -> None:
        self.gate.set()
