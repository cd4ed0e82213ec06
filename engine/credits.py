"""How many frames the client of a session may have under way."""

from __future__ import annotations

from typing import Final

#: Frames a client may have under way beyond the batch in the graph: one that waits for its turn and one on the wire,
#: in either direction. Fewer leave the graph idle between frames; each one more adds a whole run of a slow graph to
#: the latency of every frame (with a graph of 40 ms, five in all were 200 ms old when they came back).
PIPELINE_FRAMES: Final = 2


class Credits:
    """Of one session. At every moment ``left`` and the frames in flight add up to the first grant and ``extra``."""

    def __init__(self, max_batch: int) -> None:
        self.left = PIPELINE_FRAMES + max_batch
        self.extra = 0  # while the graph is quick

    def spend(self) -> bool:
        """For a frame that came; False: the client had none."""
        if self.left == 0:
            return False
        self.left -= 1
        return True

    def give(self, credits: int) -> None:
        """They go to the client."""
        self.left += credits

    def of_run(self, frames: int, per_visit: int) -> int:
        """What to give with the results of a run: what its frames had, and what a quick graph has beyond, of which
        as many frames as one visit takes may wait while as many run."""
        extra = 2 * (per_visit - 1)
        change = max(extra - self.extra, -frames)
        self.extra += change
        return frames + change
