"""What is wrong, or odd, in a workflow, said so that a person can act on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

#: ComfyUI's API format: node id to ``{"class_type", "inputs", "_meta"}``.
Prompt = dict[str, dict[str, Any]]

#: Characters of a message: it may quote what a client sent, which may be megabytes.
MAX_MESSAGE: Final = 500
#: Characters of a name that is worth comparing; the comparison is quadratic.
MAX_NAME: Final = 200


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
        message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "...",
        remedy,
        path,
        node_id,
        class_type if isinstance(class_type, str) else "",
        title_of(node),
        input,
    )


def did_you_mean(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Up to three names that look like ``name``, best first; letter case does not count."""
    if len(name) > MAX_NAME:
        return ()
    by_folded = {candidate.casefold(): candidate for candidate in known}
    return tuple(by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=0.6))


def any_of(names: Sequence[str]) -> str:
    """``'a' or 'b'``."""
    return " or ".join(repr(name) for name in names)
