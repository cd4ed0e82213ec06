"""The parameters of a session: versions, what an update replaces, and the way back when its next frames fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from .backend import Graph, GraphFailed
from .errors import EngineError, UpdateReverted
from .graph.workflow import Prompt, is_link

logger = logging.getLogger(__name__)

#: Runs after an update within which a failure is the update's: the first may be spared by a cache or by what a node
#: keeps from frame to frame, and half a second at 30 fps is soon enough to still know the cause.
PROBATION_RUNS: Final = 15


def links_of(prompt: Prompt) -> dict[tuple[str, str], tuple[str, int]]:
    """What feeds what: (node id, input) to (node id, output). A graph of other links is another graph."""
    return {
        (node_id, name): (value[0], value[1])
        for node_id, node in prompt.items()
        for name, value in node["inputs"].items()
        if is_link(value)
    }


@dataclass(frozen=True, slots=True)
class Revision:
    """The parameters at one version: immutable, so that a frame's result can name what made it."""

    version: int
    prompt: Prompt
    graph: Graph


@dataclass(slots=True)
class _Effect:
    """Somebody waits for the first frame of a version."""

    version: int
    pts: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Parameters:
    """``current`` is what the next run takes. ``discard`` gets each graph that is of no more use, and closes it.

    ``updating`` is held by whoever prepares a change: two at once would each replace what the other saw.
    """

    def __init__(self, prompt: Prompt, graph: Graph, discard: Callable[[Graph], None]) -> None:
        self.current = Revision(1, prompt, graph)
        self.updating = asyncio.Lock()
        self._discard = discard
        # The last parameters that made a picture before ``current``; None when ``current`` needs no way back.
        self._fallback: Revision | None = None
        # Runs that ``current`` has behind it, up to PROBATION_RUNS; the warm-up is the first one's probation.
        self._runs = PROBATION_RUNS
        self._effects: list[_Effect] = []

    def adopt(self, prompt: Prompt, graph: Graph) -> int:
        """Parameters, checked before, for every frame that is not running yet; returns their version."""
        replaced, fallback = self.current, self._fallback
        if self._runs:  # it works, so it is the best to come back to
            self._fallback = replaced
            self._release(fallback, replaced.graph, graph)
        else:  # nothing falls back to what never made a picture
            self._release(replaced, fallback.graph if fallback is not None else None, graph)
        self._runs = 0
        self.current = Revision(replaced.version + 1, prompt, graph)
        return self.current.version

    def succeeded(self, revision: Revision, pts: int) -> None:
        """A run with ``revision``, whose first frame had ``pts``, gave what it should."""
        if revision is self.current and self._runs < PROBATION_RUNS:
            self._runs += 1
            if self._runs == PROBATION_RUNS:
                fallback, self._fallback = self._fallback, None
                self._release(fallback, revision.graph)
        for effect in self._effects:
            if effect.version <= revision.version and not effect.pts.done():
                effect.pts.set_result(pts)

    def failed(self, revision: Revision, error: GraphFailed) -> str | None:
        """A run with ``revision`` failed. A sentence when that brought the last good parameters back."""
        if revision is not self.current:
            return None
        good, self._fallback = self._fallback, None
        if good is None:
            self._runs = 0  # nothing may fall back to parameters that fail themselves
            return None
        when = "its first frame" if self._runs == 0 else f"frame {self._runs + 1} after it"
        text = f"version {revision.version} failed on {when} ({error.message}); what worked before it holds again"
        # A number of its own: versions only grow, or a client could not tell the two apart.
        self.current, self._runs = Revision(revision.version + 1, good.prompt, good.graph), PROBATION_RUNS
        self._release(revision, good.graph)
        logger.warning("parameters version %d reverted: %s", revision.version, error.message)
        self._refuse_waiting(UpdateReverted(text))
        return text

    def _release(self, revision: Revision | None, *used: Graph | None) -> None:
        """Discard the graph of a revision that is over, unless another one has it."""
        if revision is not None and all(revision.graph is not graph for graph in used):
            self._discard(revision.graph)

    async def effective_pts(self, version: int, timeout_s: float) -> int | None:
        """pts of the first frame made with ``version``; None when none came in time.

        Raises UpdateReverted when that frame failed and the parameters before it hold again, NoSuchSession when the
        session ends first.
        """
        effect = _Effect(version)
        self._effects.append(effect)
        try:
            async with asyncio.timeout(timeout_s):
                return await effect.pts
        except TimeoutError:
            return None
        finally:
            self._effects.remove(effect)

    def close(self, error: EngineError) -> None:
        """Discard every graph; who waits for an effect gets ``error``."""
        self._refuse_waiting(error)
        self._discard(self.current.graph)
        fallback, self._fallback = self._fallback, None
        self._release(fallback, self.current.graph)

    def _refuse_waiting(self, error: EngineError) -> None:
        for effect in self._effects:
            if not effect.pts.done():
                effect.pts.set_exception(error)
