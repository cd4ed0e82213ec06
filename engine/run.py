"""What a session has the executor thread do in one visit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .audio import Sound
from .backend import FrameIn, Graph, RunResult
from .graph.workflow import Prompt
from .parameters import Revision
from .profile import Profile
from .run_clock import RunClock
from .shared_run import run_together


@dataclass(slots=True, eq=False)
class Waiting:
    """A frame that waits for its run."""

    frame: FrameIn
    arrived: float  # time.monotonic() seconds
    due: float  # when its run should be over, on the same clock; infinite without a latency budget


@dataclass(frozen=True, slots=True)
class Run:
    """Frames of one run, or the sound that it is for, with what they run on."""

    revision: Revision
    frames: Sequence[FrameIn]
    waiting_us: Sequence[int]
    clock: RunClock
    sound: Sound | None = None
    taken: Sequence[Waiting] = ()  # the frames as they waited, where each is a run of its own
    profile: Profile | None = None  # what learns how long its nodes take

    @property
    def inline(self) -> bool:
        return self.revision.graph.inline

    @property
    def pts(self) -> int:
        """Of what it is for."""
        if self.frames or self.sound is None:
            return self.frames[0].pts
        return self.sound.pts

    def run(self) -> RunResult:
        self.clock.begin(self.revision)
        graph, prompt = self.revision.graph, self.revision.prompt
        if self.profile is None:
            return self._run(graph, prompt)
        graph.observe(self.profile.node)
        try:
            return self._run(graph, prompt)
        finally:
            graph.observe(None)

    def _run(self, graph: Graph, prompt: Prompt) -> RunResult:
        if self.taken:
            return self._one_by_one(graph, prompt)
        return graph.run(prompt, self.frames) if self.sound is None else graph.run(prompt, self.frames, self.sound)

    def run_with(self, others: Sequence[Run]) -> list[RunResult | Exception]:
        """It and runs of other sessions that are ``alike``, as one; what each gave or raised."""
        return run_together([self, *others])

    def _one_by_one(self, graph: Graph, prompt: Prompt) -> RunResult:
        results: list[RunResult] = []
        for frame in self.frames:
            try:
                results.append(graph.run(prompt, [frame]))
            except Exception:  # whatever a node raises: what ran is answered, and the frame runs again by itself
                if not results:
                    raise
                break
        pictures = [result.pictures[0] if result.pictures else None for result in results]
        graph_us = sum(result.graph_us for result in results) // len(results)
        convert_us = sum(result.convert_us for result in results) // len(results)
        return RunResult(pictures, graph_us=graph_us, convert_us=convert_us, apart=results)
