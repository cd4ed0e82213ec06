"""What runs a prompt, tick by tick: one interface, and the runner that needs no ComfyUI.

A tick is one run of the graph over one batch of frames. Runners belong to one session and to the thread that created
them; only ``interrupt`` may be called from another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from .workflow import Prompt, WorkflowError, finding, is_pass_through

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TickInput:
    """What the live inputs give during one tick.

    images: [B, H, W, 3] float32, 0..1, private to this tick: nodes may write into it. None: no picture.
    frame_id: of the first frame of the batch, increasing within the session.
    audio: [channels, samples] float32, -1..1, as the waveform of ComfyUI's AUDIO without its batch; None: no audio.
    sample_rate: of ``audio``, samples per second and channel; 0 without audio.
    audio_number: another one for another ``audio``; what depends on sound alone runs when it changes. 0: always.
    takes_mask: whether a node of the prompt takes the mask that comes with the picture.
    """

    images: torch.Tensor | None
    frame_id: int = 0
    audio: torch.Tensor | None = None
    sample_rate: int = 0
    audio_number: int = 0
    takes_mask: bool = True


@dataclass(frozen=True)
class TickOutput:
    """What the live outputs took during one tick.

    images: [B, H, W, C] of the first picture output in the order of the workflow; None: the graph gave no picture.
    texts: (node_id, text) in the order of the workflow; a text that did not change is not sent again.
    audio: [channels, samples] of the first audio output, with its sample rate.
    """

    images: torch.Tensor | None
    texts: list[tuple[str, str]] = field(default_factory=list)
    audio: torch.Tensor | None = None
    sample_rate: int = 0


class NodeFailed(Exception):
    """A node raised. The tick gave nothing; the next one tries the node again, what ran before it stays cached.

    ``exception`` is the class of the Python exception, e.g. ``RuntimeError`` or ``torch.OutOfMemoryError``.
    """

    def __init__(self, node_id: str, class_type: str, exception: str, message: str) -> None:
        super().__init__(f"node {node_id} ({class_type}) raised {exception}: {message}")
        self.node_id = node_id
        self.class_type = class_type
        self.exception = exception
        self.message = message


class TickInterrupted(Exception):
    """``interrupt`` ended the tick before it had an output. The runner can tick again."""


#: Node id, class and the seconds that it ran.
NodeObserver: TypeAlias = Callable[[str, str, float], None]


class Runner(Protocol):
    """Runs one session's prompt. All calls but ``interrupt`` come from the thread that made the runner.

    observer: learns of every node that runs, where the runner calls nodes itself; None: nobody does.
    """

    observer: NodeObserver | None

    @property
    def name(self) -> str:
        """Which runner it is: ``plan``, ``executor``, ``pass_through``; a prompt or a tick may change it."""

    @property
    def reason(self) -> str:
        """Why that one, in part of a sentence."""

    def load(self, prompt: Prompt) -> None:
        """Take a prompt as ``workflow.parse`` makes them; nothing of an earlier one is kept. Raises WorkflowError."""

    def update(self, prompt: Prompt) -> None:
        """Take an altered prompt from the next tick on. What does not depend on the change stays cached."""

    def tick(self, tick: TickInput) -> TickOutput:
        """Run the prompt once. Raises NodeFailed or TickInterrupted; the runner stays usable."""

    def interrupt(self) -> None:
        """End the running tick as soon as a node looks; nothing happens between ticks. Any thread may call."""

    def close(self) -> None:
        """Let go of every cached tensor and model. May be called twice."""


class PassThroughRunner:
    """Hands the pictures on. Runs without ComfyUI, and only workflows for which that is the whole meaning."""

    name: Final = "pass_through"
    reason: Final = "the workflow hands its live input to its live output"

    def __init__(self) -> None:
        self.observer: NodeObserver | None = None

    def load(self, prompt: Prompt) -> None:
        if not is_pass_through(prompt):
            message = "only pass-through runs without ComfyUI"
            remedy = "run `make comfyui` or set COMFYUI_DIR, then restart the engine"
            raise WorkflowError([finding("no_comfyui", message, remedy)])

    def update(self, prompt: Prompt) -> None:
        self.load(prompt)

    def tick(self, tick: TickInput) -> TickOutput:
        return TickOutput(images=tick.images, audio=tick.audio, sample_rate=tick.sample_rate)

    def interrupt(self) -> None:
        """A tick does nothing that could be interrupted."""

    def close(self) -> None:
        """Holds nothing."""
