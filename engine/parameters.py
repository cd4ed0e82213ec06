"""The parameters of a session: versions, what an update replaces, and the way back when its first frames fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from .backend import Graph, GraphFailed
from .errors import EngineError, UpdateReverted
from .graph.workflow import Prompt

logger = logging.getLogger(__name__)


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
        # What held before the last update, until a frame has been made with the update.
        self._fallback: Revision | None = None
        self._proven = True  # by the warm-up
        self._effects: list[_Effect] = []

    def adopt(self, prompt: Prompt, graph: Graph) -> int:
        """Parameters, checked before, for every frame that is not running yet; returns their version."""
        replaced = self.current
        if self._proven:
            self._fallback, self._proven = replaced, False
        elif replaced.graph is not graph and (self._fallback is None or replaced.graph is not self._fallback.graph):
            self._discard(replaced.graph)  # it never made a picture, so nothing falls back to it
        self.current = Revision(replaced.version + 1, prompt, graph)
        return self.current.version

    def succeeded(self, revision: Revision, pts: int) -> None:
        """A run with ``revision``, whose first frame had ``pts``, gave what it should."""
        if revision is self.current:
            self._proven = True
            fallback, self._fallback = self._fallback, None
            if fallback is not None and fallback.graph is not revision.graph:
                self._discard(fallback.graph)
        for effect in self._effects:
            if effect.version <= revision.version and not effect.pts.done():
                effect.pts.set_result(pts)

    def failed(self, revision: Revision, error: GraphFailed) -> str | None:
        """A run with ``revision`` failed. A sentence when that brought the last good parameters back."""
        if revision is not self.current:
            return None
        if self._fallback is None:
            self._proven = False  # nothing may fall back to parameters that fail themselves
            return None
        good, self._fallback, self._proven = self._fallback, None, True
        text = f"version {revision.version} failed on its first frames ({error.message}); the one before holds again"
        # A number of its own: versions only grow, or a client could not tell the two apart.
        self.current = Revision(revision.version + 1, good.prompt, good.graph)
        if revision.graph is not good.graph:
            self._discard(revision.graph)
        logger.warning("parameters version %d reverted: %s", revision.version, error.message)
        self._refuse_waiting(UpdateReverted(text))
        return text

    async def effective_pts(self, version: int, timeout_s: float) -> int | None:
        """pts of the first frame made with ``version``; None when none came in time.

        Raises UpdateReverted when that frame failed and the parameters before it hold again, NoSuchSession when the
        session ends first.
        """
        effect = _Effect(version)
        self._effects.append(effect)
        try:
            return await asyncio.wait_for(effect.pts, timeout_s)
        except TimeoutError:
            return None
        finally:
            self._effects.remove(effect)

    def close(self, error: EngineError) -> None:
        """Discard every graph; who waits for an effect gets ``error``."""
        self._refuse_waiting(error)
        self._discard(self.current.graph)
        if self._fallback is not None and self._fallback.graph is not self.current.graph:
            self._discard(self._fallback.graph)
        self._fallback = None

    def _refuse_waiting(self, error: EngineError) -> None:
        for effect in self._effects:
            if not effect.pts.done():
                effect.pts.set_exception(error)
