"""The end of a task that somebody owns."""

from __future__ import annotations

import asyncio
from typing import Any


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel ``task`` and wait until it is over. Raises what it raised, if that is not its cancellation.

    A cancellation of the caller goes on. Around ``await task`` a ``suppress`` that means the task's own swallows it
    too, and whoever ends the caller waits for ever: a shim that was told to stop while its engine went did not end.
    """
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
