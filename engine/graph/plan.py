"""A runner that decides once, when a prompt comes, what ComfyUI's executor decides in every tick.

Per tick it asks the nodes that can change by themselves, marks what descends from a change as stale, and calls the
stale nodes that an output needs, in ComfyUI's order. Outputs of nodes that depend on the live input are let go of as
soon as nobody needs them. What differs from ComfyUI on purpose: no progress_state messages, a lazy input that was not
asked for is None even if its source ran (as from 0.3.75 on), and two nodes that are alike both run.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch

from .executor_runner import outcome
from .io_nodes import exchange_of
from .plan_graph import PlanGraph
from .plan_limits import NeedsExecutor, obstacle
from .plan_order import Order
from .plan_parts import Parts
from .plan_step import Instance, Step
from .plan_waiting import UnderWay
from .runner import NodeFailed, NodeObserver, TickInput, TickInterrupted, TickOutput
from .workflow import Prompt, WorkflowError, finding

if TYPE_CHECKING:
    from .comfy import ComfyHost


class PlanRunner:
    """One session's plan: outputs and node instances are its own.

    ``tick`` also raises NeedsExecutor, when a node returns other nodes instead of values.
    """

    name: Final = "plan"
    reason: Final = "every node of this graph can be called directly"

    def __init__(self, host: ComfyHost, parts: Parts) -> None:
        self._host = host
        self._parts = parts
        self._prompt_id = str(uuid.uuid4())
        self._given: Prompt | None = None
        self._graph: PlanGraph | None = None
        self._ticking = False
        self.observer: NodeObserver | None = None

    @property
    def instances(self) -> dict[tuple[str, str], Instance]:
        """Of every (node id, class_type) that the last ticked prompt had."""
        return self._graph.instances if self._graph else {}

    def load(self, prompt: Prompt) -> None:
        """Take a prompt with fresh outputs and node instances. Raises WorkflowError; the runner is as before then."""
        checked = self._checked(prompt)
        self._graph, self._given = None, checked

    def update(self, prompt: Prompt) -> None:
        """Take an altered prompt; outputs and instances stay where node and ancestors are as before.

        Raises WorkflowError; the running prompt stays then. Only what the ticks see counts: there and back again is
        no change.
        """
        self._given = self._checked(prompt)

    def _checked(self, prompt: Prompt) -> Prompt:
        checked = self._host.require_valid(prompt)
        if reason := obstacle(self._parts, checked):
            remedy = "set runner to auto, then ComfyUI's executor runs it"
            raise WorkflowError([finding("plan_refused", f"the plan cannot hold this graph: {reason}", remedy)])
        return checked

    def prepare(self, node_id: str) -> None:
        """Run one node that depends on nothing live, and what it needs; the next tick finds its outputs there.

        Raises as ``tick``.
        """
        with exchange_of(TickInput(None)):
            self._drive((node_id,))

    def tick(self, tick: TickInput) -> TickOutput:
        """Run the prompt once. Raises NodeFailed or TickInterrupted; what ran before the failure stays."""
        with exchange_of(tick) as exchange:
            graph = self._drive()
            return outcome(graph.workflow, exchange)

    def _drive(self, outputs: tuple[str, ...] | None = None) -> PlanGraph:
        """Run what ``outputs``, ids of steps, need; None: those of the prompt."""
        self._host.require_thread()
        parts = self._parts
        if self._given is not None:
            self._graph = PlanGraph(parts, self._given, self._prompt_id, self._graph)
            self._given = None
            parts.management.cleanup_models_gc()
        graph = self._graph
        if graph is None:
            raise RuntimeError("load() comes first")
        parts.nodes.interrupt_processing(False)
        parts.server.client_id = None
        parts.progress.global_progress_registry = graph.registry
        self._ticking = True
        try:
            with torch.inference_mode():
                if graph.plain:
                    self._run(graph, graph.outputs if outputs is None else outputs)
                else:
                    parts.loop.run_until_complete(
                        self._run_async(graph, graph.outputs if outputs is None else outputs)
                    )
        finally:
            self._ticking = False
            graph.release()
            if parts.management.DISABLE_SMART_MEMORY:
                parts.management.unload_all_models()
        return graph

    def _run(self, graph: PlanGraph, outputs: tuple[str, ...]) -> None:
        graph.mark({step.node_id: step.fingerprint_now() for step in graph.volatile})
        missing, step = graph.missing, None
        try:
            for step, spent in graph.schedule(outputs):
                if self.observer is None:
                    step.run()
                else:
                    with self._observed(step):
                        step.run()
                missing.discard(step.node_id)
                for source in spent:
                    source.outputs = None
        except NeedsExecutor:
            raise
        except (Exception, asyncio.CancelledError, SystemExit) as exc:  # no node may end the engine
            assert step is not None
            raise self._failure(step, exc) from exc

    async def _run_async(self, graph: PlanGraph, outputs: tuple[str, ...]) -> None:
        """As ``_run``, for graphs with coroutines or lazy inputs: what runs shows while it runs."""
        fingerprints = {step.node_id: step.fingerprint_now() for step in graph.volatile}
        for node_id, value in fingerprints.items():
            if asyncio.iscoroutine(value):
                fingerprints[node_id] = await value
        graph.mark(fingerprints)
        order = Order(graph.steps, graph.missing, outputs)
        under_way = UnderWay(order)
        asked: dict[str, dict[str, str]] = {}
        try:
            while order.pending:
                picked = order.pick()
                if picked is None:
                    if not under_way.calls:
                        raise NodeFailed("", "", "DependencyCycleError", "nodes wait for each other")
                    await under_way.one_ended()
                    continue
                step = graph.steps[picked]
                try:
                    ended = await self._advance(step, order, under_way, asked.setdefault(picked, {}))
                except NeedsExecutor:
                    raise
                except (Exception, asyncio.CancelledError, SystemExit) as exc:  # as in _run
                    raise self._failure(step, exc) from exc
                if ended:
                    graph.missing.discard(picked)
                    order.done(picked)
        finally:
            await under_way.cancel()

    async def _advance(self, step: Step, order: Order, under_way: UnderWay, asked: dict[str, str]) -> bool:
        """Bring one node as far as it can go now; True: it has its outputs."""
        if step.node_id in under_way.calls:
            step.take([call.result() if isinstance(call, asyncio.Task) else call for call in under_way.take(step)])
            return True
        if step.lazy_check:
            wanted = await step.wanted(asked)
            sources = {name: step.source_of(name) for name in wanted if name not in asked}
            if sources:
                asked.update(sources)
                for source in sources.values():
                    order.need(step.node_id, source)
                return False
        if not step.is_async:
            with self._observed(step):
                if step.lazy:
                    step.run_lists(step.lists(asked))
                else:
                    step.run()
            return True
        calls = await step.start(step.lists(asked))
        if any(isinstance(call, asyncio.Task) for call in calls):
            under_way.put(step, calls)
            return False
        step.take(calls)
        return True

    @contextlib.contextmanager
    def _observed(self, step: Step) -> Iterator[None]:
        """Tell the observer how long it took, on a GPU with the work that it left there."""
        began = time.perf_counter()
        yield
        if (observer := self.observer) is not None:
            if self._host.torch_device.type == "cuda":
                torch.cuda.synchronize(self._host.torch_device)
            observer(step.node_id, step.class_type, time.perf_counter() - began)

    def _failure(self, step: Step, error: BaseException) -> Exception:
        management = self._parts.management
        if isinstance(error, NodeFailed):
            return error
        if isinstance(error, management.InterruptProcessingException):
            return TickInterrupted(f"interrupted in node {step.node_id} ({step.class_type})")
        if isinstance(error, management.OOM_EXCEPTION):
            management.unload_all_models()
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        return NodeFailed(step.node_id, step.class_type, name, str(error).strip())

    def interrupt(self) -> None:
        """End the running tick at the next node or progress step; any thread. As ComfyUI's executor does, a tick
        clears the request when it begins: one that comes in the microseconds before that is lost, ask again."""
        if self._ticking:
            self._host.interrupt()

    def close(self) -> None:
        """Drop outputs and node instances; models stay with ComfyUI, which unloads them when memory runs short."""
        self._graph, self._given = None, None
