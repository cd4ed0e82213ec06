"""Text that depends on nothing live, sent again now and then: the executor computes it once, in the warm-up perhaps,
and a reader of the data channel may come at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from .live_ends import LIVE_IMAGE_INPUT
from .workflow import Prompt, is_link

#: Seconds between two sendings of the same words.
REPEAT_S: Final = 1.0

_LIVE_INPUTS: Final = (LIVE_IMAGE_INPUT, "LoadAudioTensor")


class Texts:
    """What each tick sends: what it computed, and static text whose time has come."""

    def __init__(self, prompt: Prompt, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._static: tuple[str, ...] = ()
        self._known: dict[str, tuple[str, float]] = {}  # (text, when it was sent) by node id
        self.follow(prompt)

    def follow(self, prompt: Prompt) -> None:
        """Serve an altered prompt from the next tick on."""
        live = live_nodes(prompt)
        self._static = tuple(
            node_id
            for node_id, node in prompt.items()
            if node["class_type"] == "SaveTextTensor" and node_id not in live
        )
        self._known = {node_id: known for node_id, known in self._known.items() if node_id in self._static}

    def of(self, computed: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """What to send of a tick that ``computed`` these texts by node id."""
        now = self._clock()
        sent = list(computed)
        for node_id, text in computed:
            if node_id in self._static:
                self._known[node_id] = (text, now)
        for node_id, (text, at) in self._known.items():
            if now - at >= REPEAT_S:
                self._known[node_id] = (text, now)
                sent.append((node_id, text))
        return sent

    def forget_times(self) -> None:
        """Nobody has seen what was sent so far: it was the warm-up."""
        self._known = {node_id: (text, float("-inf")) for node_id, (text, _) in self._known.items()}


def live_nodes(prompt: Prompt) -> set[str]:
    """Ids of the live inputs and of everything that depends on one."""
    feeds: dict[str, list[str]] = {}
    for node_id, node in prompt.items():
        for value in node["inputs"].values():
            if is_link(value):
                feeds.setdefault(value[0], []).append(node_id)
    live: set[str] = set()
    waiting = [node_id for node_id, node in prompt.items() if node["class_type"] in _LIVE_INPUTS]
    while waiting:
        node_id = waiting.pop()
        if node_id not in live:
            live.add(node_id)
            waiting += feeds.get(node_id, [])
    return live
