"""Node classes in ComfyUI's two shapes, small enough to know by heart. They need torch at most, never ComfyUI."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch

#: How often each class ran, by class name; tests clear it.
runs: Counter[str] = Counter()


class EveryInput:
    """One input of every kind that V1 knows."""

    CATEGORY = "fakes"
    DESCRIPTION = "Takes everything."
    RETURN_TYPES = ("IMAGE", ["a", "b"], "INT")
    RETURN_NAMES = ("picture", "choice")
    OUTPUT_IS_LIST = (False, True, False)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "what to change"}),
                "count": ("INT", {"default": 1, "min": 0, "max": 10, "step": 2}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.1}),
                "text": ("STRING", {"multiline": True, "default": "hello"}),
                "flag": ("BOOLEAN", {"default": False}),
                "mode": (["nearest", "area"],),
                "size": ([64, 128], {"default": 128}),
            },
            "optional": {
                "mask": ("MASK", {"lazy": True}),
                "seed": ("INT", {"forceInput": True, "min": 0, "max": 0xFFFFFFFFFFFFFFFF}),
                "either": ("INT,FLOAT", {"min": 0}),
                "anything": ("*", {}),
                "colour": ("COLOUR_PICKER", {"default": {"r": 1, "bad": float("nan")}}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def run(self, image: torch.Tensor, **values: Any) -> tuple[Any, ...]:
        return image, ["a"], values["count"]


class Fails:
    """Raises while ``fails`` is set; the class attribute is what a test switches."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    error: ClassVar[BaseException | None] = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def run(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        runs["Fails"] += 1
        if Fails.error is not None:
            raise Fails.error
        return (image,)


class StaticColour:
    """A picture that depends on nothing live: it should be computed once."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"level": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0})}}

    def run(self, level: float) -> tuple[torch.Tensor]:
        runs["StaticColour"] += 1
        return (torch.full((1, 8, 8, 3), level),)


class Average:
    """Adds half of each picture; counts its runs."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"one": ("IMAGE",), "other": ("IMAGE",)}}

    def run(self, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor]:
        runs["Average"] += 1
        return (one * 0.5 + other * 0.5,)


class Counting:
    """Keeps a number on ``self``: whoever shares the instance shares the number."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE", "STRING")
    FUNCTION = "run"

    def __init__(self) -> None:
        self.count = 0

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def run(self, image: torch.Tensor) -> tuple[torch.Tensor, str]:
        self.count += 1
        return image, str(self.count)


class AlwaysNan:
    """Says "changed" with one shared NaN, as many packs do: identity would make that a cache hit for ever."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    NAN: ClassVar[float] = float("nan")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return cls.NAN

    def run(self) -> tuple[torch.Tensor]:
        runs["AlwaysNan"] += 1
        return (torch.full((1, 8, 8, 3), float(runs["AlwaysNan"])),)


class WritesInPlace:
    """Darkens the picture that it was handed, in that picture's own memory."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def run(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (image.mul_(0.5),)


class Waits:
    """Reports progress until somebody interrupts it; ``entered`` is called once it runs."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    entered: ClassVar[Any] = None
    step: ClassVar[Any] = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def run(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        Waits.entered()
        while Waits.step():
            pass
        return (image,)


class Gain:
    """Louder by a factor."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"audio": ("AUDIO",), "gain": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0})}}

    def run(self, audio: dict[str, Any], gain: float) -> tuple[dict[str, Any]]:
        runs["Gain"] += 1
        return ({**audio, "waveform": audio["waveform"] * gain},)


class Shorten:
    """Leaves samples out at the end of the sound."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"audio": ("AUDIO",), "samples": ("INT", {"default": 0})}}

    def run(self, audio: dict[str, Any], samples: int) -> tuple[dict[str, Any]]:
        return ({**audio, "waveform": audio["waveform"][..., : -samples or None]},)


class Loudness:
    """The loudest sample, in words and as the level of a picture."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("STRING", "IMAGE")
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"audio": ("AUDIO",)}}

    def run(self, audio: dict[str, Any]) -> tuple[str, torch.Tensor]:
        runs["Loudness"] += 1
        peak = float(audio["waveform"].abs().max())
        return f"{peak:.2f}", torch.full((1, 8, 8, 3), peak)


CLASSES = {
    node.__name__: node
    for node in (
        EveryInput,
        Fails,
        StaticColour,
        Average,
        Counting,
        AlwaysNan,
        WritesInPlace,
        Waits,
        Gain,
        Shorten,
        Loudness,
    )
}
