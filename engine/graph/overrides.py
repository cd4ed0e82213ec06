"""Node overrides: ``{node_id: {input: value}}`` onto a running prompt, checked against the definitions.

Pure, and all or nothing. ComfyUI's own validation comes afterwards (``ComfyHost.validate``); what is refused here is
refused with the path of the field, what would be allowed, and names that look like the one given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .links import plain, reads_like_a_link
from .schema import ANY, COMBO, LITERAL_TYPES, Definitions, InputDefinition, NodeDefinition
from .workflow import Prompt, did_you_mean, find_cycle, is_link, title_of

#: ``{node_id: {input: value}}``; it comes from a request, so the inner mapping is checked, not assumed.
Overrides = Mapping[str, Any]

#: How many choices or names a message lists before it says how many more there are.
LISTED: Final = 12


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that is wrong. ``path`` reads ``nodes.5.inputs.strength``; ``message`` names the suggestions too."""

    path: str
    message: str
    allowed: str = ""
    suggestions: tuple[str, ...] = ()


class OverrideError(ValueError):
    """Nothing was applied; ``violations`` has every reason."""

    def __init__(self, violations: list[Violation]) -> None:
        self.violations = tuple(violations)
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        super().__init__(f"{violations[0].path}: {violations[0].message}{more}")


class _RefusedError(Exception):
    def __init__(self, message: str, allowed: str = "") -> None:
        super().__init__(message)
        self.message, self.allowed = message, allowed


def apply(prompt: Prompt, overrides: Overrides, definitions: Definitions) -> Prompt:
    """A prompt with the overrides in place; ``prompt`` itself stays as it was, untouched nodes are shared with it.

    A value is a literal of the input's type (INT takes no booleans, FLOAT takes integers) within its range, or a link
    ``[node_id, output_index]``. A literal never replaces a link, a link replaces either. Raises OverrideError.
    """
    result: Prompt = dict(prompt)
    violations: list[Violation] = []
    linked: list[tuple[str, str]] = []
    for node_id, values in overrides.items():
        node = prompt.get(node_id)
        if node is None:
            violations.append(_unknown_node(prompt, node_id))
            continue
        definition = definitions.get(node["class_type"])
        if definition is None:
            message = f"this engine has no node class {node['class_type']!r}"
            violations.append(Violation(f"nodes.{node_id}", message))
            continue
        if not isinstance(values, Mapping):
            violations.append(
                Violation(f"nodes.{node_id}", "is not an object", "an object of input names and values")
            )
            continue
        inputs = dict(node["inputs"])
        for name, value in values.items():
            path = f"nodes.{node_id}.inputs.{name}"
            expected = definition.input(name)
            if expected is None:
                violations.append(_unknown_input(path, name, definition))
                continue
            try:
                inputs[name] = _checked(value, inputs.get(name), expected, prompt, definitions)
            except _RefusedError as refused:
                violations.append(Violation(path, refused.message, refused.allowed))
                continue
            if is_link(value):
                linked.append((node_id, path))
        result[node_id] = {**node, "inputs": inputs}
    if linked and not violations:
        violations.extend(_circles(result, linked))
    if violations:
        raise OverrideError(violations)
    return result


def allowed_values(definition: InputDefinition) -> str:
    """What an input takes, in words: ``a number from 0 to 10``, ``one of "nearest-exact", "area"``."""
    low, high = definition.minimum, definition.maximum
    if definition.types & {"INT", "FLOAT"}:
        noun = "a number" if "FLOAT" in definition.types else "an integer"
        if low is not None and high is not None:
            return f"{noun} from {low} to {high}"
        if low is not None:
            return f"{noun} of {low} or more"
        return f"{noun} of {high} or less" if high is not None else noun
    if definition.type == COMBO:
        if not definition.choices:
            return "nothing: this installation has no choice for it"
        listed = ", ".join(definition.choices_json[:LISTED])
        rest = len(definition.choices) - LISTED
        return f"one of {listed}" + (f" and {rest} more" if rest > 0 else "")
    return {"STRING": "text", "BOOLEAN": "true or false"}.get(
        definition.type, f'a link ["node id", output index] to an output of type {definition.type}'
    )


def _unknown_node(prompt: Prompt, node_id: str) -> Violation:
    titles = {title_of(node): key for key, node in prompt.items() if title_of(node)}
    near = did_you_mean(str(node_id), prompt) or tuple(titles[name] for name in did_you_mean(str(node_id), titles))
    known = [f"{key} ({title_of(node) or node['class_type']})" for key, node in prompt.items()]
    message = f"the running workflow has no such node{_suggest(near)}"
    return Violation(f"nodes.{node_id}", message, _listing(known), near)


def _unknown_input(path: str, name: str, definition: NodeDefinition) -> Violation:
    near = did_you_mean(str(name), [item.name for item in definition.inputs])
    message = f"{definition.class_type} has no input {name!r}{_suggest(near)}"
    return Violation(path, message, _listing([item.name for item in definition.inputs]), near)


def _suggest(near: tuple[str, ...]) -> str:
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def _listing(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _checked(value: Any, current: Any, expected: InputDefinition, prompt: Prompt, definitions: Definitions) -> Any:
    value = plain(value)
    if reads_like_a_link(value):
        raise _RefusedError("a list of a text and a number cannot be a value: ComfyUI takes it for a link", "")
    if isinstance(value, list):
        return _checked_link(value, expected, prompt, definitions)
    if is_link(current):
        feeder = prompt.get(current[0], {})
        name = title_of(feeder) or feeder.get("class_type", "?")
        raise _RefusedError(
            f"is fed by node {current[0]} ({name}), a value cannot replace that link",
            f"a link, or change node {current[0]} instead",
        )
    if ANY in expected.types:
        return value
    kinds = expected.types & LITERAL_TYPES
    if not kinds:
        return _checked_foreign(value, current, expected)
    allowed = allowed_values(expected)
    # Integers before floats: where both are welcome, 2 stays 2.
    for kind in sorted(kinds, key=["INT", "FLOAT", "BOOLEAN", "STRING", COMBO].index):
        fits, typed = _typed(kind, value, expected)
        if fits:
            break
    else:
        shown = json.dumps(value, default=str, ensure_ascii=False)
        raise _RefusedError(f"{shown[:80]} is not {_noun(expected)}", allowed)
    if isinstance(typed, int | float) and not isinstance(typed, bool):
        if expected.minimum is not None and typed < expected.minimum:
            raise _RefusedError(f"{typed} is below {expected.minimum}", allowed)
        if expected.maximum is not None and typed > expected.maximum:
            raise _RefusedError(f"{typed} is above {expected.maximum}", allowed)
    return typed


def _typed(kind: str, value: Any, expected: InputDefinition) -> tuple[bool, Any]:
    """Whether ``value`` is a ``kind``, and the value as nodes expect it. JSON does not tell 5 from 5.0; nodes do."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float) and not math.isfinite(value):
        return False, None
    if kind == "INT":
        whole = number and value == int(value)
        return whole, int(value) if whole else None
    if kind == "FLOAT":
        # An integer beyond the doubles has no float.
        fits = number and abs(value) <= 2**1023
        return fits, float(value) if fits else None
    if kind == COMBO:
        # 1 == True == 1.0 in Python, so the kind of the choice counts too.
        return any(value == choice and type(value) is type(choice) for choice in expected.choices), value
    return isinstance(value, str if kind == "STRING" else bool), value


def _noun(expected: InputDefinition) -> str:
    nouns = {"INT": "an integer", "FLOAT": "a number", "STRING": "text", "BOOLEAN": "true or false"}
    return nouns.get(expected.type, "one of its choices" if expected.type == COMBO else f"of type {expected.type}")


def _checked_foreign(value: Any, current: Any, expected: InputDefinition) -> Any:
    """Packs bring widget types of their own (colours, curves): only a value like the one in place is trusted."""
    if current is not None and type(value) is type(current):
        return value
    raise _RefusedError(f"takes {expected.type} over a link, not a value", allowed_values(expected))


def _checked_link(value: list[Any], expected: InputDefinition, prompt: Prompt, definitions: Definitions) -> list[Any]:
    if not is_link(value) or value[1] < 0:
        raise _RefusedError(f"{json.dumps(value, default=str)[:80]} is not a link", allowed_values(expected))
    source_id, slot = value
    source = prompt.get(source_id)
    if source is None:
        near = did_you_mean(source_id, prompt)
        raise _RefusedError(
            f"links to node {source_id!r}, which does not exist{_suggest(near)}", _listing(list(prompt))
        )
    definition = definitions.get(source["class_type"])
    if definition is None:
        raise _RefusedError(f"links to node {source_id}, whose class {source['class_type']!r} this engine has not")
    if slot >= len(definition.outputs):
        outputs = [f"{index} ({output.type})" for index, output in enumerate(definition.outputs)]
        message = f"node {source_id} ({definition.class_type}) has no output {slot}"
        raise _RefusedError(message, _listing(outputs) or "no output at all")
    given = frozenset(definition.outputs[slot].type.split(","))
    if ANY not in given | expected.types and not given & expected.types:
        message = (
            f"output {slot} of node {source_id} gives {definition.outputs[slot].type}, {expected.type} is wanted"
        )
        raise _RefusedError(message, f"an output of type {expected.type}")
    return value


def _circles(prompt: Prompt, linked: list[tuple[str, str]]) -> Iterator[Violation]:
    cycle = find_cycle(prompt)
    if cycle:
        path = next((path for node_id, path in linked if node_id in cycle), linked[0][1])
        yield Violation(
            path, f"the link closes a circle: {' -> '.join(cycle)}", "a node that does not depend on this one"
        )
