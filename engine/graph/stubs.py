"""What ComfyUI expects around it and the engine does not have: a web server object, torchvision, torchaudio.

All of ComfyUI's uses of the two packages are at call time (comfyui.md 1.2), so importing a stand-in is enough: image,
mask, latent, SD, Flux, VAE and upscale nodes never notice; the few nodes that call it fail with a sentence.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, Final

REPLACED_IF_ABSENT: Final = ("torchvision", "torchaudio")


class _Absent:
    """Stands for anything inside a package that is not installed; may be named and subclassed, not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        package = self._name.partition(".")[0]
        raise RuntimeError(f"this node needs {self._name}, but {package} is not installed")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> _Absent:
        # Dunders have to be missing: inspect and copy ask modules for them and would take an answer seriously.
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of the absent packages. Modules get a spec that way; without one find_spec raises."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = frozenset(packages)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in has nothing to run."""


def stand_in_for_absent_packages() -> tuple[str, ...]:
    """Make the absent ones of ``REPLACED_IF_ABSENT`` importable for the life of the process; returns their names."""
    absent = tuple(name for name in REPLACED_IF_ABSENT if importlib.util.find_spec(name) is None)
    if absent:
        sys.meta_path.append(_StubFinder(absent))
    return absent


class _Routes:
    """Packs register web pages at import; nobody will ever ask for them."""

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **kwargs: lambda handler: handler


class _PromptServer:
    """The part of ComfyUI's server that executor, progress registry and packs touch; it sends nothing.

    The real class queues a message for every node start even without a client, without bound (comfyui.md 1.4).
    """

    instance: _PromptServer

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self.last_prompt_id: str | None = None
        self.sockets_metadata: dict[str, Any] = {}
        self.sockets: dict[str, Any] = {}
        self.supports: list[str] = []
        self.routes = _Routes()
        self.app = SimpleNamespace(router=_Routes(), add_routes=lambda routes: None, middlewares=[])
        self.prompt_queue = SimpleNamespace(get_tasks_remaining=lambda: 0, get_current_queue=lambda: ([], []))
        self.number = 0

    def send_sync(self, event: Any, data: Any, sid: Any = None) -> None:
        """Nobody listens."""

    def send_progress_text(self, text: Any, node_id: Any, sid: Any = None) -> None:
        """Nobody listens."""

    def queue_updated(self) -> None:
        """There is no queue."""

    def add_on_prompt_handler(self, handler: Any) -> None:
        """Prompts do not come in over HTTP."""


def server_module(loop: Any) -> ModuleType:
    """A module to stand as ``server`` in ``sys.modules``, with its one ``PromptServer``."""
    module = ModuleType("server")
    module.__spec__ = importlib.machinery.ModuleSpec("server", None)
    _PromptServer.instance = _PromptServer(loop)
    module.PromptServer = _PromptServer  # type: ignore[attr-defined]
    return module
