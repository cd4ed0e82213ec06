"""The executor thread: the one place where torch and ComfyUI run.

Neither is safe to enter from two threads, and CUDA contexts, inference mode and ComfyUI's globals are per thread or
per process; so one thread owns them all, and the event loop of gRPC hands it work.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

from .busy import Busy

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

#: Seconds a thread may keep the GIL while another waits. CPython's own 5 ms is a third of a frame at 60 fps that the
#: event loop would wait for whenever a node computes in Python.
SWITCH_INTERVAL_S: Final = 0.0005

#: Seconds without work after which young garbage is collected: between two frames at 30 fps, not inside one.
IDLE_COLLECT_S: Final = 0.01


@dataclass(slots=True)
class _Job:
    call: Callable[[], Any]
    done: asyncio.Future[Any]
    context: contextvars.Context


class Executor:
    """One thread with its own asyncio loop, fed in order.

    Jobs are plain functions. The thread's loop is not running while a job runs, so a job may drive coroutines with
    ``asyncio.get_event_loop().run_until_complete`` (ComfyUI's executor and async nodes need that); a job that returns
    a coroutine has it driven for it.
    """

    def __init__(self, name: str = "executor") -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._began: float | None = None  # when the job under way did, time.monotonic() seconds
        self.busy = Busy()

    def start(self) -> None:
        """Start the thread; call it on the loop that will await the results."""
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._thread.start()

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run ``call`` on the thread after everything submitted before; the future is the caller's loop's.

        A future that is cancelled before its job begins is skipped. One that runs cannot be interrupted from here.
        """
        assert self._loop is not None, "start() comes first"
        done: asyncio.Future[T] = self._loop.create_future()
        if self._stopping:
            done.cancel()
            return done
        plain = call if not args and not kwargs else functools.partial(call, *args, **kwargs)
        self._jobs.put(_Job(plain, done, contextvars.copy_context()))
        return done

    @property
    def job_ms(self) -> int:
        """Since the job that is under way began, at least 1; 0: none is. Any thread may ask."""
        began = self._began
        return 0 if began is None else max(1, round((time.monotonic() - began) * 1000))

    async def stop(self, deadline_s: float) -> bool:
        """End the thread after what was submitted and not cancelled. False: still busy at the deadline."""
        if self._loop is None:
            return True
        self._stopping = True
        self._jobs.put(None)
        # Polling, because a helper thread that joins a hung one would hang the interpreter's exit with it.
        deadline = self._loop.time() + deadline_s
        while self._thread.is_alive() and self._loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return not self._thread.is_alive()

    def _main(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            while (job := self._next()) is not None:
                if not job.done.cancelled():
                    self.busy.turns(True)
                    self._began = time.monotonic()
                    self._run(job, loop)
                    self._began = None
                    self.busy.turns(False)
                # The job holds the frames that it ran on; keep them no longer than the run.
                del job
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    def _next(self) -> _Job | None:
        try:
            return self._jobs.get(timeout=IDLE_COLLECT_S)
        except queue.Empty:
            gc.collect(1)
            return self._jobs.get()

    def _run(self, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
        try:
            result = job.context.run(job.call)
            if asyncio.iscoroutine(result):
                result = loop.run_until_complete(result)
        except BaseException as exc:  # whoever awaits the job learns of it; the thread lives on
            self._settle(job.done, None, exc)
        else:
            self._settle(job.done, result, None)

    def _settle(self, done: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_resolve, done, result, error)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.debug("a result came after the loop was closed")


def _resolve(done: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    elif isinstance(error, Exception):
        done.set_exception(error)
    else:  # SystemExit out of a node must not end the engine's loop, nor CancelledError the task that waits
        done.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


def settle_heap() -> None:
    """Collect, then take what is left out of the collector's sight: after ComfyUI's load and after each warm-up.

    A full collection with ComfyUI loaded (310,000 objects) takes 160 to 230 ms, of a frozen heap 1 ms
    (comfyui.md 2.3); the frames to come would feel it.
    """
    gc.collect()
    gc.freeze()


def release_heap() -> None:
    """Collect frozen garbage too, such as the cycles of a closed graph. Slow: when nobody's frames wait."""
    gc.unfreeze()
    settle_heap()
