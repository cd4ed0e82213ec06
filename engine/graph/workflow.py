"""Workflows as they arrive, in ComfyUI's API format or as its editor saves them, given a live input and output.

An API-format prompt maps node ids to ``{"class_type", "inputs", "_meta"}``; a link is ``[node_id, output_index]``.
ComfyStream's rules (protocol.md 5.3) decide which nodes are the live ends. Everything that can be said without node
definitions is said here, all of it at once; what needs them is said by ``validation`` and by ComfyUI itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .editor import is_drawing, to_prompt
from .findings import Finding, Prompt, Severity, WorkflowError, any_of, did_you_mean, finding, title_of
from .links import Circle, check_links, circles, find_cycle, is_link, plain
from .live_ends import LIVE_IMAGE_INPUT, LIVE_IMAGE_OUTPUT, check_ends, is_primary, make_live
from .schema import Definitions

__all__ = [
    "MAX_NODES",
    "MAX_NODE_ID",
    "PASS_THROUGH",
    "Circle",
    "Finding",
    "Prompt",
    "Reading",
    "Severity",
    "Workflow",
    "WorkflowError",
    "any_of",
    "check_links",
    "circles",
    "decode",
    "did_you_mean",
    "find_cycle",
    "finding",
    "is_drawing",
    "is_link",
    "is_pass_through",
    "parse",
    "read",
    "title_of",
]

#: A workflow of ComfyStream has 2 to 26 nodes; a thousand is far beyond any and bounds what a check can cost.
MAX_NODES: Final = 1000

#: Characters. An id stands in every finding and every line of text about its node; the shim refuses longer ones too.
MAX_NODE_ID: Final = 256

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
    takes_mask: bool = field(init=False)  # of a live picture

    def __post_init__(self) -> None:
        def ids(class_type: str) -> tuple[str, ...]:
            return tuple(node_id for node_id, node in self.prompt.items() if node["class_type"] == class_type)

        object.__setattr__(self, "image_inputs", ids(LIVE_IMAGE_INPUT))
        object.__setattr__(self, "image_outputs", ids(LIVE_IMAGE_OUTPUT))
        object.__setattr__(self, "audio_inputs", ids("LoadAudioTensor"))
        object.__setattr__(self, "audio_outputs", ids("SaveAudioTensor"))
        object.__setattr__(self, "text_outputs", ids("SaveTextTensor"))
        values = (value for node in self.prompt.values() for value in node["inputs"].values())
        takes_mask = any(is_link(value) and value[1] == 1 and value[0] in self.image_inputs for value in values)
        object.__setattr__(self, "takes_mask", takes_mask)

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


@dataclass(frozen=True)
class Reading:
    """What a document says. ``prompt`` is what of it can be checked further, its live ends in place: all of it unless
    a finding is an error, nothing (None) when it is no workflow at all."""

    prompt: Prompt | None
    findings: tuple[Finding, ...] = ()

    @property
    def is_sound(self) -> bool:
        return not any(item.severity is Severity.ERROR for item in self.findings)

    def workflow(self) -> Workflow:
        """Raises WorkflowError with every finding if one is an error."""
        if self.prompt is None or not self.is_sound:
            raise WorkflowError(self.findings)
        return Workflow(self.prompt, self.findings)


def parse(source: str | bytes | Mapping[str, Any] | None, *, max_nodes: int = MAX_NODES) -> Workflow:
    """Read a workflow in API format and make its ends live. ``None`` and blank text give pass-through.

    ``source`` stays untouched. Raises WorkflowError with every finding.
    """
    return read(decode(source), max_nodes=max_nodes).workflow()


def decode(source: str | bytes | Mapping[str, Any] | None) -> Any:
    """The document that a text holds; pass-through for none. Raises WorkflowError if the text is not JSON."""
    if source is None or (isinstance(source, str | bytes) and not source.strip()):
        return PASS_THROUGH
    if not isinstance(source, str | bytes):
        return source

    try:
        return load_json(source)
    except ValueError as exc:
        problem = f"the workflow is not JSON: {exc}"
    raise WorkflowError([finding("not_json", problem, "send ComfyUI's API format")])


def load_json(source: str | bytes) -> Any:
    """The value that a text holds, without what Python reads beside JSON, and without strings that are no text.

    Raises ValueError with a sentence.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(source, parse_constant=refuse, parse_float=_finite)
        escapes = "\\u" in source if isinstance(source, str) else b"\\u" in source
        if escapes:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:  # which is a ValueError itself
        raise ValueError("a string holds half of a surrogate pair") from None
    return value


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is beyond the numbers that a double has")
    return number


def read(document: Any, *, max_nodes: int = MAX_NODES, definitions: Definitions | None = None) -> Reading:
    """Read a decoded document and make its ends live, as far as that goes; it stays untouched.

    definitions: of the loaded ComfyUI's nodes; a document of the editor needs them.
    """
    findings: list[Finding] = []
    known: Collection[str] = ()
    try:
        if is_drawing(document) and definitions is not None:
            prompt, findings = to_prompt(document, definitions, max_nodes=max_nodes)
            known = {item.node_id for item in findings}  # what could not be converted is there all the same
            if not prompt and not findings:
                findings = [finding("empty_workflow", "the workflow has no node that runs", "switch nodes on")]
        else:
            findings = _check_document(document, max_nodes)
            if findings:
                return Reading(None, tuple(findings))
            known = document.keys()
            prompt = {}
            for node_id, node in document.items():
                wrong = _check_node(document, node_id, node)
                findings += wrong
                if not wrong:
                    prompt[node_id] = _own_node(node)
    except RecursionError:
        deep = finding("not_json", "an input's value is nested too deeply", "make it flatter")
        return Reading(None, (deep,))
    if not prompt:
        return Reading(None, tuple(findings))
    findings += check_links(prompt, known)
    ends = check_ends(prompt)
    sound = not any(item.severity is Severity.ERROR for item in ends)
    return Reading(make_live(prompt, every_file=not sound), (*findings, *ends))


def _own_node(node: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the fields that count. The rest must not travel: the executor takes ``is_changed`` of a node for
    its own note and would never run the node again."""
    title = title_of(node)
    inputs = {name: plain(value) for name, value in _copy(node.get("inputs", {})).items()}
    meta = ({"title": title} if title else {}) | ({"primary": True} if is_primary(node) else {})
    return {"class_type": node["class_type"], "inputs": inputs} | ({"_meta": meta} if meta else {})


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


def _check_document(document: Any, max_nodes: int) -> list[Finding]:
    if not isinstance(document, Mapping):
        return [finding("not_a_workflow", "the workflow is not a JSON object", "send ComfyUI's API format")]
    if is_drawing(document):
        return [
            finding(
                "ui_format",
                "this is the editor's own format, which can be read only with the node definitions of a ComfyUI",
                "export it in API format (in ComfyUI: Workflow, Export (API)), or give the engine a ComfyUI",
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
    return []


def _check_node(document: Mapping[str, Any], node_id: Any, node: Any) -> list[Finding]:
    if not isinstance(node_id, str) or not node_id:
        return [finding("bad_node_id", f"node id {node_id!r} is not text", "write it in quotes")]
    if len(node_id) > MAX_NODE_ID:
        shown = node_id[:77] + "..."
        message = f"node id {shown!r} has {len(node_id)} characters"
        return [finding("bad_node_id", message, f"give it at most {MAX_NODE_ID}", node_id=shown)]
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
