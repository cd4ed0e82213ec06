"""The live parameters of a stream as a page or a program needs them to build its knobs."""

from __future__ import annotations

import json
from typing import Any

from proto import engine_pb2 as pb


def schema_of(description: pb.SessionDescription, version: int) -> dict[str, Any]:
    """``version`` as the HTTP API counts it: it goes on over engine restarts."""
    return {
        "version": version,
        "runner": description.runner,
        "runner_reason": description.runner_reason,
        "parameters": [_parameter(each) for each in description.parameters],
    }


def _parameter(parameter: pb.Parameter) -> dict[str, Any]:
    definition = parameter.definition
    whole = "INT" in definition.type and "FLOAT" not in definition.type

    def number(name: str) -> float | int | None:
        if not definition.HasField(name):
            return None
        value: float = getattr(definition, name)
        return int(value) if whole else value

    return {
        "path": f"nodes.{parameter.node_id}.inputs.{definition.name}",
        "node_id": parameter.node_id,
        "title": parameter.title,
        "class_type": parameter.class_type,
        "input": definition.name,
        "type": definition.type,
        "required": definition.required,
        "default": _value(definition.default_json),
        "min": number("minimum"),
        "max": number("maximum"),
        "step": number("step"),
        "choices": [json.loads(choice) for choice in definition.choices_json],
        "multiline": definition.multiline,
        "tooltip": definition.tooltip,
        "linked": parameter.linked,
        "value": _value(parameter.value_json),
        "allowed": parameter.allowed,
    }


def _value(text: str) -> Any:
    """None where there is none."""
    return json.loads(text) if text else None
