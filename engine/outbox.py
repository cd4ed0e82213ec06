"""Responses of a session on their way to its client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Final, TypeAlias

from proto import engine_pb2 as pb
from proto.fields import MAX_ITEMS
from proto.results import Results

from .backend import Stage

Response: TypeAlias = pb.ProcessResponse | Results

#: Responses that may wait for a client that does not read, before its own messages are no longer read either.
OUTBOX_LIMIT: Final = 64


STAGES: Final[Mapping[str, pb.Progress.Stage]] = {
    "loading": pb.Progress.STAGE_LOADING,
    "planning": pb.Progress.STAGE_PLANNING,
    "warming": pb.Progress.STAGE_WARMING,
    "ready": pb.Progress.STAGE_READY,
}


class Outbox:
    """Responses on their way to the client, in order. One writer takes, the session puts."""

    def __init__(self) -> None:
        self._waiting: deque[Response] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False

    def put(self, response: Response) -> None:
        """Never blocks; what comes after ``close`` is discarded."""
        if self._closed:
            return
        if isinstance(response, Results) and self._waiting and isinstance(self._waiting[-1], Results):
            last = self._waiting[-1]
            # No client reads a longer one, and however long it grew, it would count as one that waits.
            fits = len(last.results) + len(response.results) <= MAX_ITEMS
            if fits and last.is_small and response.is_small:
                # The writer is slower than the graph: one message costs as much as any (hot-path.md section 4).
                self._waiting[-1] = Results([*last.results, *response.results], last.credits + response.credits)
                return
        self._waiting.append(response)
        self._changed.set()
        if len(self._waiting) >= OUTBOX_LIMIT:
            self._room.clear()

    def progress(self, stage: Stage) -> None:
        """Something slow goes on."""
        progress = pb.Progress(
            stage=STAGES[stage.name],
            done=stage.done,
            total=stage.total,
            node_id=stage.node_id,
            message=stage.message,
        )
        self.put(pb.ProcessResponse(progress=progress))

    def close(self) -> None:
        """No more follows; the writer still takes what waits."""
        self._closed = True
        self._changed.set()
        self._room.set()

    async def take(self) -> Response | None:
        """The next response; None at the end."""
        while not self._waiting:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        response = self._waiting.popleft()
        if len(self._waiting) < OUTBOX_LIMIT:
            self._room.set()
        return response

    async def room(self) -> None:
        """Wait until the client has read enough. Its frames then back up in HTTP/2's window, not in our memory."""
        await self._room.wait()
