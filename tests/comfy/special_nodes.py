"""Nodes that use what only ComfyUI gives: expansion, lazy inputs, coroutines, blockers, V3.

To be imported once it is loaded.
"""

import asyncio
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder

from tests.fakes.nodes import runs


class Expands:
    """Becomes two nodes of its own: the average of the picture and a fixed level."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",), "level": ("FLOAT", {"default": 0.5})}}

    def run(self, image: torch.Tensor, level: float) -> dict[str, Any]:
        runs["Expands"] += 1
        builder = GraphBuilder()
        still = builder.node("StaticColour", level=level)
        mixed = builder.node("Average", one=image, other=still.out(0))
        return {"result": (mixed.out(0),), "expand": builder.finalize()}


class NeverAsks:
    """Has a lazy input and no check_lazy_status: it never gets it."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",), "other": ("IMAGE", {"lazy": True})}}

    def run(self, image: torch.Tensor, other: torch.Tensor | None) -> tuple[torch.Tensor]:
        return (image if other is None else other,)


class Lazy:
    """Asks for ``second`` only when ``use_second`` is set."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "first": ("IMAGE", {"lazy": True}),
                "second": ("IMAGE", {"lazy": True}),
                "use_second": ("BOOLEAN", {"default": False}),
            }
        }

    def check_lazy_status(self, first: Any, second: Any, use_second: bool) -> list[str]:
        return ["second"] if use_second else ["first"]

    def run(self, first: Any, second: Any, use_second: bool) -> tuple[Any]:
        runs["Lazy"] += 1
        return (second if use_second else first,)


class Async:
    """Lets go of the event loop in the middle."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    async def run(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        runs["Async"] += 1
        await asyncio.sleep(0)
        return (image + 0.125,)


class Blocks:
    """Gives nothing for a bright picture."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def run(self, image: torch.Tensor) -> tuple[Any]:
        return (ExecutionBlocker(None) if image.max() > 0.9 else image,)


class Modern(io.ComfyNode):
    """A V3 node whose fingerprint is one of its inputs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Modern",
            category="fakes",
            inputs=[
                io.Image.Input("image"),
                io.Int.Input("mark", default=0),
                io.Combo.Input("mode", ["keep", "double"]),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> Any:
        return values.get("mark")

    @classmethod
    def execute(cls, image: torch.Tensor, mark: int, mode: str) -> io.NodeOutput:
        runs["Modern"] += 1
        return io.NodeOutput(image if mode == "keep" else image * 2)


class Changed:
    """Depends on nothing and says "changed" every time, with a NaN of its own."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return float("nan")

    def run(self) -> tuple[torch.Tensor]:
        runs["Changed"] += 1
        return (torch.full((1, 8, 8, 3), 0.625),)


CLASSES = {node.__name__: node for node in (Expands, Lazy, NeverAsks, Async, Blocks, Modern, Changed)}
