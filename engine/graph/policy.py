"""Which node classes a workflow from the network may use.

A workflow is somebody else's program. What it computes is its own affair; what it reads, writes and reaches is the
operator's. The table holds the classes of ComfyUI 0.3.75 that read or write files of its input, output and temporary
folders, judged by what their code does, and well-known classes of packs. Model loaders are not among them: they read
what the operator has put into the model folders, and nothing runs without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from .findings import Finding, Prompt, finding
from .io_nodes import NODE_CLASSES
from .schema import NodeDefinition

READS: Final = "reads files of this machine"
WRITES: Final = "writes files on this machine"
NETWORK: Final = "reaches the network"
RUNS: Final = "runs code or programs"

#: First match counts; patterns as the shell's, letter case counts.
TABLE: Final[tuple[tuple[str, str], ...]] = (
    # Core. A name that LoadImage and its kin are given may lead anywhere on the disk: only its existence is checked.
    ("LoadImage", READS),
    ("LoadImageMask", READS),
    ("LoadImageOutput", READS),
    ("LoadImage*FromFolder", READS),
    ("LoadLatent", READS),
    ("LoadAudio", READS),
    ("LoadVideo", READS),
    ("LoadTrainingDataset", READS),
    ("Load3D*", READS),
    ("RecordAudio", READS),
    ("WebcamCapture", READS),
    # These write a file for every frame, to show it in the editor.
    ("MaskPreview", WRITES),
    ("PreviewAudio", WRITES),
    ("Preview3D*", WRITES),
    ("LossGraphNode", WRITES),
    # Sends over a socket that nobody reads here.
    ("SaveImageWebsocket", ""),
    ("Save*", WRITES),
    ("CheckpointSave", WRITES),
    ("CLIPSave", WRITES),
    ("VAESave", WRITES),
    ("ModelSave", WRITES),
    ("LoraSave", WRITES),
    ("ImageOnlyCheckpointSave", WRITES),
    # Packs.
    ("VHS_VideoCombine", WRITES),
    ("VHS_Load*", READS),
    ("Image Save", WRITES),
    ("Image Load", READS),
    ("*FromUrl*", NETWORK),
    ("*FromURL*", NETWORK),
    ("*Webhook*", NETWORK),
    ("*HTTP*Request*", NETWORK),
    ("ExecPython*", RUNS),
    ("*PythonScript*", RUNS),
    ("*ShellCommand*", RUNS),
)


@dataclass(frozen=True)
class Policy:
    """``allow`` and ``deny`` are the operator's patterns of class names; a denied class is refused in any case."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()

    def reason(self, class_type: str, category: str = "") -> str:
        """Why a class is refused, as a verb and its object; empty when it is not."""
        if class_type in NODE_CLASSES:
            return ""
        if _matches(class_type, self.deny):
            return "is denied by this engine's setting deny_nodes"
        if _matches(class_type, self.allow):
            return ""
        if category == "api node" or category.startswith("api node/"):
            return NETWORK
        return next((reason for pattern, reason in TABLE if fnmatchcase(class_type, pattern)), "")

    def check(self, prompt: Prompt, definitions: Mapping[str, NodeDefinition]) -> list[Finding]:
        """One finding for each node of a refused class."""
        findings = []
        for node_id, node in prompt.items():
            class_type = node["class_type"]
            definition = definitions.get(class_type)
            reason = self.reason(class_type, definition.category if definition is not None else "")
            if reason:
                message = f"{class_type} {reason}, which workflows from the network may not"
                if reason not in (READS, WRITES, NETWORK, RUNS):
                    message = f"{class_type} {reason}"
                findings.append(
                    finding("refused_node", message, _remedy(class_type, reason), prompt=prompt, node_id=node_id)
                )
        return findings


def reads_files(class_type: str) -> bool:
    """Whether a class takes the name of a file outside the model folders."""
    return next((reason for pattern, reason in TABLE if fnmatchcase(class_type, pattern)), "") == READS


def _matches(class_type: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(class_type, pattern) for pattern in patterns)


def _remedy(class_type: str, reason: str) -> str:
    allow = f"let the operator allow it (HEADRACE_ENGINE_ALLOW_NODES={class_type})"
    if class_type == "LoadImage":
        return f"make the live one a PrimaryInputLoadImage, and for this one {allow}"
    if reason in (READS, WRITES, NETWORK, RUNS):
        return f"remove it, or {allow}"
    return "remove it"
