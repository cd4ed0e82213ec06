"""JSON values and the keys that a start and an update have in common (protocol.md 5.2).

Pure. What is wrong becomes a Violation; reading goes on, so that everything wrong is found at once, up to
MAX_VIOLATIONS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .errors import MalformedRequest, Violation
from .json_text import read_json

#: Keys with a meaning of their own (protocol.md 5.2); a node of that name or title cannot be addressed.
RESERVED = (
    "prompts",
    "prompt",
    "width",
    "height",
    "max_framerate",
    "latency_budget_ms",
    "fallback",
    "detect_out_resolution",
    "show_loading",
    "load_model",
)
#: Keys that say which stream or model a body is for, not what it asks.
ENVELOPE = ("stream_id", "gateway_request_id", "manifest_id", "model_id")


#: Pixels: below, an encoder has no macroblock; above, the gateway's ring buffer (5,000,000 bytes) takes no I-frame.
MIN_SIDE, MAX_SIDE = 16, 8192
#: Frames per second, ComfyStream's own range (comfystream src/comfystream/server/utils).
MAX_FRAMERATE = 60
#: Milliseconds. Below, a frame has no time to go anywhere; above, gateways have given up (protocol.md 1.8).
BUDGET_MS = (20, 30_000)
#: Characters. An id stands in every path, event and line of text about its node, and a line takes 64 KiB. ComfyUI's
#: are numbers; those of nested subgraphs have one more for each level.
MAX_NODE_ID = 256
#: That one answer names. A body of 16 MiB has room for a million, and nobody reads them; nothing of it counts anyhow.
MAX_VIOLATIONS = 100
#: ``stream.fallback.Policy`` has what each is.
POLICIES = ("auto", "passthrough", "hold", "overlay")


class Keys:
    """The keys that a start and an update have in common, read from one object; violations go to ``wrong``."""

    def __init__(self, values: dict[str, Any], prefix: str, wrong: list[Violation]) -> None:
        self._values = values
        self._prefix = prefix
        self._wrong = wrong
        self._bare = False

    def workflow(self) -> dict[str, Any] | None:
        """The workflow, {} when one is given without a node, None when none is given."""
        for key in ("prompts", "prompt"):
            if self._values.get(key) is not None:
                return self._workflow_of(self._values[key], self._prefix + key)
        rest = self.rest()
        if rest and all(isinstance(value, dict) and "class_type" in value for value in rest.values()):
            self._bare = True
            return self._workflow_of(rest, self._prefix + "prompts")
        return None

    def rest(self) -> dict[str, Any]:
        """Everything but reserved keys, the envelope and a bare workflow."""
        if self._bare:
            return {}
        return {key: value for key, value in self._values.items() if key not in RESERVED and key not in ENVELOPE}

    def size(self) -> tuple[int | None, int | None]:
        given = [key for key in ("width", "height") if self._values.get(key) is not None]
        if len(given) == 1:
            other = "height" if given == ["width"] else "width"
            self._refuse(other, f"width and height come together; only {given[0]} is given", "both, or neither")
        width, height = (self._side(key) if key in given else None for key in ("width", "height"))
        return width, height

    def framerate(self) -> int | None:
        return self._between("max_framerate", 1, MAX_FRAMERATE)

    def latency_budget_ms(self) -> int | None:
        return self._between("latency_budget_ms", *BUDGET_MS)

    def fallback(self) -> str | None:
        value = self._values.get("fallback")
        if value is None or value in POLICIES:
            return value
        self._refuse("fallback", f"is {shown(value)}", f"one of {', '.join(POLICIES)}")
        return None

    def _between(self, key: str, least: int, most: int) -> int | None:
        if self._values.get(key) is None:
            return None
        allowed = f"a whole number from {least} to {most}"
        value = self._whole(key, allowed)
        if value is not None and not least <= value <= most:
            self._refuse(key, f"is {value}", allowed)
            return None
        return value

    def switch(self, key: str) -> bool | None:
        value = self._values.get(key)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return value != 0
        if isinstance(value, str):
            text = value.strip().lower()
            if text in ("true", "1", "yes", "on"):
                return True
            if text in ("false", "0", "no", "off", ""):
                return False
        self._refuse(key, f"is {shown(value)}", "true or false")
        return None

    def _side(self, key: str) -> int | None:
        allowed = f"an even whole number from {MIN_SIDE} to {MAX_SIDE}"
        value = self._whole(key, allowed)
        if value is not None and (value % 2 or not MIN_SIDE <= value <= MAX_SIDE):
            self._refuse(key, f"is {value}", allowed)
            return None
        return value

    def _whole(self, key: str, allowed: str) -> int | None:
        """An int, also written as text or as a float without fraction: peers send all three."""
        value = self._values[key]
        if isinstance(value, str):
            try:
                return int(value)
            except ValueError:
                self._refuse(key, f"is {shown(value)}", allowed)
                return None
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self._refuse(key, f"is {shown(value)}", allowed)
        return None

    def _workflow_of(self, value: Any, path: str) -> dict[str, Any] | None:
        if isinstance(value, str):
            if not value.strip():
                return {}
            try:
                value = read_json(value)
            except MalformedRequest as exc:
                message = exc.message.replace("the body", "the text")
                self._wrong.append(Violation(path, message, "a workflow as object, list of them, or JSON text"))
                return None
        if isinstance(value, list):
            if not value:
                return {}
            value = next((item for item in value if isinstance(item, dict)), None)
        if not isinstance(value, dict):
            self._wrong.append(
                Violation(
                    path, f"holds no workflow but {kind(value)}", "a workflow as object, list of them, or JSON text"
                )
            )
            return None
        if not is_document(value):
            for node_id, node in value.items():
                if len(self._wrong) >= MAX_VIOLATIONS:
                    break
                self._check_node(str(node_id), node)
        return value

    def _check_node(self, node_id: str, node: Any) -> None:
        path = node_path(node_id)
        if len(node_id) > MAX_NODE_ID:
            message = f"the node id has {len(node_id)} characters"
            self._wrong.append(Violation(path, message, f"at most {MAX_NODE_ID} characters"))
            return
        if not isinstance(node, dict):
            self._wrong.append(Violation(path, f"is {kind(node)}", "an object with class_type and inputs"))
            return
        class_type = node.get("class_type")
        if not isinstance(class_type, str) or not class_type:
            self._wrong.append(Violation(f"{path}.class_type", f"is {shown(class_type)}", "the name of a node class"))
        if not isinstance(node.get("inputs", {}), dict):
            self._wrong.append(Violation(f"{path}.inputs", f"is {kind(node['inputs'])}", "an object"))

    def _refuse(self, key: str, message: str, allowed: str) -> None:
        self._wrong.append(Violation(self._prefix + key, message, allowed))


def is_document(workflow: Mapping[str, Any]) -> bool:
    """Whether this is what ComfyUI's page saves (``nodes`` and ``links``) instead of its API format."""
    return isinstance(workflow.get("nodes"), list)


def node_path(node_id: str) -> str:
    """``nodes.5``; what is too long for an id is cut, for many violations may have the path."""
    return f"nodes.{node_id if len(node_id) <= MAX_NODE_ID else shortened(node_id)}"


def kind(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    for kind, name in ((bool, "a boolean"), (dict, "an object"), (list, "a list"), (str, "text"), (int, "a number")):
        if isinstance(value, kind):
            return name
    return "a number"


def shown(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False, default=str))


def shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
