"""Findings of the engine and node definitions, as text for a terminal and as JSON for programs. Pure."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from proto import engine_pb2 as pb

#: Columns of a line of text; paths and names may be longer.
WIDTH = 100


def is_error(finding: pb.Finding) -> bool:
    return finding.severity == pb.Finding.SEVERITY_ERROR


def as_json(findings: Iterable[pb.Finding], comfyui: pb.ComfyUI) -> dict[str, Any]:
    """One object; ``runnable`` is what the exit code says."""
    listed = list(findings)
    return {
        "runnable": not any(map(is_error, listed)),
        "comfyui": {"version": comfyui.version, "node_classes": comfyui.node_classes, "directory": comfyui.directory},
        "findings": [
            {
                "severity": "error" if is_error(item) else "warning",
                "code": item.code,
                "path": item.path,
                "node_id": item.node_id,
                "class_type": item.class_type,
                "title": item.title,
                "input": item.input,
                "message": item.message,
                "remedy": item.remedy,
            }
            for item in listed
        ],
    }


def as_text(name: str, findings: Sequence[pb.Finding], comfyui: pb.ComfyUI) -> str:
    """A line of summary, then one block for each finding, those of one node together."""
    errors = sum(map(is_error, findings))
    warnings = len(findings) - errors
    counts = [_count(errors, "error"), _count(warnings, "warning")]
    verdict = ", ".join(count for count in counts if count) or "runs"
    against = f"ComfyUI {comfyui.version}, {comfyui.node_classes} node classes" if comfyui.version else "no ComfyUI"
    return "\n\n".join([f"{name}: {verdict} ({against})", *map(_block, findings)])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}" if number else ""


def _block(finding: pb.Finding) -> str:
    where = []
    if finding.node_id:
        title = f' "{finding.title}"' if finding.title and finding.title != finding.class_type else ""
        where = [f"node {finding.node_id}{title} ({finding.class_type or 'no class'})"]
        where += [f"input {finding.input}"] if finding.input else []
    head = "  ".join(["error  " if is_error(finding) else "warning", finding.code, ", ".join(where)]).rstrip()
    body = [finding.message]
    body += [f"-> {finding.remedy}"] if finding.remedy else []
    return "\n".join([head, *(_wrapped(text) for text in body)])


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False
    )


def node_lines(nodes: Sequence[pb.NodeDefinition]) -> list[str]:
    """One line for each class; of a single one everything that is known."""
    if len(nodes) == 1:
        return _details(nodes[0])
    width = min(max((len(node.class_type) for node in nodes), default=0), 44)
    return [
        f"{node.class_type:{width}}  {node.category or '-'}  -> "
        f"{', '.join(output.type for output in node.outputs) or 'nothing'}"
        for node in sorted(nodes, key=lambda node: node.class_type)
    ]


def _details(node: pb.NodeDefinition) -> list[str]:
    lines = [f"{node.class_type}: {node.display_name}, {node.category or 'no category'}, from {node.pack}"]
    if node.description:
        lines.append(_wrapped(node.description))
    lines += [f"  {item.name}: {_kind(item)}" for item in node.inputs]
    outputs = [f"{index} {item.name} ({item.type})" for index, item in enumerate(node.outputs)]
    return [*lines, f"  outputs: {', '.join(outputs) or 'none'}"]


def _kind(item: pb.InputDefinition) -> str:
    parts = [item.type if item.required else f"{item.type}, optional"]
    low = f"{item.minimum:g}" if item.HasField("minimum") else ""
    high = f"{item.maximum:g}" if item.HasField("maximum") else ""
    parts += [f"{low}..{high}"] if low or high else []
    choices = ", ".join(item.choices_json[:12]) + (", ..." if len(item.choices_json) > 12 else "")
    parts += [f"one of {choices}"] if choices else []
    parts += [f"default {item.default_json}"] if item.default_json else []
    return ", ".join(parts)


def nodes_json(nodes: Iterable[pb.NodeDefinition]) -> list[dict[str, Any]]:
    """Classes with their inputs and outputs, as the engine describes them."""
    return [
        {
            "class_type": node.class_type,
            "display_name": node.display_name,
            "category": node.category,
            "pack": node.pack,
            "output_node": node.output_node,
            "inputs": [
                {"name": item.name, "type": item.type, "required": item.required}
                | ({"default": json.loads(item.default_json)} if item.default_json else {})
                | ({"min": item.minimum} if item.HasField("minimum") else {})
                | ({"max": item.maximum} if item.HasField("maximum") else {})
                | ({"choices": [json.loads(choice) for choice in item.choices_json]} if item.choices_json else {})
                for item in node.inputs
            ],
            "outputs": [{"name": item.name, "type": item.type} for item in node.outputs],
        }
        for node in sorted(nodes, key=lambda node: node.class_type)
    ]
