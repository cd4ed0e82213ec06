"""The ComfyUI editor's own JSON as a prompt in API format: what the editor does when it exports, on our side.

A document is a drawing: nodes with the values of their widgets in a row, links with ids, helpers that exist only in
the editor (reroutes, primitives, notes), nodes switched off, and subgraphs. Which widget a value belongs to is known
from the node definitions alone. Documents come from anybody: nothing here trusts a field, and what cannot be
converted becomes a finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .drawing import BYPASSED, MUTED, Drawn, Graph, graph_of, text_of
from .findings import Finding, Prompt, Severity
from .schema import ANY, Definitions
from .subgraphs import subgraphs_of
from .widgets import widget_values, wrapped

#: Exist in the editor only and have no part in what runs; those of the rgthree pack are on half of all drawings.
REMARKS: Final = frozenset(
    {
        "Note",
        "MarkdownNote",
        "Label (rgthree)",
        "Bookmark (rgthree)",
        "Fast Groups Muter (rgthree)",
        "Fast Groups Bypasser (rgthree)",
        "Fast Muter (rgthree)",
        "Fast Bypasser (rgthree)",
        "Fast Actions Button (rgthree)",
        "Mute / Bypass Repeater (rgthree)",
        "Mute / Bypass Relay (rgthree)",
        "Random Unmuter (rgthree)",
        "Node Collector (rgthree)",
    }
)
#: Hand their input on.
REROUTES: Final = frozenset({"Reroute", "Reroute (rgthree)"})
PRIMITIVE: Final = "PrimitiveNode"
#: A pair that is joined by a name instead of a link (KJNodes).
SET_NODE, GET_NODE = "SetNode", "GetNode"
#: Node ids of a subgraph's own inputs and outputs, in the links inside it.
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = "-10", "-20"
#: Subgraphs inside subgraphs. A definition that holds itself would go on for ever.
MAX_DEPTH: Final = 16


def is_drawing(document: Any) -> bool:
    """Whether this is what the editor saves, rather than API format."""
    return isinstance(document, Mapping) and isinstance(document.get("nodes"), list)


def to_prompt(
    document: Mapping[str, Any], definitions: Definitions, *, max_nodes: int
) -> tuple[Prompt, list[Finding]]:
    """The prompt that the editor would export, and what could not be converted. ``document`` stays untouched.

    Ids are the editor's; those inside a subgraph are joined with colons, ``7:3``, as the editor does.
    """
    return _Conversion(document, definitions, max_nodes).run()


@dataclass(frozen=True, slots=True)
class _Source:
    """Where an input's value comes from: an output of a node that runs, or a value."""

    link: tuple[str, int] | None = None
    value: Any = None


@dataclass
class _Scope:
    """One graph: the drawing itself, or one instance of a subgraph with the node that stands for it outside."""

    graph: Graph
    prefix: str = ""
    parent: _Scope | None = None
    instance: Drawn | None = None
    depth: int = 0
    inner: dict[str, _Scope] = field(default_factory=dict)


#: Places that were passed on the way to a source; a place that comes twice is a circle of helpers.
_Trail = frozenset[tuple[str, str, int]]


class _Conversion:
    def __init__(self, document: Mapping[str, Any], definitions: Definitions, max_nodes: int) -> None:
        self._definitions = definitions
        self._max_nodes = max_nodes
        self._findings: dict[tuple[str, str, str], Finding] = {}
        self._subgraphs = subgraphs_of(document, definitions)
        self._root = _Scope(graph_of(document))
        self._prompt: Prompt = {}
        self._visited = 0

    def run(self) -> tuple[Prompt, list[Finding]]:
        for problem in self._root.graph.problems:
            self._add(self._root, None, "bad_editor_node", problem, "save the workflow again in ComfyUI's editor")
        for scope, node in self._nodes(self._root):
            if len(self._prompt) >= self._max_nodes:
                self._add(self._root, None, "too_many_nodes", f"the limit is {self._max_nodes}", "make it smaller")
                break
            self._emit(scope, node)
        return self._prompt, list(self._findings.values())

    # ---- which nodes run

    def _nodes(self, scope: _Scope) -> Iterator[tuple[_Scope, Drawn]]:
        for node in scope.graph.nodes.values():
            self._visited += 1
            if self._visited > 20 * self._max_nodes:
                return  # a few nested definitions can stand for millions of nodes
            if node.mode in (MUTED, BYPASSED) or self._is_helper(node):
                continue
            if node.type in self._subgraphs:
                inner = self._inner(scope, node)
                if inner is not None:
                    yield from self._nodes(inner)
            else:
                yield scope, node

    @staticmethod
    def _is_helper(node: Drawn) -> bool:
        return node.type in REMARKS or node.type in REROUTES or node.type in (PRIMITIVE, SET_NODE, GET_NODE)

    def _inner(self, scope: _Scope, node: Drawn) -> _Scope | None:
        """The graph that a subgraph node stands for; None, and a finding, when it nests too deeply."""
        if node.id not in scope.inner:
            if scope.depth >= MAX_DEPTH:
                message = f"subgraphs are nested deeper than {MAX_DEPTH}, or one contains itself"
                self._add(scope, node, "subgraph_depth", message, "make it flatter in the editor")
                return None
            prefix = f"{scope.prefix}{node.id}:"
            scope.inner[node.id] = _Scope(self._subgraphs[node.type].graph, prefix, scope, node, scope.depth + 1)
        return scope.inner[node.id]

    def _emit(self, scope: _Scope, node: Drawn) -> None:
        definition = self._definitions.get(node.type)
        if definition is None and _looks_like_uuid(node.type):
            message = f"the definition of its subgraph {node.type} is not in the document"
            self._add(scope, node, "unknown_subgraph", message, "save the workflow again in ComfyUI's editor")
            return
        inputs, left_over = widget_values(node, definition)
        inputs |= self._values_from_outside(scope, node)
        if left_over:
            message = f"has {left_over} more values than widgets; it was drawn with another version of the node"
            remedy = "open it in an editor of this ComfyUI, look at the values, and save it again"
            self._add(scope, node, "widget_count", message, remedy, severity=Severity.WARNING)
        for index, slot in enumerate(node.inputs):
            source = self._input(scope, node, index, slot.type, frozenset())
            if source is not None and slot.name:
                inputs[slot.name] = list(source.link) if source.link is not None else wrapped(source.value)
        title = node.title or (definition.display_name if definition is not None else node.type)
        self._prompt[scope.prefix + node.id] = {
            "class_type": node.type,
            "inputs": inputs,
            "_meta": {"title": title},
        }

    def _values_from_outside(self, scope: _Scope, node: Drawn) -> dict[str, Any]:
        """Widgets of a node in a subgraph that are shown, and set, on the node that stands for the subgraph."""
        if scope.instance is None:
            return {}
        promoted = self._subgraphs[scope.instance.type].promoted(scope.instance)
        return {name: wrapped(value) for (node_id, name), value in promoted.items() if node_id == node.id}

    # ---- where inputs come from

    def _input(self, scope: _Scope, node: Drawn, index: int, wanted: str, trail: _Trail) -> _Source | None:
        """What feeds input ``index``; None when nothing does. ``wanted``: the type at the far end."""
        if index >= len(node.inputs) or node.inputs[index].link is None:
            return None
        slot = node.inputs[index]
        place = (scope.prefix + node.id, "input", index)
        if place in trail:
            message = "helpers of the editor (reroutes, bypassed nodes) feed each other in a circle"
            self._add(scope, node, "cycle", message, "cut one of these links", name=slot.name)
            return None
        link = scope.graph.links.get(slot.link or "")
        if link is None:
            message = f"its link {slot.link} is not in the document"
            self._add(scope, node, "unknown_link", message, "connect it again in the editor", name=slot.name)
            return None
        trail |= {place}
        if link.origin == SUBGRAPH_INPUT and scope.parent is not None:
            return self._outer(scope, link.origin_slot, wanted, trail)
        origin = scope.graph.nodes.get(link.origin)
        if origin is None:
            message = f"links to node {scope.prefix + link.origin!r}, which does not exist"
            self._add(scope, node, "unknown_link", message, "connect it again in the editor", name=slot.name)
            return None
        source = self._output(scope, origin, link.origin_slot, wanted, trail)
        if source is None and origin.mode == MUTED and node.mode not in (MUTED, BYPASSED):
            message = f"is fed by node {scope.prefix + origin.id} ({origin.label}), which is muted"
            remedy = "switch that node on, or remove the link"
            self._add(scope, node, "muted_source", message, remedy, name=slot.name, severity=Severity.WARNING)
        return source

    def _outer(self, scope: _Scope, slot: int, wanted: str, trail: _Trail) -> _Source | None:
        """What feeds input ``slot`` of the subgraph from the graph around it."""
        parent, instance = scope.parent, scope.instance
        assert parent is not None
        assert instance is not None
        subgraph = self._subgraphs[instance.type]
        index = subgraph.instance_input(instance, slot)
        if index is not None and instance.inputs[index].link is not None:
            return self._input(parent, instance, index, wanted, trail)
        name = subgraph.inputs[slot] if slot < len(subgraph.inputs) else ""
        promoted = subgraph.promoted(instance)
        key = (SUBGRAPH_INPUT, name)
        return _Source(value=promoted[key]) if key in promoted else None

    def _output(self, scope: _Scope, node: Drawn, slot: int, wanted: str, trail: _Trail) -> _Source | None:
        """What output ``slot`` of a node stands for."""
        if node.mode == MUTED or node.type in REMARKS:
            return None
        if node.mode == BYPASSED:
            return self._bypass(scope, node, slot, wanted, trail)
        if node.type in REROUTES:
            return self._input(scope, node, 0, wanted, trail)
        if node.type == PRIMITIVE:
            values = node.widgets_values
            return _Source(value=values[0]) if isinstance(values, list) and values else None
        if node.type == GET_NODE:
            return self._named(scope, node, wanted, trail)
        if node.type == SET_NODE:
            return self._input(scope, node, 0, wanted, trail)
        if node.type in self._subgraphs:
            return self._subgraph_output(scope, node, slot, wanted, trail)
        return _Source((scope.prefix + node.id, slot))

    def _bypass(self, scope: _Scope, node: Drawn, slot: int, wanted: str, trail: _Trail) -> _Source | None:
        given = node.outputs[slot] if slot < len(node.outputs) else ANY
        index = _bypass_index([item.type for item in node.inputs], slot, given, wanted)
        if index is None:
            message = f"is bypassed and has no input of type {wanted} to hand on; what it feeds gets nothing"
            remedy = "switch it on, or remove its links"
            self._add(scope, node, "bypass_without_input", message, remedy, severity=Severity.WARNING)
            return None
        return self._input(scope, node, index, wanted, trail)

    def _named(self, scope: _Scope, node: Drawn, wanted: str, trail: _Trail) -> _Source | None:
        name = _name_of(node)
        around: _Scope | None = scope
        while around is not None:
            for other in around.graph.nodes.values():
                if other.type == SET_NODE and other.mode != MUTED and _name_of(other) == name:
                    return self._input(around, other, 0, wanted, trail)
            around = around.parent
        message = f"reads {name!r}, which no SetNode sets"
        self._add(scope, node, "unknown_link", message, "connect it again in the editor")
        return None

    def _subgraph_output(self, scope: _Scope, node: Drawn, slot: int, wanted: str, trail: _Trail) -> _Source | None:
        inner = self._inner(scope, node)
        if inner is None:
            return None
        link = inner.graph.into(SUBGRAPH_OUTPUT, slot)
        if link is None:
            message = f"nothing inside its subgraph feeds output {slot}"
            self._add(scope, node, "unknown_output", message, "connect it inside the subgraph")
            return None
        if link.origin == SUBGRAPH_INPUT:
            return self._outer(inner, link.origin_slot, wanted, trail)
        origin = inner.graph.nodes.get(link.origin)
        if origin is None:
            message = f"output {slot} comes from node {inner.prefix + link.origin!r}, which does not exist"
            self._add(scope, node, "unknown_link", message, "connect it again in the editor")
            return None
        return self._output(inner, origin, link.origin_slot, wanted, trail)

    def _add(
        self,
        scope: _Scope,
        node: Drawn | None,
        code: str,
        message: str,
        remedy: str,
        *,
        name: str = "",
        severity: Severity = Severity.ERROR,
    ) -> None:
        """Note a finding; the same one about the same place counts once, however many ways lead there."""
        node_id = scope.prefix + node.id if node is not None else ""
        path = f"nodes.{node_id}" + (f".inputs.{name}" if name else "") if node_id else ""
        made = Finding(
            severity,
            code,
            text_of(message),
            remedy,
            path,
            node_id,
            node.type if node is not None else "",
            node.title if node is not None else "",
            name,
        )
        self._findings.setdefault((code, path, "" if path else message), made)


def _bypass_index(inputs: list[str], slot: int, given: str, wanted: str) -> int | None:
    """Which input a bypassed node hands on: the one beside the output if its type fits, else the first that fits."""
    if not inputs:
        return None
    if wanted in (ANY, ""):
        return slot if slot < len(inputs) else 0

    def fits(kind: str) -> bool:
        return _compatible(kind, given) and _compatible(kind, wanted)

    if slot < len(inputs) and fits(inputs[slot]):
        return slot
    if wanted in inputs:
        return inputs.index(wanted)
    return next((index for index, kind in enumerate(inputs) if fits(kind)), None)


def _compatible(one: str, other: str) -> bool:
    names, others = (set(kind.upper().split(",")) for kind in (one, other))
    return ANY in names | others or bool(names & others)


def _name_of(node: Drawn) -> str:
    """The name that a SetNode or GetNode goes by."""
    values = node.widgets_values
    return str(values[0]) if isinstance(values, list) and values else ""


def _looks_like_uuid(text: str) -> bool:
    return len(text) == 36 and [len(part) for part in text.split("-")] == [8, 4, 4, 4, 12]
