"""The graph layer of a real ComfyUI behind ``Backend``. Importing this module imports torch: executor thread only."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Final

import torch

import cext

from .backend import (
    Building,
    ComfyInfo,
    DeviceInfo,
    FrameIn,
    GraphFailed,
    LoadFailed,
    Overrides,
    PictureOut,
    Report,
    RunResult,
    Stage,
)
from .config import Settings
from .executor import settle_heap
from .graph import overrides as graph_overrides
from .graph.comfy import ComfyHost, ComfyUnavailable
from .graph.executor_runner import ExecutorRunner
from .graph.policy import Policy
from .graph.runner import NodeFailed, TickInput, TickInterrupted
from .graph.schema import NodeDefinition
from .graph.static import is_loader, static_nodes
from .graph.tensors import Converter, NotAnImage
from .graph.workflow import Finding, Prompt, Severity, Workflow, WorkflowError
from .wire import VideoFormat

logger = logging.getLogger(__name__)

#: Mid grey: a generated frame that no node finds degenerate (black has no edges, no colour, and logarithms of 0).
WARM_UP_LEVEL: Final = 128

#: More threads do not make filters of one frame faster; other sessions and programs can use the cores.
MAX_THREADS: Final = 8


def default_threads() -> int:
    """CPU threads of torch when nobody says: the cores of this process less one, from 1 to MAX_THREADS.

    The core left out is for gRPC and the shim. With all of them, OpenMP's threads spin at barriers for the one that
    is not scheduled: a small 512x512 graph on two busy cores takes 27 to 32 ms with two threads and 2.6 with one.
    """
    return min(max(len(os.sched_getaffinity(0)) - 1, 1), MAX_THREADS)


@contextlib.contextmanager
def _graph_failures() -> Iterator[None]:
    """What the graph layer raises, as sessions know it."""
    try:
        yield
    except NodeFailed as exc:
        code = "out_of_memory" if exc.exception.endswith("OutOfMemoryError") else "node_failed"
        raise GraphFailed(
            exc.message, code=code, node_id=exc.node_id, class_type=exc.class_type, exception=exc.exception
        ) from exc
    except TickInterrupted as exc:
        raise GraphFailed(str(exc), code="interrupted") from exc
    except NotAnImage as exc:
        raise GraphFailed(str(exc), code="bad_output") from exc
    except WorkflowError as exc:
        raise GraphFailed(str(exc), code="workflow_refused") from exc


class ComfyGraph:
    """One session's runner and converter."""

    inline: Final = False

    def __init__(self, runner: ExecutorRunner, prompt: Prompt, video: VideoFormat) -> None:
        runner.load(prompt)
        self.runner: str = runner.name
        self.runner_reason = runner.reason
        self._runner = runner
        self._prompt = prompt
        self._video = video
        colour = cext.Colour(matrix=video.matrix, full_range=video.full_range)
        self._converter = Converter(video.pixel_format, colour)

    def run(self, prompt: Prompt, frames: Sequence[FrameIn]) -> RunResult:
        began = time.perf_counter_ns()
        with _graph_failures():
            if prompt is not self._prompt:
                self._runner.update(prompt)
                self._prompt = prompt
            images = self._converter.to_images(
                [frame.planes for frame in frames], self._video.width, self._video.height
            )
            ready = time.perf_counter_ns()
            output = self._runner.tick(TickInput(images, frames[0].frame_id))
            # The graph has let go of its input now; only then may its memory be used again.
            del images
            ran = time.perf_counter_ns()
            given = [] if output.images is None else self._converter.to_planes(output.images[: len(frames)])
        pictures: list[PictureOut | None] = [PictureOut(item.planes, item.width, item.height) for item in given]
        pictures += [None] * (len(frames) - len(pictures))
        done = time.perf_counter_ns()
        return RunResult(
            pictures,
            output.texts,
            graph_us=(ran - ready) // 1000,
            convert_us=(ready - began + done - ran) // 1000,
        )

    def prepare(self, node_id: str) -> bool:
        """Run one node that depends on nothing live. False: the runner runs whole ticks only."""
        prepare = getattr(self._runner, "prepare", None)
        if prepare is None:
            return False
        with _graph_failures():
            prepare(node_id)
        return True

    def close(self) -> None:
        self._runner.close()


class ComfyBackend:
    """See ``Backend``. Made on the executor thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._host: ComfyHost | None = None

    def load(self) -> ComfyInfo:
        settings = self._settings
        assert settings.comfyui_dir is not None
        torch.set_num_threads(settings.torch_threads or default_threads())
        try:
            host = ComfyHost.load(
                settings.comfyui_dir,
                custom_nodes=settings.custom_nodes,
                device=settings.device,
                loop=asyncio.get_event_loop(),
            )
        except ComfyUnavailable as exc:
            raise LoadFailed(str(exc)) from exc
        host.policy = Policy(settings.allow_nodes, settings.deny_nodes)
        self._host = host
        return ComfyInfo(host.version, len(host.definitions), host.failed_packs)

    def device(self) -> DeviceInfo:
        return DeviceInfo(*dataclasses.astuple(self._loaded.device))

    def definitions(self) -> Sequence[NodeDefinition]:
        return list(self._loaded.definitions.values())

    def check(self, workflow: Workflow) -> list[Finding]:
        self._loaded.look_for_models({node["class_type"] for node in workflow.prompt.values()})
        return self._loaded.validate(workflow.prompt)

    def override(self, prompt: Prompt, overrides: Overrides) -> Prompt:
        self._loaded.look_for_models({prompt[node_id]["class_type"] for node_id in overrides if node_id in prompt})
        changed = graph_overrides.apply(prompt, overrides, self._loaded.definitions)
        findings = self._loaded.validate(changed)
        if any(finding.severity is Severity.ERROR for finding in findings):
            raise WorkflowError(findings)
        return changed

    def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Building:
        began = time.monotonic()
        report(Stage("planning"))
        graph = ComfyGraph(self._loaded.new_runner(), prompt, video)
        frames = self._settings.warm_up_frames
        planes = bytes([WARM_UP_LEVEL]) * video.frame_bytes
        try:
            yield None
            yield from self._prepare(graph, prompt, report)
            for number in range(frames):
                report(Stage("warming", f"frame {number + 1} of {frames}", number + 1, frames))
                with self._progress(report):
                    graph.run(prompt, [FrameIn(number, 0, planes)])
                yield None
        except BaseException:
            graph.close()
            raise
        settle_heap()
        report(Stage("ready"))
        logger.info("graph of %d nodes is warm after %.2f s", len(prompt), time.monotonic() - began)
        return graph

    def _prepare(self, graph: ComfyGraph, prompt: Prompt, report: Report) -> Building:
        """Run what depends on nothing live, a node at a time: a stall of the running graphs is one node long."""
        definitions = self._loaded.definitions
        nodes = static_nodes(prompt, definitions)
        models = [node_id for node_id in nodes if is_loader(prompt[node_id], definitions)]
        for node_id in nodes:
            class_type = prompt[node_id]["class_type"]
            if node_id in models:
                number = models.index(node_id) + 1
                text = f"model {number} of {len(models)}: {class_type}"
                report(Stage("loading", text, number, len(models), node_id))
            else:
                report(Stage("warming", class_type, node_id=node_id))
            with self._progress(report):
                prepared = graph.prepare(node_id)
            yield None
            if not prepared:  # this runner runs whole ticks only
                break
        return graph

    @contextlib.contextmanager
    def _progress(self, report: Report) -> Iterator[None]:
        """What nodes say of their progress is this build's, until the next step."""
        self._loaded.on_progress = lambda done, total, node: report(Stage("warming", "", done, total, node))
        try:
            yield
        finally:
            self._loaded.on_progress = None

    def interrupt(self) -> None:
        if self._host is not None:
            self._host.interrupt()

    @property
    def _loaded(self) -> ComfyHost:
        assert self._host is not None, "load() comes first"
        return self._host
