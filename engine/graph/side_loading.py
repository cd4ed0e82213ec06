"""Models loaded on another thread than ComfyUI's, so that a load of seconds stops nobody's frames.

ComfyUI's executor, its progress registry and its memory management are one thread's. What a core loader does on
the side touches only the last of them, and that is behind a lock here. Nothing else of ComfyUI runs on the side: the
loader's method is called by itself, and what it returns waits until the node runs in its graph as usual, at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import torch

#: Functions of ``comfy.model_management`` that change or walk its list of loaded models.
GUARDED: Final = (
    "load_models_gpu",
    "free_memory",
    "loaded_models",
    "cleanup_models",
    "cleanup_models_gc",
    "unload_all_models",
    "soft_empty_cache",
)

#: Modules whose loaders are known to share nothing but memory management. A pack's loader may share anything.
CORE: Final = ("nodes", "comfy_extras.")

Key: TypeAlias = tuple[str, str]

#: What one build loaded aside and no node has taken yet, by class and inputs; two nodes of a graph may be alike.
Shelf: TypeAlias = dict[Key, list[Any]]


class SideLoading:
    """``classes``: ComfyUI's NODE_CLASS_MAPPINGS; ``management``: its ``comfy.model_management``; ``device``: that
    of the graphs."""

    def __init__(self, classes: Mapping[str, Any], management: Any, device: torch.device) -> None:
        self._classes = classes
        self._device = device
        self._shelf: Shelf = {}  # of the build whose step runs
        self._methods: dict[str, Callable[..., Any]] = {}  # as they were, by class
        _guard(management)

    def call_for(self, class_type: str, inputs: Mapping[str, Any], shelf: Shelf) -> Callable[[], None] | None:
        """What loads for one node with these inputs on any thread; None: it has to run in its graph.

        The result lies on ``shelf``. Each build has its own: another with the same model would take it away, and a
        load that outlives its build leaves it where nobody looks.
        """
        node_class = self._classes[class_type]
        if not _is_safe(node_class) or any(isinstance(value, dict | list) for value in inputs.values()):
            return None
        if class_type not in self._methods:
            self._methods[class_type] = getattr(node_class, node_class.FUNCTION)
            setattr(node_class, node_class.FUNCTION, self._taking(class_type))
        method, key = self._methods[class_type], _key(class_type, inputs)

        def load() -> None:
            with self._on_device(), torch.inference_mode():  # as ComfyUI's executor runs nodes
                result = method(node_class(), **inputs)
            shelf.setdefault(key, []).append(result)

        return load

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        """ComfyUI loads for the thread's current device, which is the first one on every thread but ComfyUI's."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    @contextlib.contextmanager
    def taking_from(self, shelf: Shelf) -> Iterator[None]:
        """While a step of a build runs, on ComfyUI's thread: a node takes what was loaded for one like it."""
        self._shelf = shelf
        try:
            yield
        finally:
            self._shelf = {}

    def _taking(self, class_type: str) -> Callable[..., Any]:
        method = self._methods[class_type]

        @functools.wraps(method)
        def taking(node: Any, *args: Any, **inputs: Any) -> Any:
            results = self._shelf.get(_key(class_type, inputs))
            return results.pop() if results else method(node, *args, **inputs)

        return taking


def _is_safe(node_class: Any) -> bool:
    """A class of ComfyUI's own in the older shape, whose method needs its inputs and nothing else."""
    method = getattr(node_class, getattr(node_class, "FUNCTION", ""), None)
    return (
        (node_class.__module__ == CORE[0] or node_class.__module__.startswith(CORE[1]))
        and not hasattr(node_class, "GET_SCHEMA")
        and not node_class.INPUT_TYPES().get("hidden")
        and method is not None
        and not inspect.iscoroutinefunction(method)
    )


def _key(class_type: str, inputs: Mapping[str, Any]) -> Key:
    return class_type, json.dumps(inputs, sort_keys=True, default=repr)


def _guard(management: Any) -> None:
    """Let one thread at a time into memory management; a lock that its functions may take again inside each other."""
    lock = threading.RLock()
    for name in GUARDED:
        function = getattr(management, name, None)
        if function is None or hasattr(function, "__wrapped__"):
            continue

        def guarded(*args: Any, _function: Callable[..., Any] = function, **options: Any) -> Any:
            with lock:
                return _function(*args, **options)

        setattr(management, name, functools.wraps(function)(guarded))
