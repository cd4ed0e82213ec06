"""A prompt against the node definitions: what ComfyUI's validation leaves out, and what it says, in our words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .io_nodes import NODE_CLASSES
from .overrides import allowed_values
from .schema import ANY, Definitions
from .workflow import Finding, Prompt, Severity, did_you_mean, finding, is_link


def check(prompt: Prompt, definitions: Definitions) -> list[Finding]:
    """Unknown classes and outputs, all of them (ComfyUI stops at the first), and output nodes that are not ours."""
    return [item for node_id in prompt for item in _check_node(prompt, node_id, definitions)]


def _check_node(prompt: Prompt, node_id: str, definitions: Definitions) -> Iterator[Finding]:
    class_type = prompt[node_id]["class_type"]
    definition = definitions.get(class_type)
    if definition is None:
        near = did_you_mean(class_type, definitions)
        remedy = f"did you mean {' or '.join(near)}? Otherwise install" if near else "install"
        message = f"this ComfyUI has no node class {class_type!r}"
        remedy += " the node pack that brings it and restart the engine"
        yield finding("unknown_node", message, remedy, prompt=prompt, node_id=node_id)
        return
    if definition.output_node and class_type not in NODE_CLASSES:
        message = "runs for its own effect on every frame; viewers do not see it"
        yield finding("foreign_output", message, "remove it unless that is meant", prompt=prompt, node_id=node_id,
                      severity=Severity.WARNING)  # fmt: skip
    for name, value in prompt[node_id]["inputs"].items():
        source = definitions.get(prompt[value[0]]["class_type"]) if is_link(value) else None
        if source is not None and value[1] >= len(source.outputs):
            given = ", ".join(f"{index} ({item.type})" for index, item in enumerate(source.outputs)) or "none"
            message = f"node {value[0]} ({source.class_type}) has no output {value[1]}"
            yield finding(
                "unknown_output", message, f"its outputs: {given}", prompt=prompt, node_id=node_id, input=name
            )


def check_choices(prompt: Prompt, node_id: str, definitions: Definitions) -> Iterator[Finding]:
    """Values that are none of a COMBO's choices: ComfyUI's own validation does not look at those of V3 nodes."""
    definition = definitions[prompt[node_id]["class_type"]]
    for name, value in prompt[node_id]["inputs"].items():
        expected = definition.input(name)
        if expected is None or not expected.choices or isinstance(value, list | dict):
            continue
        if value not in expected.choices:
            message, remedy = f"{value!r} is not one of its choices", f"it takes {allowed_values(expected)}"
            yield finding("unknown_choice", message, remedy, prompt=prompt, node_id=node_id, input=name)


def translated(prompt: Prompt, node_id: str, definitions: Definitions, error: Mapping[str, Any]) -> Finding:
    """One error of ComfyUI's validation in our words."""
    name = str(error.get("extra_info", {}).get("input_name", ""))
    definition = definitions.get(prompt[node_id]["class_type"])
    expected = definition.input(name) if definition else None
    allowed = allowed_values(expected) if expected else ""
    given = prompt[node_id]["inputs"].get(name)
    codes = {
        "required_input_missing": ("missing_input", f"the required input {name!r} is missing"),
        "invalid_input_type": ("wrong_type", f"{given!r} is not of type {expected.type if expected else ANY}"),
        "value_smaller_than_min": ("out_of_range", f"{given!r} is too small"),
        "value_bigger_than_max": ("out_of_range", f"{given!r} is too large"),
        "value_not_in_list": ("unknown_choice", f"{given!r} is not one of its choices"),
        "return_type_mismatch": (
            "type_mismatch", f"is linked to an output of type {error.get('extra_info', {}).get('received_type')}"
        ),
    }  # fmt: skip
    fallback = (str(error.get("type", "refused")), f"{error.get('message', '')}: {error.get('details', '')}"[:500])
    code, message = codes.get(str(error.get("type")), fallback)
    return finding(
        code, message, f"it takes {allowed}" if allowed else "", prompt=prompt, node_id=node_id, input=name
    )
