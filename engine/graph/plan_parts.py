"""What the plan uses of a loaded ComfyUI, and whether that is what it was written and tested against."""

from __future__ import annotations

import asyncio
import types
from dataclasses import dataclass, field
from typing import Any, Final

#: Versions that the differential tests run against; on another one graphs run through its own executor.
TESTED_VERSIONS: Final = ("0.3.52", "0.3.75")

#: What the plan does in place of ComfyUI. A pack that replaces one of these changes what every node sees.
_REPLACED: Final = {
    "execution": (
        "get_input_data", "map_node_over_list", "resolve_map_node_over_list_results", "_async_map_node_over_list",
        "merge_result_data", "get_output_data", "get_output_from_returns", "execute",
        "IsChangedCache", "PromptExecutor",
    ),
    "comfy_execution.graph": ("get_input_info", "DynamicPrompt", "TopologicalSort", "ExecutionList"),
    "comfy_api.internal": ("first_real_override", "shallow_clone_class", "lock_class", "make_locked_method_func"),
}  # fmt: skip


def _members(modules: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module_name, names in _REPLACED.items():
        for name in names:
            value = getattr(modules[module_name], name, None)
            found[name] = value
            if isinstance(value, type):
                functions = {key: item for key, item in vars(value).items() if isinstance(item, types.FunctionType)}
                found.update({f"{name}.{key}": item for key, item in functions.items()})
    return found


@dataclass
class Parts:
    """ComfyUI's modules by name, as they are right after their import: before any pack of nodes could change them."""

    version: str
    modules: dict[str, Any]
    loop: asyncio.AbstractEventLoop
    _originals: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._originals = _members(self.modules)
        execution = self.modules["execution"]
        self.nodes: Any = self.modules["nodes"]
        self.blocker: type = execution.ExecutionBlocker
        self.v3_node: type = execution._ComfyNodeInternal
        self.v3_output: type = execution._NodeOutputInternal
        self.hidden: Any = execution.io.Hidden
        self.real_override: Any = execution.first_real_override
        self.locked_method: Any = execution.make_locked_method_func
        self.input_info: Any = execution.get_input_info
        self.dynamic_prompt: Any = execution.DynamicPrompt
        #: Whether a node gets what is behind a lazy input only if it asked for it, and not what another one needed.
        self.lazy_is_private = hasattr(self.modules["comfy_execution.graph"].ExecutionList, "cache_link")
        self.input_error: type[Exception] = self.modules["comfy_execution.graph"].NodeInputError
        self.progress: Any = self.modules["comfy_execution.progress"]
        context = self.modules["comfy_execution.utils"]
        self.context: Any = context.current_executing_context
        self.context_of: Any = context.ExecutionContext
        self.management: Any = self.modules["comfy.model_management"]
        self.server: Any = self.modules["server"].PromptServer.instance

    def replaced(self) -> str:
        """The name of a part of the executor that is not the one of the import any more; empty: all are."""
        present = _members(self.modules)
        return next((name for name, value in self._originals.items() if present.get(name) is not value), "")


#: Names of the modules that ``Parts`` wants.
MODULES: Final = (
    "execution", "nodes", "server", "comfy.model_management", "comfy_execution.graph", "comfy_execution.progress",
    "comfy_execution.utils", "comfy_api.internal",
)  # fmt: skip
