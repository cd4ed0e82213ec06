"""Nodes over plain numbers for the differential tests: every way in which a node may take, give, fail or wait.

To be imported once ComfyUI is loaded. ``mark`` tells nodes apart: ComfyUI runs two that are alike once.
"""

import asyncio
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context


class AnyType(str):
    """Equal to every type, the old way."""

    def __ne__(self, other: object) -> bool:
        return False


ANY = AnyType("*")
#: What the sinks took in this tick, by node id; tests clear it.
caught: dict[str, Any] = {}
#: What ``Moody.IS_CHANGED`` and ``fingerprint_inputs`` answer, by mark; an exception is raised.
moods: dict[int, Any] = {}


def inputs(*names: str, hidden: dict[str, str] | None = None, **literals: Any) -> Any:
    """An INPUT_TYPES with these linked inputs of any type, and literals with their default."""
    kinds = {int: "INT", float: "FLOAT", bool: "BOOLEAN", str: "STRING"}
    required = dict.fromkeys(names, (ANY,))
    required |= {name: (kinds[type(value)], {"default": value}) for name, value in literals.items()}
    required["mark"] = ("INT", {"default": 0})
    return classmethod(lambda cls: {"required": required, "hidden": hidden or {}})


class Node:
    CATEGORY = "fakes"
    RETURN_TYPES: tuple[str, ...] = (ANY,)
    FUNCTION = "run"
    INPUT_TYPES = inputs()


class Catch(Node):
    """A sink for anything, list or not."""

    INPUT_IS_LIST = True
    OUTPUT_NODE = True
    RETURN_TYPES = ()
    INPUT_TYPES = inputs("value", hidden={"unique_id": "UNIQUE_ID"})

    def run(self, value: list[Any], mark: list[int], unique_id: list[str]) -> tuple[()]:
        caught[unique_id[0]] = list(value)
        return ()


class Constant(Node):
    INPUT_TYPES = inputs(value=0.0)

    def run(self, value: float, mark: int) -> tuple[float]:
        return (value,)


class Level(Node):
    """The level of a grey picture."""

    INPUT_TYPES = inputs("image")

    def run(self, image: torch.Tensor, mark: int) -> tuple[float]:
        return (round(float(image.mean()), 4),)


class Add(Node):
    INPUT_TYPES = inputs("a", "b")

    def run(self, a: float, b: float, mark: int) -> tuple[float]:
        return ((a or 0) + (b or 0) + mark,)


class Pair(Node):
    """Two outputs, the second of which is one list of two."""

    RETURN_TYPES = (ANY, ANY)
    OUTPUT_IS_LIST = (False, True)
    INPUT_TYPES = inputs("a", "b")

    def run(self, a: float, b: float, mark: int) -> tuple[float, list[float]]:
        return (mark, [a, b])


class Sum(Node):
    """Takes whole lists."""

    INPUT_IS_LIST = True
    INPUT_TYPES = inputs("values")

    def run(self, values: list[float], mark: list[int]) -> tuple[float]:
        return (sum(value or 0 for value in values) + len(values) + mark[0],)


class Nothing(Node):
    """Gives an empty list."""

    OUTPUT_IS_LIST = (True,)
    INPUT_TYPES = inputs("a")

    def run(self, a: float, mark: int) -> tuple[list[float]]:
        return ([],)


class Switch(Node):
    """Asks for one of its inputs only, once it knows which."""

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        lazy = {"lazy": True}
        return {"required": {"which": (ANY,), "a": (ANY, lazy), "b": (ANY, lazy), "mark": ("INT", {"default": 0})}}

    def check_lazy_status(self, which: float, a: Any, b: Any, mark: int) -> list[str]:
        return ["a"] if (which or 0) > 0.5 else ["b"]

    def run(self, which: float, a: Any, b: Any, mark: int) -> tuple[Any]:
        return (a if (which or 0) > 0.5 else b,)


class Block(Node):
    """Passes nothing on above a threshold, with or without a message."""

    INPUT_TYPES = inputs("a", above=0.5, message="")

    def run(self, a: float, above: float, message: str, mark: int) -> tuple[Any]:
        return (ExecutionBlocker(message or None) if (a or 0) > above else a,)


class Fail(Node):
    INPUT_TYPES = inputs("a", above=0.5)

    def run(self, a: float, above: float, mark: int) -> tuple[Any]:
        if (a or 0) > above:
            raise ValueError("too much")
        return (a,)


class Moody(Node):
    """Changes when its mood does."""

    INPUT_TYPES = inputs("a")

    @classmethod
    def IS_CHANGED(cls, mark: int, **others: Any) -> Any:
        mood = moods.get(mark)
        if isinstance(mood, Exception):
            raise mood
        return mood

    def run(self, a: float, mark: int) -> tuple[float]:
        return ((a or 0) + 1,)


class MoodyLater(Moody):
    @classmethod
    async def IS_CHANGED(cls, mark: int, **others: Any) -> Any:
        await asyncio.sleep(0)
        return moods.get(mark)


class Later(Node):
    """Waits a few turns of the loop."""

    INPUT_TYPES = inputs("a", turns=1, above=9.0)

    async def run(self, a: float, turns: int, above: float, mark: int) -> tuple[float]:
        for _ in range(turns):
            await asyncio.sleep(0)
        if (a or 0) > above:
            raise KeyError("too late")
        return ((a or 0) + mark,)


class Draw(Node):
    """A random number: the order of nodes shows."""

    INPUT_TYPES = inputs("a")

    def run(self, a: float, mark: int) -> tuple[float]:
        return (round(float(torch.rand(())), 6),)


class Count(Node):
    """Keeps a number on ``self``."""

    INPUT_TYPES = inputs("a")

    def __init__(self) -> None:
        self.count = 0

    def run(self, a: float, mark: int) -> tuple[int]:
        self.count += 1
        return (self.count,)


class Where(Node):
    """Tells where it runs."""

    INPUT_TYPES = inputs("a", hidden={"me": "UNIQUE_ID", "prompt": "PROMPT", "info": "EXTRA_PNGINFO"})

    def run(self, a: float, mark: int, me: str, prompt: Any, info: Any) -> tuple[Any]:
        context = get_executing_context()
        assert context is not None
        return ((me, context.node_id, context.list_index, sorted(prompt), info, torch.is_inference_mode_enabled()),)


class Raw(Node):
    """Wants the link, not the value."""

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"a": (ANY, {"rawLink": True}), "mark": ("INT", {"default": 0})}}

    def run(self, a: Any, mark: int) -> tuple[Any]:
        return (list(a),)


class Loose(Node):
    """Takes what is not declared, too, and tells the order."""

    INPUT_TYPES = inputs(z=1.0)

    def run(self, **values: Any) -> tuple[Any]:
        return (list(values.items()),)


class Shown(Node):
    """For the user interface and onwards, as a dict."""

    INPUT_TYPES = inputs("a")

    def run(self, a: float, mark: int) -> dict[str, Any]:
        return {"ui": {"text": [str(a)]}, "result": (a,)} if mark < 5 else {"ui": {"text": [str(a)]}}


class Odd(Node):
    """Returns what it should not."""

    INPUT_TYPES = inputs("a")

    def run(self, a: float, mark: int) -> Any:
        return [None, (), 5, (1, 2, 3), {"result": ExecutionBlocker(None)}, ExecutionBlocker("so")][mark % 6]


class Expand(Node):
    """Becomes another node above a threshold, and says so to nobody before."""

    INPUT_TYPES = inputs("a", above=0.5)

    def run(self, a: float, above: float, mark: int) -> Any:
        if (a or 0) <= above:
            return (a,)
        from comfy_execution.graph_utils import GraphBuilder

        builder = GraphBuilder()
        inner = builder.node("DiffAdd", a=a, b=1.0, mark=mark)
        return {"result": (inner.out(0),), "expand": builder.finalize()}


class V3(io.ComfyNode):
    """V3 with hidden values and a fingerprint; mark 1 returns a blocker, 2 nothing, 3 a tuple, 4 writes to itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffV3",
            category="fakes",
            inputs=[io.AnyType.Input("a"), io.Int.Input("mark", default=0)],
            outputs=[io.AnyType.Output(), io.AnyType.Output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, mark: int, **others: Any) -> Any:
        mood = moods.get(mark)
        if isinstance(mood, Exception):
            raise mood
        return mood

    @classmethod
    def execute(cls, a: Any, mark: int) -> Any:
        if mark == 1:
            return io.NodeOutput(1, 2, block_execution="no more")
        if mark == 2:
            return None
        if mark == 3:
            return (a, mark)
        if mark == 4:
            cls.kept = 1
        return io.NodeOutput(a, (cls.hidden.unique_id, sorted(cls.hidden.prompt), cls.hidden.api_key_comfy_org))


class V3Later(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffV3Later",
            category="fakes",
            inputs=[io.AnyType.Input("a", lazy=True), io.Int.Input("mark", default=0)],
            outputs=[io.AnyType.Output(is_output_list=True)],
        )

    @classmethod
    async def check_lazy_status(cls, a: Any, mark: int) -> list[str]:
        await asyncio.sleep(0)
        return ["a"] if mark % 2 else []

    @classmethod
    async def execute(cls, a: Any, mark: int) -> io.NodeOutput:
        await asyncio.sleep(0)
        return io.NodeOutput([a, mark])


CLASSES: dict[str, type] = {
    f"Diff{node.__name__}": node
    for node in (
        Catch, Constant, Level, Add, Pair, Sum, Nothing, Switch, Block, Fail, Moody, MoodyLater, Later, Draw, Count,
        Where, Raw, Loose, Shown, Odd, Expand, V3, V3Later,
    )
}  # fmt: skip
