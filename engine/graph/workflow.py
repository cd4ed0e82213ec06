"""Workflows as they arrive: ComfyUI's API format, checked and given a live input and output.

An API-format prompt maps node ids to ``{"class_type", "inputs", "_meta"}``; a link is ``[node_id, output_index]``.
ComfyStream's rules (protocol.md 5.3) decide which nodes are the live ends. Everything that can be said without node
definitions is said here, all of it at once; what needs them is said by ``schema`` and by ComfyUI itself.
"""

from __future__ import annotations

import graphlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .findings import Finding, Prompt, Severity, WorkflowError, any_of, did_you_mean, finding, title_of
from .live_ends import LIVE_IMAGE_INPUT, LIVE_IMAGE_OUTPUT, check_ends, make_live

__all__ = [
    "MAX_NODES",
    "PASS_THROUGH",
    "Finding",
    "Prompt",
    "Severity",
    "Workflow",
    "WorkflowError",
    "check_links",
    "did_you_mean",
    "find_cycle",
    "finding",
    "is_link",
    "is_pass_through",
    "parse",
    "title_of",
]

#: A workflow of ComfyStream has 2 to 26 nodes; a thousand is far beyond any and bounds what a check can cost.
MAX_NODES: Final = 1000

#: What runs when no workflow is given: the picture, unchanged.
PASS_THROUGH: Final[Mapping[str, Mapping[str, Any]]] = {
    "1": {"class_type": LIVE_IMAGE_INPUT, "inputs": {}, "_meta": {"title": "Live input"}},
    "2": {"class_type": LIVE_IMAGE_OUTPUT, "inputs": {"images": ["1", 0]}, "_meta": {"title": "Live output"}},
}


@dataclass(frozen=True)
class Workflow:
    """A prompt whose live ends are ``LoadTensor`` and ``SaveTensor``; node ids are those of the original.

    ``image_outputs`` in the order of the document: the first one is the picture that viewers see.
    """

    prompt: Prompt
    warnings: tuple[Finding, ...] = ()
    image_inputs: tuple[str, ...] = field(init=False)
    image_outputs: tuple[str, ...] = field(init=False)
    audio_inputs: tuple[str, ...] = field(init=False)
    audio_outputs: tuple[str, ...] = field(init=False)
    text_outputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        def ids(class_type: str) -> tuple[str, ...]:
            return tuple(node_id for node_id, node in self.prompt.items() if node["class_type"] == class_type)

        object.__setattr__(self, "image_inputs", ids(LIVE_IMAGE_INPUT))
        object.__setattr__(self, "image_outputs", ids(LIVE_IMAGE_OUTPUT))
        object.__setattr__(self, "audio_inputs", ids("LoadAudioTensor"))
        object.__setattr__(self, "audio_outputs", ids("SaveAudioTensor"))
        object.__setattr__(self, "text_outputs", ids("SaveTextTensor"))

    @property
    def is_pass_through(self) -> bool:
        """True when the live pictures come out as they went in: it runs without ComfyUI."""
        return is_pass_through(self.prompt)


def is_pass_through(prompt: Mapping[str, Mapping[str, Any]]) -> bool:
    """True when every node is a live image end and every output is fed by the input itself."""
    classes = {node["class_type"] for node in prompt.values()}
    return classes == {LIVE_IMAGE_INPUT, LIVE_IMAGE_OUTPUT} and all(
        is_link(source := node["inputs"].get("images"))
        and source[1] == 0
        and source[0] in prompt
        and prompt[source[0]]["class_type"] == LIVE_IMAGE_INPUT
        for node in prompt.values()
        if node["class_type"] == LIVE_IMAGE_OUTPUT
    )


def is_link(value: Any) -> bool:
    """ComfyUI's own rule, except that an output index is an integer and nothing else."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )


def parse(source: str | bytes | Mapping[str, Any] | None, *, max_nodes: int = MAX_NODES) -> Workflow:
    """Read a workflow and make its ends live. ``None`` and blank text give pass-through; ``source`` stays untouched.

    Raises WorkflowError with every finding.
    """
    if source is None or (isinstance(source, str | bytes) and not source.strip()):
        return Workflow(_own({node_id: dict(node) for node_id, node in PASS_THROUGH.items()}))
    document = _decode(source) if isinstance(source, str | bytes) else source
    findings = _check_shape(document, max_nodes)
    if findings:
        raise WorkflowError(findings)
    try:
        prompt = _own(document)
    except RecursionError:
        raise WorkflowError(
            [finding("not_json", "an input's value is nested too deeply", "make it flatter")]
        ) from None
    findings = [*check_links(prompt), *check_ends(prompt)]
    if any(item.severity is Severity.ERROR for item in findings):
        raise WorkflowError(findings)
    return Workflow(make_live(prompt), tuple(findings))


def _decode(text: str | bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as exc:  # JSONDecodeError and UnicodeDecodeError included
        reason = str(exc)
    raise WorkflowError([finding("not_json", f"the workflow is not JSON: {reason}", "send ComfyUI's API format")])


def _own(document: Mapping[str, Any]) -> Prompt:
    """A copy with the fields that count. The rest must not travel: the executor takes ``is_changed`` of a node for
    its own note and would never run the node again."""
    return {
        node_id: {"class_type": node["class_type"], "inputs": _copy(node.get("inputs", {}))}
        | ({"_meta": {"title": title_of(node)}} if title_of(node) else {})
        for node_id, node in document.items()
    }


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


def _check_shape(document: Any, max_nodes: int) -> list[Finding]:
    if not isinstance(document, Mapping):
        return [finding("not_a_workflow", "the workflow is not a JSON object", "send ComfyUI's API format")]
    if isinstance(document.get("nodes"), list):
        return [
            finding(
                "ui_format",
                "this is the graph editor's own format, which holds a drawing rather than a prompt",
                "export it in API format (in ComfyUI: Workflow, Export (API))",
            )
        ]
    if not document:
        return [finding("empty_workflow", "the workflow has no node", "leave the workflow out for pass-through")]
    if len(document) > max_nodes:
        return [
            finding(
                "too_many_nodes",
                f"the workflow has {len(document)} nodes, the limit is {max_nodes}",
                "make it smaller",
            )
        ]
    return [problem for node_id, node in document.items() for problem in _check_node(document, node_id, node)]


def _check_node(document: Mapping[str, Any], node_id: Any, node: Any) -> list[Finding]:
    if not isinstance(node_id, str) or not node_id:
        return [finding("bad_node_id", f"node id {node_id!r} is not text", "write it in quotes")]
    code, message, remedy = "", "", ""
    if not isinstance(node, Mapping):
        code, remedy = "not_a_node", "send the prompt itself, without a wrapper"
        message = f"{node_id!r} is {_kind(node)}, a node is an object with class_type and inputs"
    elif not isinstance(node.get("class_type"), str) or not node["class_type"]:
        code, message, remedy = "missing_class_type", "the node has no class_type", "name the node's class"
    elif not isinstance(node.get("inputs", {}), Mapping):
        code, remedy = "bad_inputs", "make it an object of input names and values"
        message = f"inputs is {_kind(node['inputs'])}"
    return [finding(code, message, remedy, prompt=document, node_id=node_id)] if code else []


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def check_links(prompt: Prompt) -> list[Finding]:
    """Every list among the inputs is a link to a node that exists, and no node feeds itself."""
    findings: list[Finding] = []
    for node_id, node in prompt.items():
        for name, value in node["inputs"].items():
            if not isinstance(value, list):
                continue
            if not is_link(value) or value[1] < 0:
                message = f"{json.dumps(value, default=str)[:80]} is not a link"
                remedy = 'write ["node id", output index], or {"__value__": [...]} for a list that is a value'
                findings.append(finding("bad_link", message, remedy, prompt=prompt, node_id=node_id, input=name))
            elif value[0] not in prompt:
                near = did_you_mean(value[0], prompt)
                remedy = f"did you mean {any_of(near)}?" if near else "add the node or link to another"
                message = f"links to node {value[0]!r}, which does not exist"
                findings.append(finding("unknown_link", message, remedy, prompt=prompt, node_id=node_id, input=name))
    cycle = find_cycle(prompt)
    if cycle:
        message = f"nodes {' -> '.join(cycle)} feed each other in a circle"
        findings.append(finding("cycle", message, "cut one of these links", prompt=prompt, node_id=cycle[0]))
    return findings


def find_cycle(prompt: Prompt) -> list[str]:
    """Ids along one circle of links, the first id again at the end; empty when there is none."""
    feeds = {
        node_id: [value[0] for value in node["inputs"].values() if is_link(value) and value[0] in prompt]
        for node_id, node in prompt.items()
    }
    try:
        graphlib.TopologicalSorter(feeds).prepare()
    except graphlib.CycleError as exc:
        return list(exc.args[1])
    return []
