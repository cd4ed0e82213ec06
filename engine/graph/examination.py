"""ComfyUI's own validation of a prompt, made to say everything at once and in findings.

Left alone it stops at the first unknown class or output, looks only at what its outputs lead to, does not look behind
a link that is wrong, and raises on links that lead nowhere. So what is broken is looked for first, ComfyUI sees the
sound rest, and each node that an output needs is looked at by itself.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .findings import Finding, Prompt, Severity, finding
from .models import missing_model, places
from .policy import Policy
from .schema import Definitions
from .validation import check, check_choices, reachable, sound_part, translated


class Examiner:
    """Calls into a loaded ComfyUI, on its thread. ``execution``, ``nodes`` and ``folder_paths`` are its modules."""

    def __init__(
        self,
        execution: Any,
        nodes: Any,
        folder_paths: Any,
        directory: Path,
        leaves_choices_open: Callable[[Any], bool],
    ) -> None:
        self._execution = execution
        self._nodes = nodes
        self._folder_paths = folder_paths
        self._directory = directory
        self._leaves_choices_open = leaves_choices_open

    def examine(
        self, prompt: Prompt, definitions: Definitions, policy: Policy, loop: asyncio.AbstractEventLoop
    ) -> tuple[Prompt, list[Finding]]:
        """A copy with its values as ComfyUI converts them ("512" for an INT becomes 512), and the findings.

        The copy is whole only if no finding is an error.
        """
        findings = check(prompt, definitions, policy)
        copy, broken = sound_part(prompt, definitions)
        valid, error, node_errors = False, {"message": "", "details": ""}, {}
        if len(copy) == len(prompt) and not broken:
            valid, error, _, node_errors = loop.run_until_complete(
                self._execution.validate_prompt(str(uuid.uuid4()), copy, None)
            )
        if not valid:
            node_errors |= loop.run_until_complete(self._errors_of(copy, reachable(prompt, definitions), definitions))
        said = {(item.node_id, item.input) for item in findings} | broken
        refused = {item.node_id for item in findings if item.code == "refused_node"}
        for item in self._value_findings(prompt, copy, node_errors, definitions):
            if item.node_id not in refused and (item.input == "" or (item.node_id, item.input) not in said):
                findings.append(item)
                said.add((item.node_id, item.input))
        silent = not any(item.severity is Severity.ERROR for item in findings)
        # That nothing goes out is said by whoever made the ends live.
        if not valid and silent and error["message"] and error.get("type") != "prompt_no_outputs":
            text = f"{error['message']} {error['details']}".strip()
            findings.append(finding("refused_by_comfyui", text, "queue it in ComfyUI itself to see more"))
        return copy, findings

    async def _errors_of(self, prompt: Prompt, node_ids: list[str], definitions: Definitions) -> dict[str, Any]:
        """What ComfyUI says about each of these nodes, in the shape of ``validate_prompt``.

        A class's own check may raise, where an input that it looks at is missing or linked; what ComfyUI had found is
        lost then.
        """
        validated: dict[str, Any] = {}
        for node_id in node_ids:
            if node_id not in prompt or node_id in validated:
                continue
            try:
                await self._execution.validate_inputs(str(uuid.uuid4()), prompt, node_id, validated)
            except Exception as exc:  # whatever a pack's code raises is a finding of its node
                missing = [
                    {"type": "required_input_missing", "extra_info": {"input_name": item.name}}
                    for item in definitions[prompt[node_id]["class_type"]].inputs
                    if item.required and item.name not in prompt[node_id]["inputs"]
                ]
                text = f"its own check of its inputs failed: {type(exc).__name__}: {exc}"
                validated[node_id] = (False, missing or [{"type": "check_failed", "message": text}], node_id)
        return {node_id: {"errors": errors} for node_id, (_, errors, _) in validated.items() if errors}

    def _value_findings(
        self, prompt: Prompt, sound: Prompt, node_errors: Mapping[str, Any], definitions: Definitions
    ) -> Iterator[Finding]:
        for node_id in sound:
            if self._leaves_choices_open(self._nodes.NODE_CLASS_MAPPINGS[prompt[node_id]["class_type"]]):
                for item in check_choices(sound, node_id, definitions):
                    yield self._as_missing(prompt, item, definitions)
        for node_id, errors in node_errors.items():
            for error in errors["errors"]:
                yield self._as_missing(prompt, translated(prompt, node_id, definitions, error), definitions)

    def _as_missing(self, prompt: Prompt, item: Finding, definitions: Definitions) -> Finding:
        """A choice that is no choice, of an input that names a model file, means that the file is missing."""
        expected = definitions[item.class_type].input(item.input) if item.code == "unknown_choice" else None
        if expected is None or not expected.folder:
            return item
        where = places(expected.folder, self._folder_paths, self._directory)
        return missing_model(prompt, item.node_id, expected, where)
