"""Subgraphs of a drawing, and the group nodes of older editors read as such."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .drawing import Drawn, Graph, Line, Slot, graph_of, list_of, text_of
from .schema import Definitions, InputDefinition
from .widgets import CONTROLS, is_literal

#: The type of a group node is one of these and the group's name.
GROUP_PREFIXES = ("workflow/", "workflow>")

#: (id of a node inside, input) or ("-10", input of the subgraph) to a value set on the node outside.
Promoted = Mapping[tuple[str, str], Any]


@dataclass(frozen=True)
class Subgraph:
    """A definition: the graph inside, and the names of its inputs in order."""

    graph: Graph
    inputs: tuple[str, ...]

    def instance_input(self, instance: Drawn, slot: int) -> int | None:
        """The position, among the inputs of the node outside, of input ``slot``."""
        name = self.inputs[slot] if slot < len(self.inputs) else None
        for index, item in enumerate(instance.inputs):
            if item.name == name:
                return index
        return slot if slot < len(instance.inputs) and name is None else None

    def promoted(self, instance: Drawn) -> Promoted:
        """Values that the node outside has for widgets inside."""
        row = instance.widgets_values
        if not isinstance(row, list):
            return {}
        # "-1" is how the editor names the node outside itself in this list.
        shown = [("-10" if node_id == "-1" else node_id, name) for node_id, name in instance.proxies]
        if not shown:
            shown = [("-10", slot.name) for slot in instance.inputs if slot.widget]
        if len(shown) != len(row):
            return {}
        return {key: value for key, value in zip(shown, row, strict=True) if value is not None}


@dataclass(frozen=True)
class Group(Subgraph):
    """A group node's definition. ``widgets``: those of the nodes inside, in order, with the editor's own as None."""

    widgets: tuple[tuple[str, str] | None, ...] = ()

    def instance_input(self, instance: Drawn, slot: int) -> int | None:
        found = super().instance_input(instance, slot)
        sockets = [index for index, item in enumerate(instance.inputs) if not item.widget]
        return found if found is not None else sockets[slot] if slot < len(sockets) else None

    def promoted(self, instance: Drawn) -> Promoted:
        row = instance.widgets_values
        if not isinstance(row, list):
            return {}
        keys = self.widgets
        if len(keys) != len(row):
            keys = tuple(key for key in keys if key is not None)
            row = [value for value in row if not isinstance(value, str) or value not in CONTROLS]
        if len(keys) != len(row):
            return {}  # the values that the nodes had when the group was made
        pairs = zip(keys, row, strict=True)
        return {key: value for key, value in pairs if key is not None and value is not None}


def subgraphs_of(document: Mapping[str, Any], definitions: Definitions) -> dict[str, Subgraph]:
    """By the type of the nodes that stand for them; subgraphs may contain each other."""
    found: dict[str, Subgraph] = {}
    declared = document.get("definitions")
    subgraphs = declared.get("subgraphs") if isinstance(declared, Mapping) else None
    for item in list_of(subgraphs):
        if isinstance(item, Mapping) and isinstance(item.get("id"), str):
            names = [
                text_of(entry.get("name")) if isinstance(entry, Mapping) else ""
                for entry in list_of(item.get("inputs"))
            ]
            found[item["id"]] = Subgraph(graph_of(item), tuple(names))
    extra = document.get("extra")
    groups = extra.get("groupNodes") if isinstance(extra, Mapping) else None
    for name, item in (groups if isinstance(groups, Mapping) else {}).items():
        if isinstance(item, Mapping):
            group = _group(item, definitions)
            found.update({f"{prefix}{name}": group for prefix in GROUP_PREFIXES})
    return found


def _group(item: Mapping[str, Any], definitions: Definitions) -> Group:
    """Nodes of a group have positions for ids; links are ``[origin, slot, target, slot, type]`` between positions.

    What no link inside feeds is an input of the group, what no link inside takes (or what is listed as external) is
    an output, both in the order of the nodes.
    """
    raw = list_of(item.get("nodes"))
    nodes = [{**node, "id": index, "order": index} for index, node in enumerate(raw) if isinstance(node, Mapping)]
    inside = _numbers(item.get("links"), 4)
    links = [[f"in{number}", *link[:4]] for number, link in enumerate(inside)]
    graph = graph_of({"nodes": nodes, "links": links})
    fed = {(str(link[2]), link[3]): f"in{number}" for number, link in enumerate(inside)}
    external = {(str(entry[0]), entry[1]) for entry in _numbers(item.get("external"), 2)}
    taken = {(str(link[0]), link[1]) for link in inside} - external
    lines, drawn = dict(graph.links), {}
    names: list[str] = []
    widgets: list[tuple[str, str] | None] = []
    outputs = 0
    for node in graph.nodes.values():
        slots = []
        for index, slot in enumerate(node.inputs):
            link = fed.get((node.id, index))
            if link is None and not slot.widget:
                link = f"out{len(names)}"
                lines[link] = Line("-10", len(names), node.id, index)
                names.append(_unused(slot.name, node, names))
            slots.append(Slot(slot.name, slot.type, link, slot.widget))
        linked = {slot.name for slot in slots if slot.link is not None}
        widgets += [key for key in _widget_keys(node, definitions) if key is None or key[1] not in linked]
        for index in range(len(node.outputs)):
            if (node.id, index) not in taken:
                lines[f"to{outputs}"] = Line(node.id, index, "-20", outputs)
                outputs += 1
        drawn[node.id] = Drawn(
            node.id, node.type, node.title, node.mode, tuple(slots), node.outputs, node.widgets_values, node.proxies
        )
    return Group(Graph(drawn, lines, graph.problems), tuple(names), tuple(widgets))


def _numbers(value: Any, count: int) -> list[list[Any]]:
    """Those rows that begin with ``count`` whole numbers."""
    rows = [row for row in list_of(value) if isinstance(row, list) and len(row) >= count]
    return [row for row in rows if all(isinstance(part, int) for part in row[:count])]


def _unused(name: str, node: Drawn, names: list[str]) -> str:
    """The editor tells inputs of the same name apart by the node that has them."""
    return name if name not in names else f"{node.label} {name}"


def _widget_keys(node: Drawn, definitions: Definitions) -> Iterator[tuple[str, str] | None]:
    definition = definitions.get(node.type)
    inputs: tuple[InputDefinition, ...] = definition.inputs if definition is not None else ()
    for widget in inputs:
        if is_literal(widget):
            yield node.id, widget.name
            if widget.control:
                yield None
