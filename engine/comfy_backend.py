"""The graph layer of a real ComfyUI behind ``Backend``. Importing this module imports torch: executor thread only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Final, TypeVar

import torch

import cext

from .audio import Sound, buffer_samples
from .backend import (
    Aside,
    Building,
    ComfyInfo,
    FrameIn,
    GraphFailed,
    LoadFailed,
    NodeObserver,
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
from .graph.device import DeviceInfo, is_lost
from .graph.device_pixels import ON_CPU, Placement, placement
from .graph.policy import Policy
from .graph.rows import rows_apart
from .graph.runner import NodeFailed, Runner, TickInput, TickInterrupted, TickOutput
from .graph.schema import NodeDefinition
from .graph.side_loading import Shelf
from .graph.sound import NotSound, silence, to_samples, to_waveform
from .graph.static import is_loader, static_nodes
from .graph.tensors import Converter, NotAnImage
from .graph.texts import Texts
from .graph.workflow import Finding, Prompt, Severity, Workflow, WorkflowError
from .wire import VideoFormat

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: torch 2.4 has it under this name only.
OutOfMemory: Final = torch.cuda.OutOfMemoryError

#: Mid grey: a generated frame that no node finds degenerate (black has no edges, no colour, and logarithms of 0).
WARM_UP_LEVEL: Final = 128

#: What LoadAudioTensor gives before the first buffer: silence at the rate that streams have.
SILENCE_RATE: Final = 48_000
SILENT_BUFFER: Final = -1  # its number

#: More threads do not make filters of one frame faster; other sessions and programs can use the cores.
MAX_THREADS: Final = 8


def default_threads() -> int:
    """CPU threads of torch when nobody says: the cores of this process less one, from 1 to MAX_THREADS.

    The core left out is for gRPC and the shim. With all of them, OpenMP's threads spin at barriers for the one that
    is not scheduled: a small 512x512 graph on two busy cores takes 27 to 32 ms with two threads and 2.6 with one.
    """
    return min(max(len(os.sched_getaffinity(0)) - 1, 1), MAX_THREADS)


def _is_out_of_memory(exc: NodeFailed) -> bool:
    return exc.exception.endswith("MemoryError")


@contextlib.contextmanager
def _graph_failures() -> Iterator[None]:
    """What the graph layer raises, as sessions know it."""
    try:
        yield
    except NodeFailed as exc:
        code = "out_of_memory" if _is_out_of_memory(exc) else "node_failed"
        raise GraphFailed(
            exc.message, code=code, node_id=exc.node_id, class_type=exc.class_type, exception=exc.exception
        ) from exc
    except TickInterrupted as exc:
        raise GraphFailed(str(exc), code="interrupted") from exc
    except OutOfMemory as exc:  # of the conversion; a node's is a NodeFailed
        message = f"the pictures could not be converted: {exc}"
        raise GraphFailed(message, code="out_of_memory", exception="torch.OutOfMemoryError") from exc
    except NotAnImage as exc:
        raise GraphFailed(str(exc), code="bad_output") from exc
    except WorkflowError as exc:
        raise GraphFailed(str(exc), code="workflow_refused") from exc


class ComfyGraph:
    """One session's runner and converter. free_memory: of the device, where pictures found none."""

    inline: Final = False

    def __init__(
        self,
        runner: Runner,
        prompt: Prompt,
        video: VideoFormat,
        place: Placement = ON_CPU,
        share: bool = False,
        free_memory: Callable[[], None] = lambda: None,
    ) -> None:
        runner.load(prompt)
        self._runner = runner
        self._free_memory = free_memory
        self._prompt = prompt
        self._video = video
        colour = cext.Colour(matrix=video.matrix, full_range=video.full_range)
        self._converter = Converter(video.pixel_format, colour, place)
        self._workflow = Workflow(prompt)
        self._share = share and rows_apart(prompt)  # of the classes; an update keeps them
        self._texts = Texts(prompt)
        self._waveform = silence(buffer_samples(prompt, SILENCE_RATE), 2)
        self._sample_rate = SILENCE_RATE
        self._buffers = 0
        self.picture_size = (0, 0)

    @property
    def runner(self) -> str:
        return self._runner.name

    @property
    def runner_reason(self) -> str:
        return self._runner.reason

    @property
    def shares(self) -> bool:
        return self._share and self._runner.name == "plan"

    def run(self, prompt: Prompt, frames: Sequence[FrameIn], sound: Sound | None = None) -> RunResult:
        began = time.perf_counter_ns()
        with _graph_failures():
            if prompt is not self._prompt:
                self._runner.update(prompt)
                self._prompt = prompt
                self._workflow = Workflow(prompt)
                self._texts.follow(prompt)
            tick = self._tick_input(frames, sound)
            ready = time.perf_counter_ns()
            try:
                output = self._runner.tick(tick)
            except NodeFailed as exc:
                if tick.images is None or not self._converter.may_return or _is_out_of_memory(exc):
                    raise
                # Nodes that go through NumPy, or join the picture with one on the CPU, take no IMAGE on the device.
                undo = self._converter.return_to_cpu()
                try:
                    tick = replace(tick, images=self._images(frames))
                    output = self._runner.tick(tick)
                except BaseException:
                    undo()  # the session fails as it would have, and converts where it did: that was not the cause
                    raise
                logger.info("pixels of this graph are converted on the CPU from here on: %s", exc)
            # The graph has let go of its input now; only then may its memory be used again.
            del tick
            ran = time.perf_counter_ns()
            images = None if output.images is None else output.images[: len(frames)]
            places = [frame.place for frame in frames]
            given = [] if images is None else self._converted(lambda: self._converter.to_planes(images, places))
        pictures: list[PictureOut | None] = [
            PictureOut(item.planes, item.width, item.height, item.slot) for item in given
        ]
        if given:
            self.picture_size = given[-1].width, given[-1].height
        # A picture that was made of no frame stands for all of them.
        rest = None
        if given and not self._workflow.image_inputs and len(frames) > len(given):
            # A copy, because a slot is one frame's and is free with its answer.
            rest = PictureOut(bytes(given[-1].planes), given[-1].width, given[-1].height)
        pictures += [rest] * (len(frames) - len(pictures))
        heard, problem = self._sound_of(output, sound)
        done = time.perf_counter_ns()
        return RunResult(
            pictures,
            self._texts.of(output.texts),
            heard,
            problem,
            graph_us=(ran - ready) // 1000,
            convert_us=(ready - began + done - ran) // 1000,
            convert_in_us=(ready - began) // 1000,
        )

    def observe(self, observer: NodeObserver | None) -> None:
        self._runner.observer = observer

    def prepare(self, node_id: str) -> bool:
        """Run one node that depends on nothing live. False: the runner runs whole ticks only."""
        prepare = getattr(self._runner, "prepare", None)
        if prepare is None:
            return False
        with _graph_failures():
            prepare(node_id)
        return True

    def _tick_input(self, frames: Sequence[FrameIn], sound: Sound | None) -> TickInput:
        images = self._images(frames) if frames and self._workflow.image_inputs else None
        if sound is not None:
            self._buffers += 1
            self._waveform = to_waveform(sound.samples, sound.format.channels)
            self._sample_rate = sound.format.sample_rate
        return TickInput(
            images,
            frames[0].frame_id if frames else self._buffers,
            self._waveform,
            self._sample_rate,
            self._buffers or SILENT_BUFFER,
            self._workflow.takes_mask,
        )

    def _images(self, frames: Sequence[FrameIn]) -> torch.Tensor:
        planes = [frame.planes for frame in frames]
        return self._converted(lambda: self._converter.to_images(planes, self._video.width, self._video.height))

    def _converted(self, convert: Callable[[], T]) -> T:
        """A conversion; where the device has no memory for it, once more by the CPU, and by that from here on.

        Raises OutOfMemory if that is not to be, or found none either: the device is freed then for the next frame.
        """
        try:
            return convert()
        except OutOfMemory as exc:
            if not self._converter.may_return:
                self._free_memory()
                raise
            logger.info("pixels of this graph are converted on the CPU from here on: %s", exc)
        self._converter.return_to_cpu()
        return self._converted(convert)

    def _sound_of(self, output: TickOutput, sound: Sound | None) -> tuple[Sound | None, str]:
        """The graph's sound in the place of the one it took. Without one, what came is the last buffer once more."""
        if sound is None or output.audio is None:
            return None, ""
        format = sound.format
        try:
            samples = to_samples(
                output.audio,
                output.sample_rate,
                count=len(sound.samples) // format.frame_bytes,
                channels=format.channels,
                rate=format.sample_rate,
            )
        except NotSound as exc:
            return None, str(exc)
        return Sound(sound.pts, samples, format), ""

    def begin(self) -> None:
        """The warm-up is over: what it said was to nobody."""
        self._texts.forget_times()

    def close(self) -> None:
        self._runner.close()


class ComfyBackend:
    """See ``Backend``. Made on the executor thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._host: ComfyHost | None = None
        self._placement = ON_CPU

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
        page_locked = Placement(page_locked=host.torch_device.type == "cuda")
        by_cpu = Converter(placement=page_locked).to_images
        self._placement = placement(settings.convert, host.torch_device, by_cpu)
        return ComfyInfo(host.version, len(host.definitions), host.failed_packs)

    def device(self) -> DeviceInfo:
        return self._loaded.device

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
        settings = self._settings
        runner = self._loaded.new_runner(settings.runner)
        graph = ComfyGraph(runner, prompt, video, self._placement, settings.share_batches, self._loaded.free_memory)
        frames = self._settings.warm_up_frames
        planes = bytes([WARM_UP_LEVEL]) * video.frame_bytes
        shelf: Shelf = {}
        try:
            yield None
            yield from self._prepare(graph, prompt, shelf, report)
            for number in range(frames):
                report(Stage("warming", f"frame {number + 1} of {frames}", number + 1, frames))
                with self._step(report, shelf):
                    graph.run(prompt, [FrameIn(number, 0, planes)])
                yield None
            graph.begin()
        except BaseException:
            graph.close()
            raise
        finally:
            shelf.clear()  # of models that no node took; the traceback of a failure holds this frame
        settle_heap()
        report(Stage("ready"))
        logger.info("graph of %d nodes is warm after %.2f s", len(prompt), time.monotonic() - began)
        return graph

    def _prepare(
        self, graph: ComfyGraph, prompt: Prompt, shelf: Shelf, report: Report
    ) -> Generator[Aside | None, None, None]:
        """Load the models, aside where that is safe, then run what depends on nothing live, a node at a time: a stall
        of the running graphs is one node long."""
        definitions = self._loaded.definitions
        checked, _ = self._loaded.checked(prompt)  # with the values that the nodes will get
        nodes = static_nodes(prompt, definitions)
        models = [node_id for node_id in nodes if is_loader(prompt[node_id], definitions)]
        for number, node_id in enumerate(models, 1):
            class_type = prompt[node_id]["class_type"]
            report(Stage("loading", f"{class_type}, model {number} of {len(models)}", number, len(models), node_id))
            load = self._loaded.side_loading.call_for(class_type, checked[node_id]["inputs"], shelf)
            if load is not None:
                with contextlib.suppress(Exception):  # the node fails once more where it is known by name
                    yield Aside(load)
        for node_id in nodes:
            with self._step(report, shelf):
                prepared = graph.prepare(node_id)
            if not prepared:  # this runner runs whole ticks only
                break
            yield None

    @contextlib.contextmanager
    def _step(self, report: Report, shelf: Shelf) -> Iterator[None]:
        """What nodes say of their progress is this build's, and so are the models that they find loaded."""
        self._loaded.on_progress = lambda done, total, node: report(Stage("warming", "", done, total, node))
        try:
            with self._loaded.side_loading.taking_from(shelf):
                yield
        finally:
            self._loaded.on_progress = None

    def interrupt(self) -> None:
        if self._host is not None:
            self._host.interrupt()

    def device_is_lost(self) -> bool:
        return is_lost(self._loaded.torch_device)

    @property
    def _loaded(self) -> ComfyHost:
        assert self._host is not None, "load() comes first"
        return self._host
