"""Links of a prompt, ``[node_id, output_index]`` among the inputs: all lead to nodes that are there, none around."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .findings import Finding, Prompt, any_of, did_you_mean, finding

#: Circles that are told apart; the rest are there as well, and who cuts these sees them next.
MAX_CIRCLES: Final = 16


def is_link(value: Any) -> bool:
    """ComfyUI's own rule, except that an output index is an integer and nothing else."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )


def plain(value: Any) -> Any:
    """``value`` without the wrapper ``{"__value__": ...}``, which ComfyUI takes off and only a list needs, to be told
    from a link. So that what is checked is what nodes get; ComfyUI's own checks come before its unwrapping, or after.
    """
    inner = value
    while isinstance(inner, Mapping) and "__value__" in inner:
        inner = inner["__value__"]
    return {"__value__": inner} if isinstance(inner, list) and inner is not value else inner


def reads_like_a_link(value: Any) -> bool:
    """Whether it is a list in its wrapper that ComfyUI would take for a link without it, and follow."""
    inner = value.get("__value__") if isinstance(value, Mapping) else None
    return (
        isinstance(inner, list)
        and len(inner) == 2
        and isinstance(inner[0], str)
        and isinstance(inner[1], int | float)
    )


def check_links(prompt: Prompt, known: Collection[str] = ()) -> list[Finding]:
    """Every list among the inputs is a link to a node that exists, and no node feeds itself.

    known: ids of nodes that are there and not in ``prompt``, because they are wrong themselves.
    """
    findings: list[Finding] = []
    for node_id, node in prompt.items():
        for name, value in node["inputs"].items():
            if reads_like_a_link(value):
                message = "a list of a text and a number cannot be a value: ComfyUI takes it for a link"
                findings.append(
                    finding("bad_value", message, "write another list", prompt=prompt, node_id=node_id, input=name)
                )
            if not isinstance(value, list):
                continue
            if not is_link(value) or value[1] < 0:
                message = f"{json.dumps(value, default=str)[:80]} is not a link"
                remedy = 'write ["node id", output index], or {"__value__": [...]} for a list that is a value'
                findings.append(finding("bad_link", message, remedy, prompt=prompt, node_id=node_id, input=name))
            elif value[0] not in prompt and value[0] not in known:
                near = did_you_mean(value[0], prompt)
                remedy = f"did you mean {any_of(near)}?" if near else "add the node or link to another"
                message = f"links to node {value[0]!r}, which does not exist"
                findings.append(finding("unknown_link", message, remedy, prompt=prompt, node_id=node_id, input=name))
    for number, circle in enumerate(circles(prompt)):
        if number < MAX_CIRCLES:
            message = f"nodes {' -> '.join(circle.path)} feed each other in a circle"
            findings.append(
                finding("cycle", message, "cut one of these links", prompt=prompt, node_id=circle.path[0])
            )
    return findings


@dataclass(frozen=True, slots=True)
class Circle:
    """Nodes that feed each other: each of ``path`` feeds the next, the first comes again at the end. The link at
    ``input`` of ``node_id`` closes it; without all such links no circle is left."""

    path: tuple[str, ...]
    node_id: str
    input: str


def circles(prompt: Prompt) -> list[Circle]:
    """Every link that closes a circle when the graph is walked from each node to those that feed it."""
    found: list[Circle] = []
    done: set[str] = set()
    for start in prompt:
        if start in done:
            continue
        path: list[str] = []
        on_path: dict[str, int] = {}
        waiting: list[tuple[str, Iterator[tuple[str, str]]]] = [(start, _feeders(prompt, start))]
        path.append(start)
        on_path[start] = 0
        while waiting:
            node_id, feeders = waiting[-1]
            step = next(feeders, None)
            if step is None:
                waiting.pop()
                path.pop()
                del on_path[node_id]
                done.add(node_id)
                continue
            name, feeder = step
            if feeder in on_path:
                around = path[on_path[feeder] :]
                found.append(Circle((feeder, *reversed(around)), node_id, name))
            elif feeder not in done:
                on_path[feeder] = len(path)
                path.append(feeder)
                waiting.append((feeder, _feeders(prompt, feeder)))
    return found


def _feeders(prompt: Prompt, node_id: str) -> Iterator[tuple[str, str]]:
    """(input, node that feeds it)."""
    for name, value in prompt[node_id]["inputs"].items():
        if is_link(value) and value[0] in prompt:
            yield name, value[0]


def find_cycle(prompt: Prompt) -> list[str]:
    """Ids along one circle of links, the first id again at the end; empty when there is none."""
    return next((list(circle.path) for circle in circles(prompt)), [])
