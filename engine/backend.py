"""What sessions need from the graph layer, and the one graph that needs none of it.

``Graph`` and ``Backend`` are the seam at which tests put stubs. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from proto.fields import Bytes

from .audio import Sound
from .config import Settings
from .graph.device import DeviceInfo, cpu_device
from .graph.schema import NodeDefinition
from .graph.workflow import Finding, Prompt, Workflow
from .utf8 import utf8
from .wire import VideoFormat

#: The sentence that every refusal without a ComfyUI ends with.
HOW_TO_GET_COMFYUI: Final = "run make comfyui, or set COMFYUI_DIR to your ComfyUI"

Overrides = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Stage:
    """How far something slow has come. ``name`` is one of ``Progress.Stage`` in lower case; total 0: unknown."""

    name: str
    message: str = ""
    done: int = 0
    total: int = 0
    node_id: str = ""


Report = Callable[[Stage], None]


@dataclass(frozen=True, slots=True)
class Aside:
    """Work of a build that is safe beside running graphs, so that a load of seconds stops nobody's frames."""

    call: Callable[[], None]


class LoadFailed(Exception):
    """ComfyUI did not load; the text is a whole sentence for the operator."""


#: Gives a reply slot and its writable memory of that many bytes, or None: the picture travels in the message.
Place = Callable[[int], tuple[int, memoryview] | None]


def nowhere(size: int) -> None:
    """The ``Place`` of a session without shared memory."""


@dataclass(frozen=True, slots=True)
class FrameIn:
    """One frame on its way into a graph. ``planes`` as ``VideoFormat`` says, without row padding; read-only.
    ``place``: where pictures of its run may be written."""

    frame_id: int
    pts: int
    planes: Bytes
    place: Place = nowhere


@dataclass(frozen=True, slots=True)
class PictureOut:
    """One picture out of a graph, in the session's pixel format and colour; the size is the graph's, even.
    ``slot``: the reply slot that holds ``planes``; 0: none does."""

    planes: Bytes
    width: int
    height: int
    slot: int = 0


@dataclass(frozen=True, slots=True)
class RunResult:
    """What one run of a graph gave. ``pictures`` has one entry per frame, None where the graph gave none."""

    pictures: Sequence[PictureOut | None]
    texts: Sequence[tuple[str, str]] = ()  # (node id, text), of the whole run
    sound: Sound | None = None  # of the same time as the sound that the run took
    sound_problem: str = ""  # a sentence, when the graph's sound could not be used
    graph_us: int = 0
    convert_us: int = 0  # both ways
    convert_in_us: int = 0  # of it, the way in
    apart: Sequence[RunResult] = ()  # one for each frame, where frames ran one after another; maybe not for the last


class GraphFailed(Exception):
    """A node raised, or the device ran out of memory. The graph stays usable; the next frame may succeed.

    What a node says is text from here on (``utf8``): it goes into messages and logs.
    """

    def __init__(
        self, message: str, *, code: str = "node_failed", node_id: str = "", class_type: str = "", exception: str = ""
    ) -> None:
        self.message = utf8(message)
        super().__init__(self.message)
        self.code = code
        self.node_id = utf8(node_id)
        self.class_type = utf8(class_type)
        self.exception = utf8(exception)


#: Node id, class and seconds, on the executor thread.
NodeObserver = Callable[[str, str, float], None]


class Graph(Protocol):
    """One session's runner with its pixel conversion. Called on the executor thread, unless ``inline``."""

    @property
    def runner(self) -> str:
        """ "executor", "plan", "pass_through"."""

    @property
    def runner_reason(self) -> str:
        """Why that one."""

    @property
    def inline(self) -> bool:
        """Runs in microseconds and without torch: it need not go through the executor thread."""

    @property
    def shares(self) -> bool:
        """A batch may have frames of several sessions: it keeps nothing of them, and each comes out as if alone."""

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of the last picture that it gave; 0, 0 before the first."""

    def run(self, prompt: Prompt, frames: Sequence[FrameIn], sound: Sound | None = None) -> RunResult:
        """One run. A prompt other than the last one's has been accepted by ``Backend`` and applies from here on.

        sound: the next buffer; None while it is not complete. frames: none where sound is the pace.
        Raises GraphFailed; every frame of the run has failed then.
        """

    def observe(self, observer: NodeObserver | None) -> None:
        """Who learns of every node that runs from here on; None: nobody. A graph may have no nodes to tell of."""

    def close(self) -> None:
        """Free everything; no other call follows."""


#: A graph in the making: each ``next`` does one step on the executor thread, and live frames run between the steps.
#: An ``Aside`` is done on the loader thread before the next step, which is thrown what it raised.
Building = Generator[Aside | None, None, Graph]


@dataclass(frozen=True, slots=True)
class ComfyInfo:
    """Of the loaded ComfyUI."""

    version: str = ""
    node_classes: int = 0
    failed_packs: Sequence[str] = ()


class Backend(Protocol):
    """The graph layer as a whole. Called on the executor thread, except ``device`` and ``interrupt`` (any thread)."""

    def load(self) -> ComfyInfo:
        """Import torch and ComfyUI. Any exception means: failed, and its text says why."""

    def device(self) -> DeviceInfo:
        """Of the moment; cheap."""

    def definitions(self) -> Sequence[NodeDefinition]:
        """Of every class that is known."""

    def check(self, workflow: Workflow) -> list[Finding]:
        """Everything that is wrong with the workflow on this ComfyUI; an empty list means that it runs."""

    def override(self, prompt: Prompt, overrides: Overrides) -> Prompt:
        """A new prompt with all overrides applied and checked. Raises OverrideError; ``prompt`` stays as it is."""

    def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Building:
        """Load and warm a graph of its own, step by step.

        A step raises GraphFailed or WorkflowError; nothing is left behind then, nor after ``close``.
        """

    def interrupt(self) -> None:
        """Ask the run that is under way to end soon."""

    def device_is_lost(self) -> bool:
        """Whether the device answers nothing any more, to this process. Waits for what runs there."""


@dataclass(slots=True)
class PassThrough:
    """The picture as it came, byte by byte. Needs neither torch nor ComfyUI."""

    width: int
    height: int
    runner: str = "pass_through"
    runner_reason: str = "the workflow hands its live input to its live output"
    inline: bool = field(default=True, init=False)
    shares: bool = field(default=False, init=False)  # there is nothing to gain

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.width, self.height

    def run(self, prompt: Prompt, frames: Sequence[FrameIn], sound: Sound | None = None) -> RunResult:
        return RunResult([self._given(frame) for frame in frames])

    def _given(self, frame: FrameIn) -> PictureOut:
        place = frame.place(len(frame.planes))
        if place is None:
            return PictureOut(frame.planes, self.width, self.height)
        slot, memory = place
        memory[:] = frame.planes  # copy 2 of 2 of the shared-memory lane
        return PictureOut(memory, self.width, self.height, slot)

    def observe(self, observer: NodeObserver | None) -> None:
        """No node runs."""

    def close(self) -> None:
        """Nothing is held."""


class LazyBackend:
    """Imports the real backend when the executor thread calls ``load``: torch takes seconds, in which the engine
    answers already. Before and during that only ``device`` and ``interrupt`` are called."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._real: Backend | None = None

    def load(self) -> ComfyInfo:
        from .comfy_backend import ComfyBackend

        real = ComfyBackend(self._settings)
        info = real.load()
        self._real = real
        return info

    def device(self) -> DeviceInfo:
        return self._real.device() if self._real is not None else cpu_device()

    def definitions(self) -> Sequence[NodeDefinition]:
        return self._loaded.definitions()

    def check(self, workflow: Workflow) -> list[Finding]:
        return self._loaded.check(workflow)

    def override(self, prompt: Prompt, overrides: Overrides) -> Prompt:
        return self._loaded.override(prompt, overrides)

    def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Building:
        return self._loaded.build(prompt, video, report)

    def interrupt(self) -> None:
        if self._real is not None:
            self._real.interrupt()

    def device_is_lost(self) -> bool:
        return self._loaded.device_is_lost()

    @property
    def _loaded(self) -> Backend:
        assert self._real is not None, "load() comes first"
        return self._real


def backend_of(settings: Settings) -> Backend | None:
    """The backend that the settings ask for; None without a ComfyUI."""
    return None if settings.comfyui_dir is None else LazyBackend(settings)
