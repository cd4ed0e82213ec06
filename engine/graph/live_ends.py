"""Which nodes of a workflow are live, by ComfyStream's rules: its limits, and what is put in the place of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from .findings import Finding, Prompt, Severity, finding

LIVE_IMAGE_INPUT: Final = "LoadTensor"
LIVE_IMAGE_OUTPUT: Final = "SaveTensor"
PRIMARY_INPUT: Final = "PrimaryInputLoadImage"
FILE_IMAGE_INPUT: Final = "LoadImage"
FILE_IMAGE_OUTPUTS: Final = ("PreviewImage", "SaveImage")
INPUT_CLASSES: Final = (LIVE_IMAGE_INPUT, FILE_IMAGE_INPUT, "LoadAudioTensor")
OUTPUT_CLASSES: Final = (LIVE_IMAGE_OUTPUT, *FILE_IMAGE_OUTPUTS, "SaveAudioTensor", "SaveTextTensor")

# Limits of ComfyStream's convert_prompt; the words of the messages are its own.
MAX_PRIMARY_INPUTS: Final = 1
MAX_INPUTS: Final = 2
MAX_OUTPUTS: Final = 3


def is_primary(node: Mapping[str, Any]) -> bool:
    """Whether it is the primary input, or what was made of one: clients send the engine's own prompt again, and that
    has to mean the same."""
    meta = node.get("_meta")
    made = node["class_type"] == LIVE_IMAGE_INPUT and isinstance(meta, Mapping) and meta.get("primary") is True
    return made or node["class_type"] == PRIMARY_INPUT


def check_ends(prompt: Prompt) -> list[Finding]:
    """Whether there is one live input and an output, within ComfyStream's limits (protocol.md 5.3)."""

    def of(*classes: str) -> list[str]:
        return [node_id for node_id, node in prompt.items() if node["class_type"] in classes]

    def about(
        ids: Sequence[str], code: str, message: str, remedy: str, severity: Severity = Severity.ERROR
    ) -> Finding:
        listed = f" (nodes {', '.join(ids)})" if len(ids) > 1 else ""
        return finding(
            code, message + listed, remedy, prompt=prompt, node_id=ids[-1] if ids else "", severity=severity
        )

    primaries = [node_id for node_id, node in prompt.items() if is_primary(node)]
    inputs, files = of(*INPUT_CLASSES), of(FILE_IMAGE_INPUT)
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
        remedy = f"add a {LIVE_IMAGE_INPUT} if it should see the stream; as it is, it runs once for each frame"
        findings.append(about([], "missing_input", "missing input", remedy, Severity.WARNING))
    if not outputs:
        findings.append(about([], "missing_output", "missing output", f"add a {LIVE_IMAGE_OUTPUT} or SaveImage node"))
    sounds = of("SaveAudioTensor")
    if sounds and not of("LoadAudioTensor"):
        message = "sound without a live sound as input has no length; viewers hear the stream's own"
        findings.append(about(sounds, "missing_audio_input", message, "add a LoadAudioTensor", Severity.WARNING))
    if len(outputs) > MAX_OUTPUTS:
        remedy = f"keep at most {MAX_OUTPUTS}"
        findings.append(about(outputs, "too_many_outputs", "too many outputs in prompt", remedy))
    elif len(pictures) > 1:
        message = f"several picture outputs, viewers see node {pictures[0]}"
        findings.append(about(pictures, "several_outputs", message, "keep one", Severity.WARNING))
    return findings


def make_live(prompt: Prompt, *, every_file: bool = False) -> Prompt:
    """Replace the live ends' classes, in place.

    every_file: take every LoadImage for a live input, for a check that has said already that this is not clear.
    Ids, titles and links stay, so that overrides and remarks about a node still find it.
    """
    files = [node_id for node_id, node in prompt.items() if node["class_type"] == FILE_IMAGE_INPUT]
    primary = any(map(is_primary, prompt.values()))
    live_files = files if not primary and (every_file or len(files) == 1) else []
    for node_id, node in prompt.items():
        if is_primary(node):
            node["_meta"] = {**node.get("_meta", {}), "primary": True}
        if node["class_type"] == PRIMARY_INPUT or node_id in live_files:
            node["class_type"], node["inputs"] = LIVE_IMAGE_INPUT, {}
        elif node["class_type"] in FILE_IMAGE_OUTPUTS:
            node["class_type"] = LIVE_IMAGE_OUTPUT
    return prompt
