"""How long the stages and the nodes of a session's next frames take, for whoever asks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Final

from proto import engine_pb2 as pb

from .backend import RunResult

#: Frames of one profile, and how long they are waited for, where the request does not say and at the most.
USUAL_FRAMES: Final = 30
MOST_FRAMES: Final = 1000
USUAL_TIMEOUT_MS: Final = 10_000
MOST_TIMEOUT_MS: Final = 60_000

#: In the order of a frame's way, as in ``StageTime.stage``.
STAGES: Final = ("waiting", "convert_in", "graph", "convert_out")


class Profile:
    """Of one session. ``node`` is called on the executor thread during a run, ``run`` on the loop after it."""

    def __init__(self, frames: int) -> None:
        self.frames = 0
        self.done = asyncio.Event()
        self._wanted = frames
        self._stages: dict[str, list[float]] = {name: [] for name in STAGES}  # ms of each frame
        self._nodes: dict[str, tuple[str, int, float]] = {}  # class, runs, seconds, by node id

    def node(self, node_id: str, class_type: str, seconds: float) -> None:
        """A node has run for so long; on a GPU until its work was done."""
        _, runs, before = self._nodes.get(node_id, (class_type, 0, 0.0))
        self._nodes[node_id] = class_type, runs + 1, before + seconds

    def run(self, waiting_us: Sequence[int], result: RunResult) -> None:
        """A run has ended well; ``waiting_us``: of each of its frames."""
        if self.done.is_set():
            return
        parts = result.apart or [result] * len(waiting_us)
        for waited, part in zip(waiting_us, parts, strict=False):  # the last frames may have to run once more
            convert_out_us = part.convert_us - part.convert_in_us
            took_us = (waited, part.convert_in_us, part.graph_us, convert_out_us)
            for name, each in zip(STAGES, took_us, strict=True):
                self._stages[name].append(each / 1000)
            self.frames += 1
        if self.frames >= self._wanted:
            self.done.set()

    def message(self) -> pb.SessionProfile:
        """What was seen so far. The stages of a run of several frames at once are those of the whole run."""
        stages = [
            pb.StageTime(
                stage=name, mean_ms=sum(took) / len(took), p95_ms=sorted(took)[math.ceil(0.95 * len(took)) - 1]
            )
            for name, took in self._stages.items()
            if took
        ]
        nodes = [
            pb.NodeTime(node_id=node_id, class_type=class_type, runs=runs, mean_ms=1000 * seconds / runs)
            for node_id, (class_type, runs, seconds) in self._nodes.items()
        ]
        return pb.SessionProfile(frames=self.frames, stages=stages, nodes=nodes)
