"""Which graphs the plan can hold. The others run through ComfyUI's own executor; the reason is one sentence part."""

from __future__ import annotations

from typing import Any, Final

from .plan_parts import TESTED_VERSIONS, Parts
from .runner import NodeFailed
from .workflow import Prompt

#: Hidden inputs through which a node looks at, or changes, what the executor is about to do.
_HIDDEN_OF_THE_EXECUTOR: Final = ("DYNPROMPT", "EXECUTION_LIST")
_V3_HOOKS: Final = ("PREPARE_CLASS_CLONE", "EXECUTE_NORMALIZED", "EXECUTE_NORMALIZED_ASYNC", "VALIDATE_CLASS")


class NeedsExecutor(NodeFailed):
    """Only a running node showed that the plan cannot hold its graph; ComfyUI's executor has to take over."""

    def __init__(self, node_id: str, class_type: str, what: str) -> None:
        super().__init__(node_id, class_type, "NeedsExecutor", f"the plan cannot hold a node that {what}")
        self.reason = f"node {node_id} ({class_type}) {what}"


def obstacle(parts: Parts, prompt: Prompt) -> str:
    """Why the plan cannot hold this prompt; empty when it can, as far as anyone knows before it runs.

    Unknown classes are no obstacle: validation has more to say about them.
    """
    if parts.version not in TESTED_VERSIONS:
        return f"ComfyUI {parts.version} is none of those the plan is tested with ({', '.join(TESTED_VERSIONS)})"
    if name := parts.replaced():
        return f"a node pack replaced {name} of ComfyUI's executor"
    for node_id, node in prompt.items():
        node_class = parts.nodes.NODE_CLASS_MAPPINGS.get(node["class_type"])
        reason = "" if node_class is None else _obstacle_in(parts, node_class)
        if any(key in node for key in ("_loop_body", "_loop_end")):
            reason = "is part of a loop"
        if reason:
            return f"node {node_id} ({node['class_type']}) {reason}"
    return ""


def _obstacle_in(parts: Parts, node_class: Any) -> str:
    if issubclass(node_class, parts.v3_node):
        return _obstacle_in_v3(node_class)
    hidden = node_class.INPUT_TYPES().get("hidden", {})
    asked = [kind for kind in hidden.values() if kind in _HIDDEN_OF_THE_EXECUTOR]
    return f"asks for the hidden input {asked[0]}" if asked else ""


def _obstacle_in_v3(node_class: Any) -> str:
    schema = node_class.GET_SCHEMA()
    if getattr(schema, "enable_expand", False):
        return "may expand into other nodes"
    for item in schema.hidden or ():
        if getattr(item, "value", item) in _HIDDEN_OF_THE_EXECUTOR:
            return f"asks for the hidden input {item.value}"
    for item in schema.inputs or ():
        if any(base.__name__ == "DynamicInput" for base in type(item).__mro__):
            return f"has the dynamic input {item.id}"
    base = node_class.GET_BASE_CLASS()
    for name in _V3_HOOKS:
        hooks = [getattr(getattr(owner, name, None), "__func__", None) for owner in (node_class, base)]
        if hooks[0] is not hooks[1]:
            return f"overrides {name}"
    return ""
