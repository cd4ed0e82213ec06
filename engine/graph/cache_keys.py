"""Cache keys for ComfyUI's executor that cost little per tick.

Stock keys hash every node with all of its ancestors, in every tick: quadratic in the length of a chain, and most of
what the executor costs. Here a key is ``(node id, class, stamp)``. A node's stamp changes exactly when its class, one
of its literals, a link of its, its IS_CHANGED value, or an ancestor's stamp changes, so it is stale exactly when the
stock key says so. Nodes that come out of an expansion keep the stock key.
"""

from __future__ import annotations

import graphlib
from typing import Any

from .workflow import Prompt, is_link


class Stamps:
    """The stamps of one runner's prompt, kept from tick to tick."""

    def __init__(self) -> None:
        #: By node id, as of the last ``advance``.
        self.current: dict[str, int] = {}
        self._prompt: Prompt = {}
        self._taken = False
        self._order: tuple[str, ...] = ()
        self._links: dict[str, tuple[tuple[str, str, int], ...]] = {}
        self._literals: dict[str, tuple[str, dict[str, Any]]] = {}
        self._revisions: dict[str, int] = {}
        self._last: dict[str, tuple[Any, Any, Any, Any]] = {}
        self._next = 0

    def take(self, prompt: Prompt) -> None:
        """Use ``prompt`` from the next tick on. Only what the ticks see counts: there and back again is no change."""
        self._prompt, self._taken = prompt, False

    def _adopt(self) -> None:
        self._taken = True
        links: dict[str, tuple[tuple[str, str, int], ...]] = {}
        for node_id, node in self._prompt.items():
            inputs = node["inputs"]
            # Sorted, because an override that writes the same link again may change the order of the inputs.
            linked = [(name, value[0], value[1]) for name, value in inputs.items() if is_link(value)]
            links[node_id] = tuple(sorted(linked))
            described = (node["class_type"], {name: value for name, value in inputs.items() if not is_link(value)})
            before = self._literals.get(node_id)
            if before is None or before[0] != described[0] or not same(before[1], described[1]):
                self._next += 1
                self._revisions[node_id] = self._next
                self._literals[node_id] = described
        self._links = links
        for gone in self._literals.keys() - links.keys():
            del self._literals[gone], self._revisions[gone]
            self._last.pop(gone, None)
            self.current.pop(gone, None)
        graph = {node_id: [source for _, source, _ in sources] for node_id, sources in links.items()}
        self._order = tuple(graphlib.TopologicalSorter(graph).static_order())

    async def advance(self, is_changed: Any) -> None:
        """Bring the stamps to this tick. ``is_changed`` is the executor's, asked once for every node."""
        if not self._taken:
            self._adopt()
        for node_id in self._order:
            links = self._links[node_id]
            fingerprint = (
                self._revisions[node_id],
                links,
                tuple(self.current[source] for _, source, _ in links),
                await is_changed.get(node_id),
            )
            last = self._last.get(node_id)
            if last is None or last[:3] != fingerprint[:3] or not same(last[3], fingerprint[3]):
                self._next += 1
                self.current[node_id] = self._next
                self._last[node_id] = fingerprint


def same(one: Any, other: Any) -> bool:
    """Equality by value for JSON-like data; anything else, a tensor say, never equals.

    NaN differs from itself even when it is one object: nodes return it to say "always changed".
    """
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    plain = (bool, int, float, str, bytes, type(None))
    # Of one type: 1, 1.0 and True are equal, and a node that takes anything makes another thing of each.
    return isinstance(one, plain) and type(one) is type(other) and bool(one == other)


def key_set_class(stock: type, stamps: Stamps) -> type:
    """A class for ComfyUI's caches over ``stock``, its ``CacheKeySetInputSignature``.

    Made for every tick anew by the caches, with the tick's prompt; versions before 0.3.75 make two (outputs and ui),
    which must agree, so the stamps advance once per prompt object.
    """
    advanced_for: list[Any] = [None]

    class StampKeySet(stock):  # type: ignore[misc]
        async def add_keys(self, node_ids: Any) -> None:
            if advanced_for[0] is not self.dynprompt:
                await stamps.advance(self.is_changed_cache)
                advanced_for[0] = self.dynprompt
            for node_id in node_ids:
                if node_id in self.keys or not self.dynprompt.has_node(node_id):
                    continue
                class_type = self.dynprompt.get_node(node_id)["class_type"]
                if self.dynprompt.get_parent_node_id(node_id) is None and node_id in stamps.current:
                    self.keys[node_id] = (node_id, class_type, stamps.current[node_id])
                else:
                    self.keys[node_id] = await self.get_node_signature(self.dynprompt, node_id)
                self.subcache_keys[node_id] = (node_id, class_type)

    return StampKeySet
