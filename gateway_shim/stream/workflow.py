"""The workflow of a stream, as the shim keeps it for the engine's next session."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from proto import engine_pb2 as pb

from ..errors import Violation, WorkflowRefused
from ..params import Update

#: The pass-through graph, for streams that were started without a workflow.
PASS_THROUGH: dict[str, dict[str, Any]] = {
    "1": {"class_type": "LoadTensor", "inputs": {}, "_meta": {"title": "live input"}},
    "2": {"class_type": "SaveTensor", "inputs": {"images": ["1", 0]}, "_meta": {"title": "live output"}},
}


def merged(prompt: dict[str, Any], update: Update) -> dict[str, Any]:
    """``prompt`` with an update; ``prompt`` itself stays as it is."""
    result = copy.deepcopy(prompt if update.workflow is None else update.workflow)
    for node_id, inputs in update.overrides.items():
        result[node_id].setdefault("inputs", {}).update(inputs)
    return result


def raise_for_findings(findings: Sequence[pb.Finding]) -> None:
    """Raise WorkflowRefused with one violation for each error among ``findings``."""
    errors = [finding for finding in findings if finding.severity == pb.Finding.SEVERITY_ERROR]
    if errors:
        violations = tuple(
            Violation(error.path, f"{error.message}; {error.remedy}" if error.remedy else error.message)
            for error in errors
        )
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise WorkflowRefused(f"the workflow cannot run here: {errors[0].message}{more}", violations)
