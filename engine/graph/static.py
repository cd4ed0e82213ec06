"""Which nodes of a prompt depend on nothing live, so that they can run before the first frame, one by one."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping
from typing import Any, Final

from .schema import Definitions
from .workflow import Prompt, is_link

#: Types of outputs that are loaded from files.
MODEL_TYPES: Final = frozenset(
    {"MODEL", "CLIP", "VAE", "CONTROL_NET", "CLIP_VISION", "STYLE_MODEL", "UPSCALE_MODEL", "GLIGEN", "AUDIO_ENCODER",
     "MODEL_PATCH"}
)  # fmt: skip

#: Where frames, sound and text enter and leave.
LIVE_CLASSES: Final = frozenset(
    {"LoadTensor", "PrimaryInputLoadImage", "SaveTensor", "LoadAudioTensor", "SaveAudioTensor", "SaveTextTensor"}
)


def is_loader(node: Mapping[str, Any], definitions: Definitions) -> bool:
    """Whether a node makes models out of names: nothing feeds it, and a model comes out."""
    definition = definitions.get(node["class_type"])
    return (
        definition is not None
        and not any(is_link(value) for value in node["inputs"].values())
        and any(output.type in MODEL_TYPES for output in definition.outputs)
    )


def static_nodes(prompt: Prompt, definitions: Definitions) -> list[str]:
    """Ids of the nodes that every tick needs and that no live input reaches, sources first.

    What only a lazy input asks for is left out: the node behind it may never run, and must not be loaded in vain.
    """
    feeders: dict[str, list[str]] = {}
    for node_id, node in prompt.items():
        feeders[node_id] = [value[0] for value in node["inputs"].values() if is_link(value)]
    order = list(graphlib.TopologicalSorter(feeders).static_order())
    live: set[str] = set()
    for node_id in order:
        if prompt[node_id]["class_type"] in LIVE_CLASSES or not live.isdisjoint(feeders[node_id]):
            live.add(node_id)
    needed: set[str] = set()
    for node_id in reversed(order):
        definition = definitions.get(prompt[node_id]["class_type"])
        if definition is None:
            continue
        if definition.output_node:
            needed.add(node_id)
        if node_id in needed:
            lazy = {item.name for item in definition.inputs if item.lazy}
            links = {name: value[0] for name, value in prompt[node_id]["inputs"].items() if is_link(value)}
            needed.update(source for name, source in links.items() if name not in lazy)
    return [
        node_id
        for node_id in order
        if node_id in needed and node_id not in live and not _is_sink(prompt[node_id], definitions)
    ]


def _is_sink(node: Mapping[str, Any], definitions: Definitions) -> bool:
    definition = definitions.get(node["class_type"])
    return definition is None or definition.output_node
