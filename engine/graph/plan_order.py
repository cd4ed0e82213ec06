"""The order in which ComfyUI's executor would run the nodes of a tick.

The same order, not just a valid one: nodes that draw random numbers or share state give the same pictures then, and
when a node fails the same others have run.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Protocol


class Place(Protocol):
    """What the order has to know of a node."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Ids of the nodes that it waits for, in the order of its inputs; lazy ones are left out."""

    @property
    def is_output(self) -> bool: ...

    @property
    def is_async(self) -> bool: ...


class Order:
    """The nodes of one tick that still have to run.

    places: every node by id. missing: ids of those whose outputs are not there (it may shrink while the tick runs).
    """

    def __init__(self, places: Mapping[str, Place], missing: Container[str], outputs: Iterable[str]) -> None:
        self._places = places
        self._missing = missing
        #: How many nodes (or calls that were not awaited yet) each one waits for.
        self.pending: dict[str, int] = {}
        self._waiters: dict[str, dict[str, None]] = {}
        for node_id in outputs:
            if node_id in missing:
                self._add(node_id)

    def _add(self, root: str) -> None:
        found, links = [root], []
        while found:
            node_id = found.pop()
            if node_id in self.pending:
                continue
            self.pending[node_id] = 0
            self._waiters[node_id] = {}
            for source in self._places[node_id].sources:
                if source in self._missing:
                    found.append(source)
                    links.append((source, node_id))
        for source, node_id in links:
            self._wait(source, node_id)

    def _wait(self, source: str, node_id: str) -> None:
        waiters = self._waiters[source]
        if node_id not in waiters:
            waiters[node_id] = None
            self.pending[node_id] += 1

    def need(self, node_id: str, source: str) -> None:
        """``node_id`` turned out to need ``source``, one of its lazy inputs."""
        if source in self._missing:
            self._add(source)
            self._wait(source, node_id)

    def hold(self, node_id: str) -> None:
        """Do not offer this node until ``release``: its calls are under way."""
        self.pending[node_id] += 1

    def release(self, node_id: str) -> None:
        self.pending[node_id] -= 1

    def done(self, node_id: str) -> None:
        del self.pending[node_id]
        for waiter in self._waiters.pop(node_id):
            self.pending[waiter] -= 1

    def pick(self) -> str | None:
        """The next node; None: all wait. Outputs and coroutines first, then what an output waits for (directly, then
        through one other node), then whatever came first."""
        ready = [node_id for node_id, count in self.pending.items() if count == 0]
        places, waiters = self._places, self._waiters
        for node_id in ready:
            if places[node_id].is_output or places[node_id].is_async:
                return node_id
        for node_id in ready:
            if any(places[waiter].is_output for waiter in waiters[node_id]):
                return node_id
        for node_id in ready:
            if any(places[last].is_output for waiter in waiters[node_id] for last in waiters[waiter]):
                return node_id
        return ready[0] if ready else None
