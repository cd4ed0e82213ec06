"""A prompt against the node definitions: what ComfyUI's validation leaves out, and what it says, in our words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .io_nodes import NODE_CLASSES
from .overrides import allowed_values
from .packs import is_api_node, pack_of
from .policy import Policy, reads_files
from .schema import ANY, COMBO, Definitions
from .workflow import Finding, Prompt, Severity, any_of, circles, did_you_mean, finding, is_link


def check(prompt: Prompt, definitions: Definitions, policy: Policy | None = None) -> list[Finding]:
    """Unknown classes and outputs, all of them (ComfyUI stops at the first), refused classes, and output nodes that
    are not ours. The prompt's links may be broken; what is wrong with those alone is not said here."""
    refused = (policy or Policy()).check(prompt, definitions)
    by_node = {item.node_id: item for item in refused}
    findings = []
    for node_id in prompt:
        if node_id in by_node:
            findings.append(by_node[node_id])
        findings.extend(_check_node(prompt, node_id, definitions, refused=node_id in by_node))
    return findings


def _check_node(prompt: Prompt, node_id: str, definitions: Definitions, *, refused: bool) -> Iterator[Finding]:
    class_type = prompt[node_id]["class_type"]
    definition = definitions.get(class_type)
    if definition is None:
        if not refused:
            message = f"this ComfyUI has no node class {class_type!r}"
            remedy = _where_to_get(class_type, definitions)
            yield finding("unknown_node", message, remedy, prompt=prompt, node_id=node_id)
        return
    if definition.output_node and class_type not in NODE_CLASSES and not refused:
        message = "runs for its own effect on every frame; viewers do not see it"
        yield finding("foreign_output", message, "remove it unless that is meant", prompt=prompt, node_id=node_id,
                      severity=Severity.WARNING)  # fmt: skip
    if reads_files(class_type) and not refused:
        yield from _check_files(prompt, node_id, definitions)
    for name, value in prompt[node_id]["inputs"].items():
        feeder = prompt.get(value[0]) if is_link(value) else None
        source = definitions.get(feeder["class_type"]) if feeder is not None else None
        if source is not None and value[1] >= len(source.outputs):
            given = ", ".join(f"{index} ({item.type})" for index, item in enumerate(source.outputs)) or "none"
            message = f"node {value[0]} ({source.class_type}) has no output {value[1]}"
            yield finding(
                "unknown_output", message, f"its outputs: {given}", prompt=prompt, node_id=node_id, input=name
            )


def _where_to_get(class_type: str, definitions: Definitions) -> str:
    pack = pack_of(class_type)
    if pack:
        return f"install the node pack {pack} into ComfyUI's custom_nodes and restart the engine"
    if is_api_node(class_type):
        return "replace it: nodes that call a service on the network are not loaded here"
    near = did_you_mean(class_type, definitions)
    if near:
        return f"did you mean {any_of(near)}? Otherwise install the node pack that brings it and restart the engine"
    return "install the node pack that brings it and restart the engine"


def reachable(prompt: Prompt, definitions: Definitions) -> list[str]:
    """Ids of the nodes that an output needs, in the order of the document; ComfyUI looks at no others.

    All nodes when there is no output at all.
    """
    waiting = [
        node_id
        for node_id, node in prompt.items()
        if (definition := definitions.get(node["class_type"])) is not None and definition.output_node
    ]
    found = set(waiting)
    while waiting:
        links = [value[0] for value in prompt[waiting.pop()]["inputs"].values() if is_link(value)]
        fresh = {node_id for node_id in links if node_id in prompt} - found
        found |= fresh
        waiting += fresh
    return [node_id for node_id in prompt if node_id in found or not found]


def sound_part(prompt: Prompt, definitions: Definitions) -> tuple[Prompt, set[tuple[str, str]]]:
    """A copy that ComfyUI's validation can walk: without unknown nodes and without links that lead nowhere.

    Returns the inputs, (node id, name), that were taken out: they are broken, not missing.
    """
    copy = {
        node_id: {**node, "inputs": dict(node["inputs"])}
        for node_id, node in prompt.items()
        if node["class_type"] in definitions
    }
    broken: set[tuple[str, str]] = set()
    for node_id, node in copy.items():
        for name, value in prompt[node_id]["inputs"].items():
            if isinstance(value, list) and not _leads_somewhere(value, copy, definitions):
                del node["inputs"][name]
                broken.add((node_id, name))
    for circle in circles(copy):
        del copy[circle.node_id]["inputs"][circle.input]
        broken.add((circle.node_id, circle.input))
    return copy, broken


def _leads_somewhere(value: Any, prompt: Prompt, definitions: Definitions) -> bool:
    return (
        is_link(value)
        and value[0] in prompt
        and 0 <= value[1] < len(definitions[prompt[value[0]]["class_type"]].outputs)
    )


def check_choices(prompt: Prompt, node_id: str, definitions: Definitions) -> Iterator[Finding]:
    """Values that are none of a COMBO's choices: ComfyUI's own validation does not look at those of V3 nodes."""
    definition = definitions[prompt[node_id]["class_type"]]
    for name, value in prompt[node_id]["inputs"].items():
        expected = definition.input(name)
        if expected is None or expected.type != COMBO or isinstance(value, list | dict):
            continue
        if value not in expected.choices and (expected.choices or expected.folder):
            message, remedy = f"{value!r} is not one of its choices", f"it takes {allowed_values(expected)}"
            yield finding("unknown_choice", message, remedy, prompt=prompt, node_id=node_id, input=name)


def _check_files(prompt: Prompt, node_id: str, definitions: Definitions) -> Iterator[Finding]:
    """The class itself would take any path that exists; the operator allowed the files that it lists."""
    definition = definitions[prompt[node_id]["class_type"]]
    for name, value in prompt[node_id]["inputs"].items():
        expected = definition.input(name)
        if expected is None or expected.type != COMBO:
            continue
        if isinstance(value, list):
            message = "the file's name comes over a link, from where it could be any file's"
            remedy = f"write the name itself: {allowed_values(expected)}"
        elif value not in expected.choices:
            message, remedy = f"{value!r} is not one of its choices", f"it takes {allowed_values(expected)}"
        else:
            continue
        yield finding("missing_file", message, remedy, prompt=prompt, node_id=node_id, input=name)


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
    text = f"{error.get('message', '')}: {error.get('details', '')}" if error.get("details") else error.get("message")
    fallback = (str(error.get("type", "refused")), str(text)[:500])
    code, message = codes.get(str(error.get("type")), fallback)
    return finding(
        code, message, f"it takes {allowed}" if allowed else "", prompt=prompt, node_id=node_id, input=name
    )
