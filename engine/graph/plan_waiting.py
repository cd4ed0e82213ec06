"""Coroutine nodes whose calls were started and have not ended, while the plan goes on with others."""

from __future__ import annotations

import asyncio
from typing import Any

from .plan_order import Order
from .plan_step import Step


class UnderWay:
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
