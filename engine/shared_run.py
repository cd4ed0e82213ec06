"""One run for frames of several sessions whose graphs and parameters are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .backend import RunResult

if TYPE_CHECKING:
    from .run import Run


def run_together(runs: Sequence[Run]) -> list[RunResult | Exception]:
    """What each run gave or raised; on the executor thread. All frames go through the first one's graph.

    Where that fails, or gives another number of pictures than there are frames, each runs by itself: what one session
    does wrong is not the others' failure, and a batch may not fit into memory where its frames do.
    """
    first = runs[0]
    for run in runs:
        run.clock.begin(run.revision)
    frames = [frame for run in runs for frame in run.frames]
    try:
        whole = first.revision.graph.run(first.revision.prompt, frames)
    except Exception:  # each says by itself what is wrong
        return [_alone(run) for run in runs]
    if len(whole.pictures) != len(frames) or None in whole.pictures:
        return [_alone(run) for run in runs]
    results: list[RunResult | Exception] = []
    begin = 0
    for run in runs:
        end = begin + len(run.frames)
        results.append(replace(whole, pictures=whole.pictures[begin:end]))
        begin = end
    return results


def _alone(run: Run) -> RunResult | Exception:
    try:
        return run.run()
    except Exception as exc:  # as the scheduler takes it
        return exc
