"""What a node takes and gives, read from its class; V1 (``INPUT_TYPES``) and V3 (``define_schema``) alike.

V3 classes answer ``INPUT_TYPES()``, ``RETURN_TYPES`` and the rest in V1's shapes, so one reader serves both. The two
differ in how a COMBO is written: V1 puts the list of choices in the place of the type, V3 says "COMBO" with options.
Nothing here needs ComfyUI; the result is plain data that survives JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

COMBO: Final = "COMBO"
#: Types whose values may stand in a prompt; every other type arrives over a link.
LITERAL_TYPES: Final = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", COMBO})
ANY: Final = "*"


@dataclass(frozen=True, slots=True)
class InputDefinition:
    """One input. Fields as in ``engine.proto``; ``default_json`` is empty when there is no default.

    ``choices`` are those of a COMBO, each a JSON value. ``force_input``: a socket in the editor, literals still work.
    ``control``: the editor puts a widget behind it that says how the value changes after each run.
    ``folder``: the choices are the files of this model folder (a name of ComfyUI's, such as "checkpoints").
    ``widget_type``: what the editor shows for it, where that is not its type. ``dynamic_prompt``: the editor takes
    comments out of the text and makes its choices (``{a|b}``) when it queues it.
    """

    name: str
    type: str
    required: bool
    default_json: str = ""
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[Any, ...] = ()
    multiline: bool = False
    tooltip: str = ""
    force_input: bool = False
    lazy: bool = False
    control: bool = False
    folder: str = ""
    widget_type: str = ""
    dynamic_prompt: bool = False

    @property
    def types(self) -> frozenset[str]:
        """The types it accepts: some packs write several, separated by commas."""
        return frozenset(part.strip() for part in self.type.split(","))

    @property
    def choices_json(self) -> tuple[str, ...]:
        return tuple(json.dumps(choice, ensure_ascii=False) for choice in self.choices)


@dataclass(frozen=True, slots=True)
class OutputDefinition:
    name: str
    type: str
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class NodeDefinition:
    """One node class. ``hidden`` names what ComfyUI itself fills in; prompts and overrides cannot set it."""

    class_type: str
    display_name: str
    category: str
    description: str
    inputs: tuple[InputDefinition, ...]
    outputs: tuple[OutputDefinition, ...]
    output_node: bool
    pack: str
    hidden: tuple[str, ...] = ()

    def input(self, name: str) -> InputDefinition | None:
        return next((definition for definition in self.inputs if definition.name == name), None)


Definitions = Mapping[str, NodeDefinition]


def definition_of(node_class: type, class_type: str | None = None, display_name: str | None = None) -> NodeDefinition:
    """Read a class. ``class_type`` is the name it is mapped to, its own name when not given.

    Calls the class's own ``INPUT_TYPES``, which may raise anything and may list directories for its choices.
    """
    declared = node_class.INPUT_TYPES()  # type: ignore[attr-defined]
    inputs = [
        _input(name, declaration, required=group == "required")
        for group in ("required", "optional")
        for name, declaration in (declared.get(group) or {}).items()
    ]
    name = class_type or node_class.__name__
    return NodeDefinition(
        class_type=name,
        display_name=display_name or _text(getattr(node_class, "DISPLAY_NAME", "")) or name,
        category=_text(getattr(node_class, "CATEGORY", "")),
        description=_text(getattr(node_class, "DESCRIPTION", "")),
        inputs=tuple(inputs),
        outputs=_outputs(node_class),
        output_node=getattr(node_class, "OUTPUT_NODE", False) is True,
        # V3 says where a class comes from in RELATIVE_PYTHON_MODULE, ComfyUI sets it on V1 classes too.
        pack=_text(getattr(node_class, "RELATIVE_PYTHON_MODULE", "")) or node_class.__module__,
        hidden=tuple(declared.get("hidden") or {}),
    )


def _outputs(node_class: type) -> tuple[OutputDefinition, ...]:
    types = [_type_name(item) for item in getattr(node_class, "RETURN_TYPES", None) or ()]
    names = list(getattr(node_class, "RETURN_NAMES", None) or ())
    lists = list(getattr(node_class, "OUTPUT_IS_LIST", None) or ())
    return tuple(
        OutputDefinition(
            name=_text(names[index]) if index < len(names) and names[index] else type_name,
            type=type_name,
            is_list=bool(lists[index]) if index < len(lists) else False,
        )
        for index, type_name in enumerate(types)
    )


def _input(name: str, declaration: Any, *, required: bool) -> InputDefinition:
    """``declaration`` is ``(type,)`` or ``(type, options)``; some packs write a bare type or a list."""
    parts = declaration if isinstance(declaration, tuple | list) else (declaration,)
    kind = parts[0] if parts else ANY
    options = parts[1] if len(parts) > 1 and isinstance(parts[1], Mapping) else {}
    choices: Any = ()
    if isinstance(kind, list | tuple):
        choices = kind
    elif kind == COMBO:
        choices = options.get("options") or ()
    type_name = COMBO if isinstance(kind, list | tuple) else _type_name(kind)
    # A seed has the editor's control unless its class says otherwise.
    control = options.get("control_after_generate", type_name == "INT" and name in ("seed", "noise_seed"))
    numeric = not {"INT", "FLOAT"}.isdisjoint(type_name.split(","))
    return InputDefinition(
        name=name,
        type=type_name,
        required=required,
        default_json=_json(options["default"]) if "default" in options else "",
        minimum=_number(options.get("min")) if numeric else None,
        maximum=_number(options.get("max")) if numeric else None,
        step=_number(options.get("step")) if numeric else None,
        choices=tuple(_plain(choice) for choice in choices),
        multiline=bool(options.get("multiline", False)),
        tooltip=_text(options.get("tooltip", "")),
        force_input=bool(options.get("forceInput", False)),
        lazy=bool(options.get("lazy", False)),
        control=bool(control),
        folder=_text(getattr(choices, "folder", "")),
        widget_type=_text(options.get("widgetType", "")),
        dynamic_prompt=bool(options.get("dynamicPrompts", False)),
    )


def _type_name(kind: Any) -> str:
    """Types are text; V1 outputs may be a list of choices, and some packs use a str subclass that equals anything."""
    if isinstance(kind, list | tuple):
        return COMBO
    return str.__str__(kind) if isinstance(kind, str) else str(kind)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """Integers stay integers: ComfyUI's largest seed, 2**64 - 1, is no double."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _plain(value: Any) -> Any:
    """``value`` as JSON can carry it; what it cannot becomes text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)
