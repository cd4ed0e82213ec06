"""A runner over ComfyUI's own PromptExecutor: all of its semantics, with cheaper cache keys."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from .cache_keys import Stamps, key_set_class
from .io_nodes import Exchange, exchange_of
from .runner import NodeFailed, NodeObserver, TickInput, TickInterrupted, TickOutput
from .workflow import Prompt, Workflow

if TYPE_CHECKING:
    from .comfy import ComfyHost


def outcome(workflow: Workflow, exchange: Exchange) -> TickOutput:
    """What the live outputs took, in the order of the workflow."""
    images = next((exchange.images[node] for node in workflow.image_outputs if node in exchange.images), None)
    audio = next((exchange.audio[node] for node in workflow.audio_outputs if node in exchange.audio), None)
    texts = [(node, exchange.texts[node]) for node in workflow.text_outputs if node in exchange.texts]
    return TickOutput(images, texts, audio[0] if audio else None, audio[1] if audio else 0)


class ExecutorRunner:
    """One session's executor: caches and node instances are its own, so sessions share no state.

    The event loop lives as long as ComfyUI does; ``PromptExecutor.execute`` would make one for every frame.
    ``reason`` says which cache keys are in use; ``stock_keys`` leaves ComfyUI its own, to compare with.
    Calls come from ComfyUI's thread, except ``interrupt``.
    """

    name: Final = "executor"

    def __init__(
        self,
        host: ComfyHost,
        execution: Any,
        nodes: Any,
        server: Any,
        loop: asyncio.AbstractEventLoop,
        *,
        stock_keys: bool = False,
    ) -> None:
        self._host = host
        self._execution = execution
        self._nodes = nodes
        self._server = server
        self._loop = loop
        self._prompt_id = str(uuid.uuid4())
        self._prompt: Prompt = {}
        self._workflow = Workflow({})
        self._outputs: list[str] = []
        self._stamps = Stamps()
        self._executor: Any = None
        self.observer: NodeObserver | None = None  # hears nothing: ComfyUI's executor does not tell
        self._ticking = False
        self._stock_keys = stock_keys
        self.reason = ""

    def load(self, prompt: Prompt) -> None:
        """Take a prompt with fresh caches and node instances. Raises WorkflowError; the runner is as before then."""
        checked = self._host.require_valid(prompt)
        self._begin_anew()
        self._take(checked)

    def adopt(self, prompt: Prompt, instances: Mapping[tuple[str, str], Any]) -> None:
        """Take a checked prompt over from another runner, with its node instances by (node id, class_type)."""
        self._begin_anew()
        self._executor.caches.objects.cache.update(instances)
        self._take(prompt)

    def update(self, prompt: Prompt) -> None:
        """Take an altered prompt; cached outputs and node instances stay where node and ancestors are as before.

        Raises WorkflowError; the running prompt stays then.
        """
        if self._executor is None:
            self.load(prompt)
        else:
            self._take(self._host.require_valid(prompt))

    def _take(self, prompt: Prompt) -> None:
        classes = self._nodes.NODE_CLASS_MAPPINGS
        self._prompt = prompt
        self._workflow = Workflow(prompt)
        self._outputs = [
            node_id
            for node_id, node in prompt.items()
            if getattr(classes[node["class_type"]], "OUTPUT_NODE", False) is True
        ]
        self._stamps.take(prompt)

    def _begin_anew(self) -> None:
        before = self._executor
        self._executor, self._stamps, self.reason = self._new_executor()
        _empty(before)

    def _new_executor(self) -> tuple[Any, Stamps, str]:
        """By signature, because the constructor differs between versions; CLASSIC caching, because the others run
        static nodes, model loaders too, again for every frame or poll the memory (comfyui.md 1.7)."""
        execution = self._execution
        parameters = inspect.signature(execution.PromptExecutor.__init__).parameters
        arguments: dict[str, Any] = {"cache_type": execution.CacheType.CLASSIC}
        if "cache_args" in parameters:
            arguments["cache_args"] = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        elif "cache_size" in parameters:
            arguments["cache_size"] = 0
        executor = execution.PromptExecutor(self._server, **arguments)
        stamps, caches = Stamps(), executor.caches
        names = [name for name in ("outputs", "ui") if hasattr(caches, name)]
        if not all(type(getattr(caches, name)) is execution.HierarchicalCache for name in names):
            return executor, stamps, "ComfyUI's executor with its own cache keys: its caches are unknown"
        if self._stock_keys:
            return executor, stamps, "ComfyUI's executor with its own cache keys: as asked for"
        keys = key_set_class(execution.CacheKeySetInputSignature, stamps)
        for name in names:
            own = execution.HierarchicalCache(keys)
            caches.all = [own if cache is getattr(caches, name) else cache for cache in caches.all]
            setattr(caches, name, own)
        return executor, stamps, "ComfyUI's executor"

    def prepare(self, node_id: str) -> None:
        """Run one node that depends on nothing live, and what it needs; the next tick finds its output cached.

        Raises as ``tick``.
        """
        with exchange_of(TickInput(None)):
            self._execute([node_id])

    def tick(self, tick: TickInput) -> TickOutput:
        """Run the prompt once. Raises NodeFailed or TickInterrupted; what ran before the failure stays cached."""
        with exchange_of(tick) as exchange:
            self._execute(self._outputs)
        return outcome(self._workflow, exchange)

    def _execute(self, node_ids: list[str]) -> None:
        """Run these nodes and what they need."""
        self._host.require_thread()
        if self._executor is None:
            raise RuntimeError("load() comes first")
        # The executor writes its notes into the nodes and believes them when it meets them again: the live input
        # would run once and the picture freeze. A shallow copy of each node keeps ours clean.
        prompt = {node_id: dict(node) for node_id, node in self._prompt.items()}
        self._ticking = True
        try:
            self._loop.run_until_complete(self._executor.execute_async(prompt, self._prompt_id, {}, list(node_ids)))
        except (asyncio.CancelledError, SystemExit) as exc:  # out of a node; neither may end the engine
            raise NodeFailed("", "", type(exc).__name__, str(exc) or "a node ended the run") from None
        except Exception as exc:  # not a node's (those are caught inside) but the executor's own
            raise NodeFailed("", "", type(exc).__name__, str(exc)) from exc
        finally:
            self._ticking = False
            _drop_expansion(self._executor)
        # Not ``success``: a cycle that comes out of an expansion ends the run and leaves that as it was.
        if self._executor.status_messages[-1][0] != "execution_success":
            raise self._failure()

    def _failure(self) -> Exception:
        messages = self._executor.status_messages
        for event, data in reversed(messages):
            if event == "execution_interrupted":
                return TickInterrupted(f"interrupted in node {data['node_id']} ({data['node_type']})")
            if event == "execution_error":
                return NodeFailed(
                    str(data["node_id"]), str(data["node_type"]), str(data["exception_type"]),
                    str(data["exception_message"]).strip(),
                )  # fmt: skip
        return NodeFailed("", "", "RuntimeError", "ComfyUI gave no reason")

    def interrupt(self) -> None:
        """End the running tick at the next node or progress step; any thread. ComfyUI clears the request when a run
        begins, so one that comes in the microseconds before that is lost: ask again."""
        if self._ticking:
            self._host.interrupt()

    def close(self) -> None:
        """Drop caches and node instances; models stay with ComfyUI, which unloads them when memory runs short."""
        before, self._executor = self._executor, None
        self._prompt, self._outputs = {}, []
        _empty(before)


def _empty(executor: Any) -> None:
    """Free what the caches of an executor hold at once; it runs no more. None: there is none.

    The caches are cycles (``is_changed_cache.outputs_cache`` is the cache itself), and what a build leaves is out of
    the collector's sight (``settle_heap``): models and last pictures would stay as long as any session runs.
    """
    for cache in getattr(getattr(executor, "caches", None), "all", ()):
        for kept in (getattr(cache, "cache", None), getattr(cache, "subcaches", None)):
            if isinstance(kept, dict):
                kept.clear()
        for name in ("is_changed_cache", "cache_key_set"):
            if hasattr(cache, name):
                setattr(cache, name, None)


def _drop_expansion(executor: Any) -> None:
    """Let go of the nodes that the run which is over expanded into: there may be models and tensors among their
    inputs, and ComfyUI's progress registry, a cycle too, keeps the run's nodes. The next run expands anew."""
    nodes = getattr(getattr(executor.caches.outputs, "dynprompt", None), "ephemeral_prompt", None)
    if isinstance(nodes, dict):
        nodes.clear()
