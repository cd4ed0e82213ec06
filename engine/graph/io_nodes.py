"""The live ends of a graph, as ComfyUI nodes: ComfyStream's names, so that its workflows run unchanged.

The nodes hold nothing. What a tick brings and takes lies in an ``Exchange``, found through a context variable that is
set around the tick; two sessions never see each other's even when their ticks interleave.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch

from .runner import TickInput
from .schema import NodeDefinition, definition_of
from .sound_nodes import AudioLevel

_sequence = itertools.count(1)
_current: ContextVar[Exchange] = ContextVar("headrace_exchange")


@dataclass
class Exchange:
    """What one tick brings to the live inputs and what the live outputs took, by node id.

    ``sequence`` differs for every tick of the process; a repeated frame_id is still a fresh frame.
    """

    tick: TickInput
    sequence: int = field(default_factory=lambda: next(_sequence))
    images: dict[str, torch.Tensor] = field(default_factory=dict)
    audio: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def exchange_of(tick: TickInput) -> Iterator[Exchange]:
    """The exchange that live nodes see inside the ``with`` block, and in the tasks started there."""
    exchange = Exchange(tick)
    token = _current.set(exchange)
    try:
        yield exchange
    finally:
        _current.reset(token)


def _exchange() -> Exchange:
    try:
        return _current.get()
    except LookupError:
        raise RuntimeError("live nodes run inside a session of the engine only") from None


class _Live:
    """A node that is dirty in every tick: a live input has a fresh frame, a live output owes one."""

    CATEGORY = "headrace"

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        exchange = _current.get(None)
        # A shared NaN object would be a cache hit for ever: identity wins when keys are compared.
        return exchange.sequence if exchange else float("nan")


class LoadTensor(_Live):
    """The live picture and, like LoadImage for a file without alpha, an empty mask."""

    DESCRIPTION = "The live picture."
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        images = _exchange().tick.images
        if images is None:
            raise RuntimeError("there is no live picture; the session was opened without video")
        shape = images.shape[:3]
        # Fresh memory for a mask costs 0.3 ms at 720p, as much as a conversion; hardly any graph takes it.
        return images, images.new_zeros(shape) if _exchange().tick.takes_mask else images.new_zeros(()).expand(shape)


class PrimaryInputLoadImage(LoadTensor):
    """ComfyStream's way to say which of several LoadImage nodes is live."""


class SaveTensor(_Live):
    DESCRIPTION = "Sends the picture to the viewers."
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}, "hidden": {"unique_id": "UNIQUE_ID"}}

    def save(self, images: torch.Tensor, unique_id: str) -> tuple[()]:
        """images: [B, H, W, C], or one picture [H, W, C]."""
        if not isinstance(images, torch.Tensor) or images.ndim not in (3, 4):
            shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise ValueError(f"the picture is {shape}, IMAGE is (batch, height, width, channels)")
        _exchange().images[unique_id] = images if images.ndim == 4 else images[None]
        return ()


class _LiveSound(_Live):
    """Dirty when a tick brings another buffer of sound: there may be many frames between two."""

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        exchange = _current.get(None)
        return (exchange.tick.audio_number or exchange.sequence) if exchange else float("nan")


class LoadAudioTensor(_LiveSound):
    DESCRIPTION = "The live sound, a buffer at a time."
    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        # ComfyStream's inputs. The session cuts the buffers before a tick begins, so that no tick ever waits.
        size = {"default": 500.0, "min": 10.0, "max": 10_000.0, "tooltip": "milliseconds of sound for one run"}
        timeout = {"default": 3.0, "min": 0.1, "max": 30.0, "step": 0.1, "tooltip": "not used: nothing waits"}
        return {"optional": {"buffer_size": ("FLOAT", size), "timeout_seconds": ("FLOAT", timeout)}}

    def load(self, buffer_size: float = 500.0, timeout_seconds: float = 3.0) -> tuple[dict[str, Any]]:
        tick = _exchange().tick
        if tick.audio is None:
            raise RuntimeError("there is no live sound; the session was opened without audio")
        return ({"waveform": tick.audio[None], "sample_rate": tick.sample_rate},)


class SaveAudioTensor(_LiveSound):
    DESCRIPTION = "Sends the sound to the viewers."
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"audio": ("AUDIO",)}, "hidden": {"unique_id": "UNIQUE_ID"}}

    def save(self, audio: dict[str, Any], unique_id: str) -> tuple[()]:
        """audio: ``{"waveform": [1, channels, samples], "sample_rate"}``, ComfyUI's AUDIO."""
        waveform, sample_rate = audio["waveform"], audio["sample_rate"]
        if waveform.ndim != 3 or waveform.shape[0] != 1:
            raise ValueError(f"the waveform is {tuple(waveform.shape)}, one block is (1, channels, samples)")
        _exchange().audio[unique_id] = (waveform[0], int(sample_rate))
        return ()


class SaveTextTensor:
    """Sends text when it changes: text that depends on nothing live is sent once."""

    DESCRIPTION = "Sends the text to the data channel."
    CATEGORY = "headrace"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"data": ("STRING", {"forceInput": True})},
            # ComfyStream's input; channels carry lines, whole, whatever their length.
            "optional": {"remove_linebreaks": ("BOOLEAN", {"default": True})},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def save(self, data: str, unique_id: str, remove_linebreaks: bool = True) -> tuple[()]:
        text = str(data)
        _exchange().texts[unique_id] = " ".join(text.split("\n")).strip() if remove_linebreaks else text
        return ()


NODE_CLASSES: Final[dict[str, type]] = {
    node.__name__: node
    for node in (
        LoadTensor,
        SaveTensor,
        LoadAudioTensor,
        SaveAudioTensor,
        SaveTextTensor,
        PrimaryInputLoadImage,
        AudioLevel,
    )
}

#: What is known without any ComfyUI.
DEFINITIONS: Final[dict[str, NodeDefinition]] = {name: definition_of(node) for name, node in NODE_CLASSES.items()}
