"""The runner that chooses: the plan where it holds the graph, ComfyUI's executor where not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from .executor_runner import ExecutorRunner
from .plan import PlanRunner
from .plan_limits import NeedsExecutor, obstacle
from .plan_parts import Parts
from .runner import NodeObserver, TickInput, TickOutput
from .workflow import Prompt

if TYPE_CHECKING:
    from .comfy import ComfyHost

logger = logging.getLogger(__name__)

#: What runs a graph; see ``ComfyHost.new_runner``.
Choice = Literal["auto", "plan", "executor", "stock"]


class ChoosingRunner:
    """Begins with the plan if it can, and stays with the executor from the first prompt that needs it until ``load``.

    When only a running node shows it (an expansion that its class does not declare), that tick runs again on the
    executor: the nodes before it run twice, once in the life of a graph, in its warm-up as a rule.
    """

    def __init__(self, host: ComfyHost, parts: Parts, new_executor: Callable[[], ExecutorRunner]) -> None:
        self._host = host
        self._parts = parts
        self._new_executor = new_executor
        self._inner: PlanRunner | ExecutorRunner = PlanRunner(host, parts)
        self._prompt: Prompt = {}
        self._why = ""

    @property
    def observer(self) -> NodeObserver | None:
        return self._inner.observer

    @observer.setter
    def observer(self, observer: NodeObserver | None) -> None:
        self._inner.observer = observer

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def reason(self) -> str:
        return f"{self._inner.reason}; {self._why}" if self._why else self._inner.reason

    def load(self, prompt: Prompt) -> None:
        why = obstacle(self._parts, prompt)
        inner = self._new_executor() if why else PlanRunner(self._host, self._parts)
        inner.load(prompt)
        self._inner.close()
        self._inner, self._prompt, self._why = inner, prompt, why

    def update(self, prompt: Prompt) -> None:
        why = "" if isinstance(self._inner, ExecutorRunner) else obstacle(self._parts, prompt)
        if why:
            self._pin(prompt, why)
        else:
            self._inner.update(prompt)
        self._prompt = prompt

    def _pin(self, prompt: Prompt, why: str) -> None:
        logger.info("ComfyUI's executor takes a graph over from the plan: %s", why)
        plan, executor = self._inner, self._new_executor()
        assert isinstance(plan, PlanRunner)
        nodes = {key: instance.node for key, instance in plan.instances.items() if instance.node is not None}
        executor.adopt(self._host.require_valid(prompt), nodes)
        plan.close()
        self._inner, self._why = executor, why

    def prepare(self, node_id: str) -> None:
        """As of the runner that was chosen."""
        try:
            self._inner.prepare(node_id)
        except NeedsExecutor as exc:
            self._pin(self._prompt, exc.reason)
            self._inner.prepare(node_id)

    def tick(self, tick: TickInput) -> TickOutput:
        try:
            return self._inner.tick(tick)
        except NeedsExecutor as exc:
            self._pin(self._prompt, exc.reason)
        return self._inner.tick(tick)

    def interrupt(self) -> None:
        self._inner.interrupt()

    def close(self) -> None:
        self._inner.close()
