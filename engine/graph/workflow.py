"""Workflows as they arrive: ComfyUI's API format, checked and given a live input and output.

An API-format prompt maps node ids to ``{"class_type", "inputs", "_meta"}``; a link is ``[node_id, output_index]``.
ComfyStream's rules (protocol.md 5.3) decide which nodes are the live ends. Everything that can be said without node
definitions is said here, all of it at once; what needs them is said by ``schema`` and by ComfyUI itself.
"""

from __future__ import annotations

import difflib
import graphlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

Prompt = dict[str, dict[str, Any]]

#: A workflow of ComfyStream has 2 to 26 nodes; a thousand is far beyond any and bounds what a check can cost.
MAX_NODES: Final = 1000

LIVE_IMAGE_INPUT: Final = "LoadTensor"
LIVE_IMAGE_OUTPUT: Final = "SaveTensor"
PRIMARY_INPUT: Final = "PrimaryInputLoadImage"
FILE_IMAGE_INPUT: Final = "LoadImage"
FILE_IMAGE_OUTPUTS: Final = ("PreviewImage", "SaveImage")
INPUT_CLASSES: Final = (LIVE_IMAGE_INPUT, FILE_IMAGE_INPUT, "LoadAudioTensor")
OUTPUT_CLASSES: Final = (LIVE_IMAGE_OUTPUT, *FILE_IMAGE_OUTPUTS, "SaveAudioTensor", "SaveTextTensor")

# Limits of ComfyStream's convert_prompt; the words of the messages are its own, gateways match on them.
MAX_PRIMARY_INPUTS: Final = 1
MAX_INPUTS: Final = 2
MAX_OUTPUTS: Final = 3

#: What runs when no workflow is given: the picture, unchanged.
PASS_THROUGH: Final[Mapping[str, Mapping[str, Any]]] = {
    "1": {"class_type": LIVE_IMAGE_INPUT, "inputs": {}, "_meta": {"title": "Live input"}},
    "2": {"class_type": LIVE_IMAGE_OUTPUT, "inputs": {"images": ["1", 0]}, "_meta": {"title": "Live output"}},
}


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or odd, in a workflow.

    ``code`` is stable and snake case; ``path`` reads ``nodes.5.inputs.strength``; ``remedy`` says what to do.
    """

    severity: Severity
    code: str
    message: str
    remedy: str = ""
    path: str = ""
    node_id: str = ""
    class_type: str = ""
    title: str = ""
    input: str = ""

    def __str__(self) -> str:
        where = f"node {self.node_id} ({self.class_type or 'no class'}): " if self.node_id else ""
        return f"{where}{self.message}{'; ' + self.remedy if self.remedy else ''}"


class WorkflowError(ValueError):
    """The workflow cannot run; ``findings`` has every reason, warnings too."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        errors = [finding for finding in self.findings if finding.severity is Severity.ERROR]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        super().__init__(f"{errors[0]}{more}" if errors else "the workflow cannot run")


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


def title_of(node: Mapping[str, Any]) -> str:
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, Mapping) else None
    return title if isinstance(title, str) else ""


def finding(
    code: str,
    message: str,
    remedy: str = "",
    *,
    prompt: Mapping[str, Any] | None = None,
    node_id: str = "",
    input: str = "",
    severity: Severity = Severity.ERROR,
) -> Finding:
    """A finding about a node, or one input of it, with class and title read from ``prompt``."""
    node = (prompt or {}).get(node_id)
    node = node if isinstance(node, Mapping) else {}
    class_type = node.get("class_type")
    path = f"nodes.{node_id}" + (f".inputs.{input}" if input else "") if node_id else ""
    return Finding(
        severity,
        code,
        message,
        remedy,
        path,
        node_id,
        class_type if isinstance(class_type, str) else "",
        title_of(node),
        input,
    )


def did_you_mean(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Up to three names that look like ``name``, best first; letter case does not count."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    return tuple(by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=0.6))


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
    findings = [*check_links(prompt), *_check_ends(prompt)]
    if any(item.severity is Severity.ERROR for item in findings):
        raise WorkflowError(findings)
    return Workflow(_make_live(prompt), tuple(findings))


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
                remedy = f"did you mean {_or(near)}?" if near else "add the node or link to another"
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


def _check_ends(prompt: Prompt) -> list[Finding]:
    def of(*classes: str) -> list[str]:
        return [node_id for node_id, node in prompt.items() if node["class_type"] in classes]

    def about(
        ids: Sequence[str], code: str, message: str, remedy: str, severity: Severity = Severity.ERROR
    ) -> Finding:
        listed = f" (nodes {', '.join(ids)})" if len(ids) > 1 else ""
        return finding(
            code, message + listed, remedy, prompt=prompt, node_id=ids[-1] if ids else "", severity=severity
        )

    primaries, inputs, files = of(PRIMARY_INPUT), of(*INPUT_CLASSES), of(FILE_IMAGE_INPUT)
    outputs, pictures = of(*OUTPUT_CLASSES), of(LIVE_IMAGE_OUTPUT, *FILE_IMAGE_OUTPUTS)
    findings: list[Finding] = []
    if len(primaries) > MAX_PRIMARY_INPUTS:
        findings.append(about(primaries, "too_many_primary_inputs", "too many primary inputs in prompt", "keep one"))
    if not primaries and len(inputs) > MAX_INPUTS:
        remedy = f"keep at most {MAX_INPUTS}, or make the live one a {PRIMARY_INPUT}"
        findings.append(about(inputs, "too_many_inputs", "too many inputs in prompt", remedy))
    elif not primaries and len(files) > 1 and len(files) == len(inputs):
        remedy = f"make the live one a {PRIMARY_INPUT} or a {LIVE_IMAGE_INPUT}"
        findings.append(
            about(files, "ambiguous_input", "two LoadImage nodes and nothing that says which is live", remedy)
        )
    elif not primaries and len(files) == 1 and len(inputs) > 1 and of(LIVE_IMAGE_INPUT):
        remedy = f"make the live one a {PRIMARY_INPUT} if this LoadImage should show its file"
        message = "the only LoadImage becomes the live picture too"
        findings.append(about(files, "file_becomes_live", message, remedy, Severity.WARNING))
    if not primaries and not inputs:
        findings.append(
            about([], "missing_input", "missing input", f"add a {LIVE_IMAGE_INPUT} or {FILE_IMAGE_INPUT} node")
        )
    if not outputs:
        findings.append(about([], "missing_output", "missing output", f"add a {LIVE_IMAGE_OUTPUT} or SaveImage node"))
    if len(outputs) > MAX_OUTPUTS:
        remedy = f"keep at most {MAX_OUTPUTS}"
        findings.append(about(outputs, "too_many_outputs", "too many outputs in prompt", remedy))
    elif len(pictures) > 1:
        message = f"several picture outputs, viewers see node {pictures[0]}"
        findings.append(about(pictures, "several_outputs", message, "keep one", Severity.WARNING))
    return findings


def _make_live(prompt: Prompt) -> Prompt:
    """Ids, titles and links stay: overrides and remarks about a node still find it."""
    files = [node_id for node_id, node in prompt.items() if node["class_type"] == FILE_IMAGE_INPUT]
    primary = any(node["class_type"] == PRIMARY_INPUT for node in prompt.values())
    for node_id, node in prompt.items():
        if node["class_type"] == PRIMARY_INPUT or (not primary and files == [node_id]):
            node["class_type"], node["inputs"] = LIVE_IMAGE_INPUT, {}
        elif node["class_type"] in FILE_IMAGE_OUTPUTS:
            node["class_type"] = LIVE_IMAGE_OUTPUT
    return prompt


def _or(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
