"""A runner that decides once, when a prompt comes, what ComfyUI's executor decides in every tick.

Per tick it asks the nodes that can change by themselves, marks what descends from a change as stale, and calls the
stale nodes that an output needs, in ComfyUI's order. Outputs of nodes that depend on the live input are let go of as
soon as nobody needs them. What differs from ComfyUI on purpose: no progress_state messages, a lazy input that was not
asked for is None even if its source ran (as from 0.3.75 on), and two nodes that are alike both run.
"""

from __future__ import annotations

import asyncio
import copy
import graphlib
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from .cache_keys import same
from .executor_runner import outcome
from .io_nodes import exchange_of
from .plan_class import NodeClass
from .plan_limits import NeedsExecutor, obstacle
from .plan_order import Order
from .plan_parts import Parts
from .plan_step import Instance, Step
from .runner import NodeFailed, TickInput, TickInterrupted, TickOutput
from .workflow import Prompt, Workflow, WorkflowError, finding, is_link

if TYPE_CHECKING:
    from .comfy import ComfyHost

#: Orders kept, one for each set of stale nodes that occurred; a live graph has a handful.
_MAX_ORDERS: Final = 64

#: Steps to run, each with those whose outputs nobody needs after it.
_Schedule = tuple[tuple[Step, tuple[Step, ...]], ...]


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
        self._classes: dict[str, NodeClass] = {}
        self._given: Prompt | None = None
        self._ticking = False
        self._clear()

    def _clear(self) -> None:
        self._prompt: Prompt = {}
        self._workflow = Workflow({})
        self._steps: dict[str, Step] = {}
        #: Of every (node id, class) that the last ticked prompt had.
        self.instances: dict[tuple[str, str], Instance] = {}
        self._outputs: tuple[str, ...] = ()
        self._volatile: tuple[Step, ...] = ()
        self._live: tuple[Step, ...] = ()
        self._live_ids: frozenset[str] = frozenset()
        self._children: dict[str, list[str]] = {}
        self._missing: set[str] = set()
        self._orders: dict[frozenset[str], _Schedule] = {}
        self._plain = True
        self._registry: Any = None

    def load(self, prompt: Prompt) -> None:
        """Take a prompt with fresh outputs and node instances. Raises WorkflowError; the runner is as before then."""
        checked = self._checked(prompt)
        self._clear()
        self._given = checked

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

    def _adopt(self, prompt: Prompt) -> None:
        """Compile ``prompt``. Outputs that do not depend on a difference to the one before stay."""
        own = copy.deepcopy(prompt)  # for nodes that ask for it: they may do with it what they like
        before, kept = self._steps, {}
        steps: dict[str, Step] = {}
        fresh = set()
        for node_id, node in prompt.items():
            class_type = node["class_type"]
            steps[node_id] = step = Step(self._parts, self._class_of(class_type), node_id, node, own)
            kept[node_id, class_type] = self.instances.get((node_id, class_type)) or Instance()
            old = before.get(node_id)
            if (
                old is not None
                and old.class_type == class_type
                and same(self._prompt[node_id]["inputs"], node["inputs"])
            ):
                step.outputs, step.ui, step.changed = old.outputs, old.ui, old.changed
            else:
                fresh.add(node_id)
        for (node_id, _), instance in kept.items():
            steps[node_id].connect(steps, instance, self._prompt_id)
        self._prompt, self._workflow, self._steps, self.instances = prompt, Workflow(prompt), steps, kept
        self._outputs = tuple(node_id for node_id, step in steps.items() if step.is_output)
        order = tuple(graphlib.TopologicalSorter({key: step.parents for key, step in steps.items()}).static_order())
        self._children = {node_id: [] for node_id in order}
        for node_id in order:
            for parent in steps[node_id].parents:
                self._children[parent].append(node_id)
        self._volatile = tuple(
            steps[node_id] for node_id in order if steps[node_id].fingerprint and not steps[node_id].always_changed
        )
        self._live_ids = self._descendants(node_id for node_id, step in steps.items() if step.always_changed)
        self._live = tuple(steps[node_id] for node_id in order if node_id in self._live_ids)
        self._missing &= steps.keys()
        self._spoil(self._descendants(fresh))
        self._orders.clear()
        self._plain = not any(step.needs_loop for step in steps.values())
        self._registry = self._parts.progress.ProgressRegistry(self._prompt_id, self._parts.dynamic_prompt(own))
        self._parts.management.cleanup_models_gc()

    def _class_of(self, class_type: str) -> NodeClass:
        node_class = self._parts.nodes.NODE_CLASS_MAPPINGS[class_type]
        known = self._classes.get(class_type)
        if known is None or known.node_class is not node_class:
            known = self._classes[class_type] = NodeClass(self._parts, class_type, node_class)
        return known

    def _descendants(self, node_ids: Iterable[str]) -> frozenset[str]:
        found, left = set[str](), list(node_ids)
        while left:
            node_id = left.pop()
            if node_id not in found:
                found.add(node_id)
                left.extend(self._children[node_id])
        return frozenset(found)

    def _spoil(self, node_ids: Iterable[str]) -> None:
        for node_id in node_ids:
            self._steps[node_id].outputs = None
            self._missing.add(node_id)

    def tick(self, tick: TickInput) -> TickOutput:
        """Run the prompt once. Raises NodeFailed or TickInterrupted; what ran before the failure stays."""
        self._host.require_thread()
        parts = self._parts
        if self._given is not None:
            prompt, self._given = self._given, None
            self._adopt(prompt)
        if not self._steps:
            raise RuntimeError("load() comes first")
        parts.nodes.interrupt_processing(False)
        parts.server.client_id = None
        parts.progress.global_progress_registry = self._registry
        self._ticking = True
        try:
            with exchange_of(tick) as exchange, torch.inference_mode():
                if self._plain:
                    self._run()
                else:
                    parts.loop.run_until_complete(self._run_async())
                return outcome(self._workflow, exchange)
        finally:
            self._ticking = False
            for step in self._live:
                step.outputs = None
            if parts.management.DISABLE_SMART_MEMORY:
                parts.management.unload_all_models()

    def _mark(self, fingerprints: Mapping[str, Any]) -> None:
        """Make stale what descends from a change since the last tick, the live inputs first of all."""
        self._missing |= self._live_ids
        changed = []
        for step in self._volatile:
            value = fingerprints[step.node_id]
            if not same(step.changed, value):
                step.changed = value
                changed.append(step.node_id)
        if changed:
            self._spoil(self._descendants(changed))

    def _run(self) -> None:
        self._mark({step.node_id: step.fingerprint_now() for step in self._volatile})
        missing = self._missing
        key = frozenset(missing)
        schedule = self._orders.get(key)
        if schedule is None:
            if len(self._orders) >= _MAX_ORDERS:
                self._orders.clear()
            schedule = self._orders[key] = self._schedule(key)
        step = None
        try:
            for step, spent in schedule:
                step.run()
                missing.discard(step.node_id)
                for source in spent:
                    source.outputs = None
        except NeedsExecutor:
            raise
        except (Exception, asyncio.CancelledError, SystemExit) as exc:  # no node may end the engine
            assert step is not None
            raise self._failure(step, exc) from exc

    def _schedule(self, missing: frozenset[str]) -> _Schedule:
        order, picked = Order(self._steps, missing, self._outputs), list[Step]()
        while order.pending:
            node_id = order.pick()
            assert node_id is not None, "the prompt has no cycles"
            order.done(node_id)
            picked.append(self._steps[node_id])
        last = {}
        for position, step in enumerate(picked):
            for node_id in (step.node_id, *step.parents):
                if node_id in self._live_ids:
                    last[node_id] = position
        spent: list[list[Step]] = [[] for _ in picked]
        for node_id, position in last.items():
            spent[position].append(self._steps[node_id])
        return tuple((step, tuple(done)) for step, done in zip(picked, spent, strict=True))

    async def _run_async(self) -> None:
        """As ``_run``, for graphs with coroutines or lazy inputs: what runs shows while it runs."""
        fingerprints = {step.node_id: step.fingerprint_now() for step in self._volatile}
        for node_id, value in fingerprints.items():
            if asyncio.iscoroutine(value):
                fingerprints[node_id] = await value
        self._mark(fingerprints)
        order = Order(self._steps, self._missing, self._outputs)
        under_way = _UnderWay(order)
        asked: dict[str, dict[str, str]] = {}
        try:
            while order.pending:
                picked = order.pick()
                if picked is None:
                    if not under_way.calls:
                        raise NodeFailed("", "", "DependencyCycleError", "nodes wait for each other")
                    await under_way.one_ended()
                    continue
                step = self._steps[picked]
                try:
                    ended = await self._advance(step, order, under_way, asked.setdefault(picked, {}))
                except NeedsExecutor:
                    raise
                except (Exception, asyncio.CancelledError, SystemExit) as exc:  # as in _run
                    raise self._failure(step, exc) from exc
                if ended:
                    self._missing.discard(picked)
                    order.done(picked)
        finally:
            await under_way.cancel()

    async def _advance(self, step: Step, order: Order, under_way: _UnderWay, asked: dict[str, str]) -> bool:
        """Bring one node as far as it can go now; True: it has its outputs."""
        if step.node_id in under_way.calls:
            step.take([call.result() if isinstance(call, asyncio.Task) else call for call in under_way.take(step)])
            return True
        if step.lazy_check:
            wanted = await step.wanted(asked)
            sources = {name: self._source(step, name) for name in wanted if name not in asked}
            if sources:
                asked.update(sources)
                for source in sources.values():
                    order.need(step.node_id, source)
                return False
        if not step.is_async:
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

    def _source(self, step: Step, name: str) -> str:
        value: Any = self._prompt[step.node_id]["inputs"].get(name)
        if name in step.lazy:
            return step.lazy[name]
        if is_link(value):
            return str(value[0])
        raise self._parts.input_error(f"the node asks for the input {name}, which is not linked")

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
        self._given = None
        self._clear()


class _UnderWay:
    """Calls of coroutine nodes that were started and did not end yet, by node id."""

    def __init__(self, order: Order) -> None:
        self.calls: dict[str, list[Any]] = {}
        self._order = order
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._ended = asyncio.Event()

    def put(self, step: Step, calls: list[Any]) -> None:
        self.calls[step.node_id] = calls
        self._order.hold(step.node_id)
        self._watches[step.node_id] = asyncio.create_task(self._watch(step.node_id))

    async def _watch(self, node_id: str) -> None:
        tasks = [call for call in self.calls[node_id] if isinstance(call, asyncio.Task)]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._order.release(node_id)
        self._ended.set()

    def take(self, step: Step) -> list[Any]:
        del self._watches[step.node_id]
        return self.calls.pop(step.node_id)

    async def one_ended(self) -> None:
        await self._ended.wait()
        self._ended.clear()

    async def cancel(self) -> None:
        """End what is left after a failure: it must not run into the next tick."""
        tasks = [call for calls in self.calls.values() for call in calls if isinstance(call, asyncio.Task)]
        for task in (*tasks, *self._watches.values()):
            task.cancel()
        await asyncio.gather(*tasks, *self._watches.values(), return_exceptions=True)
