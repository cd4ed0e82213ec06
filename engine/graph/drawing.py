"""A graph as ComfyUI's editor saves it, read without trust: fields of a wrong kind count as absent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .findings import MAX_MESSAGE
from .schema import ANY

#: Values of a node's ``mode``; every other one means that it runs.
MUTED, BYPASSED = 2, 4
#: Characters of a name that travel on; a title of a megabyte is no title.
MAX_TEXT: Final = 1000


def text_of(value: Any) -> str:
    """``value`` if it is text, cut to a length that a message can carry; else nothing."""
    return value[:MAX_MESSAGE] if isinstance(value, str) else ""


def id_of(value: Any) -> str | None:
    """An id as text. Editors write numbers, text, and sometimes numbers as floats."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return str(value) if isinstance(value, int) else value[:MAX_TEXT]


def _index_of(value: Any) -> int | None:
    number = id_of(value)
    return int(number) if number is not None and number.isdecimal() and len(number) < 6 else None


@dataclass(frozen=True, slots=True)
class Slot:
    """An input of a drawn node. ``widget``: it is also a widget, of this name; empty when it is a socket only."""

    name: str
    type: str
    link: str | None
    widget: str = ""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One node of a drawing. ``outputs`` are types."""

    id: str
    type: str
    title: str
    mode: int
    inputs: tuple[Slot, ...]
    outputs: tuple[str, ...]
    widgets_values: Any
    proxies: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        return self.title or self.type


@dataclass(frozen=True, slots=True)
class Line:
    """One link of a drawing."""

    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True)
class Graph:
    """``nodes`` in the order in which the editor would run them; ``problems`` are sentences."""

    nodes: Mapping[str, Drawn]
    links: Mapping[str, Line]
    problems: tuple[str, ...] = ()

    def into(self, target: str, slot: int) -> Line | None:
        """The link that ends in a slot."""
        return next((link for link in self.links.values() if (link.target, link.target_slot) == (target, slot)), None)


def graph_of(document: Mapping[str, Any]) -> Graph:
    """The nodes and links of a drawing, or of a subgraph's definition."""
    nodes: list[tuple[float, int, Drawn]] = []
    problems: list[str] = []
    known: set[str] = set()
    for position, item in enumerate(list_of(document.get("nodes"))):
        node = _node(item)
        if node is None:
            problems.append(f"entry {position} of nodes has no id or no type")
        elif node.id in known:
            problems.append(f"there are two nodes {node.id!r}")
        else:
            known.add(node.id)
            order = item.get("order")
            sortable = isinstance(order, int) or (isinstance(order, float) and math.isfinite(order))
            nodes.append((order if sortable else position, position, node))
    nodes.sort(key=lambda entry: entry[:2])
    links = {}
    for item in list_of(document.get("links")):
        read = _link(item)
        if read is not None:
            links[read[0]] = read[1]
    return Graph({node.id: node for _, _, node in nodes}, links, tuple(problems))


def _node(item: Any) -> Drawn | None:
    if not isinstance(item, Mapping):
        return None
    node_id, kind, mode = id_of(item.get("id")), item.get("type"), item.get("mode")
    if node_id is None or not isinstance(kind, str) or not kind:
        return None
    properties = item.get("properties")
    proxies = properties.get("proxyWidgets") if isinstance(properties, Mapping) else None
    return Drawn(
        id=node_id,
        type=kind[:MAX_TEXT],
        title=text_of(item.get("title")),
        mode=mode if isinstance(mode, int) else 0,
        inputs=tuple(_slot(slot) for slot in list_of(item.get("inputs"))),
        outputs=tuple(_type(slot.get("type")) if isinstance(slot, Mapping) else ANY
                      for slot in list_of(item.get("outputs"))),
        widgets_values=item.get("widgets_values"),
        proxies=tuple(
            (str(pair[0]), str(pair[1])) for pair in list_of(proxies) if isinstance(pair, list) and len(pair) >= 2
        ),
    )  # fmt: skip


def _slot(item: Any) -> Slot:
    if not isinstance(item, Mapping):
        return Slot("", ANY, None)
    name, widget = text_of(item.get("name")), item.get("widget")
    # Some editors write {"name": ...}, others only that there is a widget.
    named = text_of(widget.get("name")) if isinstance(widget, Mapping) else ""
    return Slot(name, _type(item.get("type")), id_of(item.get("link")), (named or name) if widget else "")


def _type(value: Any) -> str:
    """A type; lists of choices are a COMBO, numbers stand for "any" in old drawings."""
    if isinstance(value, list):
        return "COMBO"
    return value[:MAX_TEXT] if isinstance(value, str) and value else ANY


def _link(item: Any) -> tuple[str, Line] | None:
    """``[id, origin, origin slot, target, target slot, type]``, or an object with these names."""
    if isinstance(item, Mapping):
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
        item = [item.get(name) for name in names]
    if not isinstance(item, list) or len(item) < 5:
        return None
    link_id, origin, target = id_of(item[0]), id_of(item[1]), id_of(item[3])
    origin_slot, target_slot = _index_of(item[2]), _index_of(item[4])
    if link_id is None or origin is None or target is None or origin_slot is None:
        return None
    return link_id, Line(origin, origin_slot, target, target_slot if target_slot is not None else -1)


def list_of(value: Any) -> list[Any]:
    """``value`` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []
