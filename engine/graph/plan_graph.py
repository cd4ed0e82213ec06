"""A prompt, compiled: its steps, what descends from what, what is stale, in which order stale steps run."""

from __future__ import annotations

import copy
import graphlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from .cache_keys import same
from .plan_class import NodeClass
from .plan_order import Order
from .plan_parts import Parts
from .plan_step import Instance, Step
from .workflow import Prompt, Workflow

#: Orders kept, one for each set of stale nodes that occurred; a live graph has a handful.
_MAX_ORDERS: Final = 64

#: Steps to run, each with those whose outputs nobody needs after it.
Schedule = tuple[tuple[Step, tuple[Step, ...]], ...]


class PlanGraph:
    """One prompt of one session.

    before: the graph that it follows; what does not depend on a difference to that one keeps its outputs, and nodes
    of the same id and class keep their instances. plain: no step needs an event loop.
    """

    def __init__(self, parts: Parts, prompt: Prompt, prompt_id: str, before: PlanGraph | None = None) -> None:
        self.prompt = prompt
        self.workflow = Workflow(prompt)
        self.instances: dict[tuple[str, str], Instance] = {}
        self.steps: dict[str, Step] = {}
        #: Ids of the steps whose outputs are not there: they never ran, or are stale.
        self.missing: set[str] = set() if before is None else before.missing & prompt.keys()
        self._parts = parts
        self._classes: dict[str, NodeClass] = {} if before is None else before._classes
        self._orders: dict[tuple[frozenset[str], tuple[str, ...]], Schedule] = {}
        own = copy.deepcopy(prompt)  # for nodes that ask for it: they may do with it what they like
        fresh = self._make_steps(own, prompt_id, before)
        steps = self.steps
        self.outputs = tuple(node_id for node_id, step in steps.items() if step.is_output)
        order = tuple(graphlib.TopologicalSorter({key: step.parents for key, step in steps.items()}).static_order())
        self._children: dict[str, list[str]] = {node_id: [] for node_id in order}
        for node_id in order:
            for parent in steps[node_id].parents:
                self._children[parent].append(node_id)
        #: Steps that can change by themselves, without our live ends: those are known to.
        self.volatile = tuple(
            steps[node_id] for node_id in order if steps[node_id].fingerprint and not steps[node_id].always_changed
        )
        self._live_ids = self._descendants(node_id for node_id, step in steps.items() if step.always_changed)
        self._live = tuple(steps[node_id] for node_id in order if node_id in self._live_ids)
        self._spoil(self._descendants(fresh))
        self.plain = not any(step.needs_loop for step in steps.values())
        self.registry: Any = parts.progress.ProgressRegistry(prompt_id, parts.dynamic_prompt(own))

    def _make_steps(self, own: Prompt, prompt_id: str, before: PlanGraph | None) -> set[str]:
        """Returns the ids of steps that are not as they were before."""
        fresh = set()
        for node_id, node in self.prompt.items():
            class_type = node["class_type"]
            step = Step(self._parts, self._class_of(class_type), node_id, node, own)
            old, instance = None, None
            if before is not None:
                old, instance = before.steps.get(node_id), before.instances.get((node_id, class_type))
            self.steps[node_id] = step
            self.instances[node_id, class_type] = instance or Instance()
            if before is None or old is None or old.class_type != class_type:
                fresh.add(node_id)
            elif same(before.prompt[node_id]["inputs"], node["inputs"]):
                step.outputs, step.ui, step.changed = old.outputs, old.ui, old.changed
            else:
                fresh.add(node_id)
        for (node_id, _), kept in self.instances.items():
            self.steps[node_id].connect(self.steps, kept, prompt_id)
        return fresh

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
            self.steps[node_id].outputs = None
            self.missing.add(node_id)

    def mark(self, fingerprints: Mapping[str, Any]) -> None:
        """Make stale what descends from a change since the last tick, the live ends first of all.

        fingerprints: of the volatile steps, by id.
        """
        self.missing |= self._live_ids
        changed = []
        for step in self.volatile:
            value = fingerprints[step.node_id]
            if not same(step.changed, value):
                step.changed = value
                changed.append(step.node_id)
        if changed:
            self._spoil(self._descendants(changed))

    def schedule(self, outputs: tuple[str, ...]) -> Schedule:
        """What has to run for these outputs now, in order."""
        key = (frozenset(self.missing), outputs)
        schedule = self._orders.get(key)
        if schedule is None:
            if len(self._orders) >= _MAX_ORDERS:
                self._orders.clear()
            schedule = self._orders[key] = self._ordered(*key)
        return schedule

    def _ordered(self, missing: frozenset[str], outputs: tuple[str, ...]) -> Schedule:
        order, picked = Order(self.steps, missing, outputs), list[Step]()
        while order.pending:
            node_id = order.pick()
            assert node_id is not None, "the prompt has no cycles"
            order.done(node_id)
            picked.append(self.steps[node_id])
        last = {}
        for position, step in enumerate(picked):
            for node_id in (step.node_id, *step.parents):
                if node_id in self._live_ids:
                    last[node_id] = position
        spent: list[list[Step]] = [[] for _ in picked]
        for node_id, position in last.items():
            spent[position].append(self.steps[node_id])
        return tuple((step, tuple(done)) for step, done in zip(picked, spent, strict=True))

    def release(self) -> None:
        """Let go of what the live steps gave: they run again in the next tick whatever happens."""
        for step in self._live:
            step.outputs = None
