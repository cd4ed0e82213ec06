"""Which widget of a drawn node each of its saved values belongs to.

The editor saves the values of a node's widgets in a row, without names. The row follows the node's inputs in the
order of their definition, sockets left out, with values of the editor's own between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from .drawing import Drawn
from .dynamic_prompt import chosen
from .schema import COMBO, LITERAL_TYPES, InputDefinition, NodeDefinition

#: Values of the widget that the editor puts behind a seed: what it does with it after each run.
CONTROLS: Final = frozenset({"fixed", "increment", "decrement", "randomize", "increment-wrap"})
#: What upload buttons and hidden widgets of the editor leave at the end of the row.
EDITORS_OWN: Final = (None, "", "image", "video", "audio")


def wrapped(value: Any) -> Any:
    """A list stands for a link in a prompt; one that is a value travels in ComfyUI's wrapper."""
    return {"__value__": value} if isinstance(value, list) else value


def widget_values(node: Drawn, definition: NodeDefinition | None) -> tuple[dict[str, Any], int]:
    """Input names and values, and how many saved values belong to no widget."""
    values = node.widgets_values
    if isinstance(values, Mapping):  # some packs save names
        names = None if definition is None else {item.name for item in definition.inputs}
        given = {str(key): wrapped(value) for key, value in values.items() if names is None or key in names}
        for item in definition.inputs if definition is not None else ():
            if item.name in given:
                given[item.name] = _queued(item, given[item.name])
        return given, 0
    row = list(values) if isinstance(values, list) else []
    if definition is None:
        named = [slot.widget for slot in node.inputs if slot.widget]
        return (dict(zip(named, map(wrapped, row), strict=True)) if len(named) == len(row) else {}), 0
    widgets = list(_widgets(node, definition, len(row)))
    result: dict[str, Any] = {}
    position = 0
    for index, widget in enumerate(widgets):
        value = row[position] if position < len(row) else None
        result |= _initial(widget) if value is None else {widget.name: wrapped(_queued(widget, value))}
        position += 1
        following = widgets[index + 1] if index + 1 < len(widgets) else None
        position += _editors_own(row, position, widget, following, len(widgets) - index - 1)
    left = [value for value in row[position:] if not isinstance(value, str | None) or value not in EDITORS_OWN]
    return result, len(left)


def _widgets(node: Drawn, definition: NodeDefinition, count: int) -> Iterator[InputDefinition]:
    """The inputs that have a widget. A type that only a pack knows has one if the editor drew no socket for it."""
    slots = {slot.name: slot for slot in node.inputs}
    known = sum(1 for item in definition.inputs if is_literal(item))
    for item in definition.inputs:
        slot = slots.get(item.name)
        drawn = slot is not None and bool(slot.widget)
        if drawn or is_literal(item) or (slot is None and item.required and not item.force_input and count > known):
            yield item


def is_literal(item: InputDefinition) -> bool:
    """Whether the editor has a widget for it: one of several types (INT,FLOAT) is a socket, unless it names one."""
    return (item.widget_type or item.type) in LITERAL_TYPES and not item.force_input


def _editors_own(
    row: list[Any], position: int, widget: InputDefinition, following: InputDefinition | None, needed: int
) -> int:
    """How many values behind a widget's own are the editor's: what to do with a seed, and which choices to draw."""
    if position >= len(row) or not isinstance(row[position], str) or row[position] not in CONTROLS:
        return 0
    if not widget.control and (following is None or _takes(following, row[position])):
        return 0
    # Behind a choice that changes with each run the editor also saves a filter of the choices.
    filtered = widget.type == COMBO and len(row) - position - 1 > needed and isinstance(row[position + 1], str)
    return 2 if filtered else 1


def _takes(widget: InputDefinition, value: str) -> bool:
    return "STRING" in widget.types or value in widget.choices


def _queued(widget: InputDefinition, value: Any) -> Any:
    """A saved value as the editor would queue it."""
    return chosen(value) if widget.dynamic_prompt and isinstance(value, str) else value


def _initial(widget: InputDefinition) -> dict[str, Any]:
    """What the editor puts into a widget that has no saved value."""
    if widget.default_json:
        return {widget.name: wrapped(json.loads(widget.default_json))}
    return {widget.name: widget.choices[0]} if widget.choices and widget.required else {}
