"""What a node class says about itself, read once: ComfyUI asks it again for every node in every tick."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from .io_nodes import _Live
from .plan_parts import Parts

_V1_HIDDEN: Final = ("PROMPT", "EXTRA_PNGINFO", "UNIQUE_ID", "AUTH_TOKEN_COMFY_ORG", "API_KEY_COMFY_ORG")


class NodeClass:
    """One node class, V1 or V3.

    fingerprint: name of its IS_CHANGED or fingerprint_inputs; empty: it changes with its inputs only.
    fingerprint_waits: that is a coroutine. lazy_check: it has a check_lazy_status. always_changed: one of our live
    ends. is_output, is_async: as they sound.
    """

    def __init__(self, parts: Parts, class_type: str, node_class: Any) -> None:
        self._parts = parts
        self.class_type = class_type
        self.node_class = node_class
        self.is_v3 = issubclass(node_class, parts.v3_node)
        self._every_input = node_class.INPUT_TYPES()
        self._declared: Mapping[str, Any] = self._every_input
        self._v3_hidden: tuple[Any, ...] = ()
        if self.is_v3:
            self._declared, schema = node_class.INPUT_TYPES(include_hidden=False, return_schema=True)
            self._v3_hidden = tuple(schema.hidden or ())
        self.is_output: bool = getattr(node_class, "OUTPUT_NODE", False) is True
        self.is_async: bool = inspect.iscoroutinefunction(getattr(node_class, node_class.FUNCTION))
        is_changed = getattr(getattr(node_class, "IS_CHANGED", None), "__func__", None)
        self.always_changed: bool = is_changed is _Live.IS_CHANGED.__func__  # type: ignore[attr-defined]
        self.fingerprint = self._fingerprint()
        fingerprint = getattr(node_class, self.fingerprint) if self.fingerprint else None
        self.fingerprint_waits: bool = inspect.iscoroutinefunction(fingerprint)
        if self.is_v3:
            self.lazy_check = parts.real_override(node_class, "check_lazy_status") is not None
        else:
            self.lazy_check = getattr(node_class, "check_lazy_status", None) is not None

    def _fingerprint(self) -> str:
        if self.is_v3 and self._parts.real_override(self.node_class, "fingerprint_inputs") is not None:
            return "fingerprint_inputs"
        return "IS_CHANGED" if hasattr(self.node_class, "IS_CHANGED") else ""

    @property
    def asks_for_the_prompt(self) -> bool:
        return self._parts.hidden.prompt in self._v3_hidden

    def is_declared(self, name: str) -> bool:
        return self._parts.input_info(self.node_class, name, self._declared)[1] is not None

    def is_raw(self, name: str) -> bool:
        """The node wants the link itself, not what comes through it."""
        options = self._parts.input_info(self.node_class, name, self._declared)[2]
        return bool(options and options.get("rawLink", False))

    def is_lazy(self, name: str) -> bool:
        options = self._parts.input_info(self.node_class, name, self._every_input)[2]
        return bool(options and options.get("lazy", False))

    def hidden_inputs(self, node_id: str, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """Hidden inputs of a V1 node, by the name of the argument."""
        if self.is_v3:
            return {}
        values = {"PROMPT": prompt, "UNIQUE_ID": node_id}
        declared = self._declared.get("hidden", {})
        return {
            name: values.get(kind) for name, kind in declared.items() if isinstance(kind, str) and kind in _V1_HIDDEN
        }

    def bound(self, subject: Any, name: str, hidden: Mapping[Any, Any] | None) -> Callable[..., Any]:
        """The method ``name`` of ``subject``, an instance or the class itself.

        A V3 method gets a locked clone of its class with its hidden values. ComfyUI makes both for every call, 30 us
        of it; they cannot be written to, so one for all calls is the same.
        """
        if not self.is_v3:
            function: Callable[..., Any] = getattr(subject, name)
            return function
        owner: Any = subject if isinstance(subject, type) else type(subject)
        owner.VALIDATE_CLASS()
        method: Callable[..., Any] = self._parts.locked_method(owner, name, owner.PREPARE_CLASS_CLONE(hidden))
        return method

    def hidden_values(self, node_id: str, prompt: Mapping[str, Any]) -> dict[Any, Any]:
        """Hidden values of a V3 node, as its ``cls.hidden`` is made of them."""
        hidden = self._parts.hidden
        values = {hidden.prompt: prompt, hidden.unique_id: node_id}
        return {item: values.get(item) for item in self._v3_hidden}
