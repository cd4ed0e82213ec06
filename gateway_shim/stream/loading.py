"""How far a session that is being opened, or an update, has come: for the events channel and for viewers."""

from __future__ import annotations

import asyncio

from proto import engine_pb2 as pb

from ..media.overlay import Notice
from .events import Events

#: At least this long between two progress events of one stage: nodes may report every step.
PROGRESS_EVERY_S = 0.25


class Loading:
    """What the engine said of it last."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._stage: pb.Progress | None = None
        self._sent_at: dict[str, float] = {}  # loop time by stage

    def begin(self) -> None:
        """Another session is being opened."""
        self._stage = None

    def heard(self, progress: pb.Progress) -> None:
        self._stage = progress
        stage = pb.Progress.Stage.Name(progress.stage).removeprefix("STAGE_").lower()
        now = asyncio.get_running_loop().time()
        if now - self._sent_at.get(stage, -PROGRESS_EVERY_S) < PROGRESS_EVERY_S:
            return
        self._sent_at[stage] = now
        self._events.send(
            "progress",
            {
                "stage": stage,
                "node_id": progress.node_id,
                "done": progress.done,
                "total": progress.total,
                "message": progress.message,
            },
        )

    def notice(self) -> Notice:
        stage = self._stage
        if stage is None:
            return Notice("The workflow is loading")
        progress = stage.done / stage.total if stage.total else None
        words = {pb.Progress.STAGE_WARMING: "warming up"}.get(stage.stage, "loading")
        return Notice(f"The workflow is {words}", progress)
