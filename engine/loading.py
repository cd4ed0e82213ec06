"""ComfyUI's way from configured to ready, or to the sentence that says why not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Final

from proto import engine_pb2 as pb

from .backend import HOW_TO_GET_COMFYUI, Backend, ComfyInfo, LoadFailed, Report, Stage
from .errors import NotReady, Stopping, WorkflowRefused
from .executor import Executor, settle_heap
from .graph.device import cpu_device
from .starts import Starts

logger = logging.getLogger(__name__)

#: How often a client that waits for ComfyUI hears that it still loads; silence looks like a hang.
PROGRESS_INTERVAL_S: Final = 1.0

#: Characters of a failure's text that are passed on; an import error of a large pack can quote whole files.
DETAIL_CHARS: Final = 400


class LoadState(Enum):
    """The values are those of the contract."""

    ABSENT = pb.ComfyUI.STATE_ABSENT
    LOADING = pb.ComfyUI.STATE_LOADING
    READY = pb.ComfyUI.STATE_READY
    FAILED = pb.ComfyUI.STATE_FAILED


class Loading:
    """State of the backend; ``run`` moves it on, once. ``on_settled`` is called when it has come to an end."""

    def __init__(
        self,
        backend: Backend | None,
        directory: Path | None,
        on_settled: Callable[[LoadState], None],
        starts: Starts | None = None,
    ) -> None:
        self.backend = backend
        self.state = LoadState.LOADING if backend is not None else LoadState.ABSENT
        self.problem = "" if backend is not None else "there is no ComfyUI here"
        self._directory = directory
        self._starts = starts or Starts(None)
        self._waiting = ""  # why the load has not begun
        self._info = ComfyInfo()
        self._on_settled = on_settled
        self._settled = asyncio.Event()
        self._stopped = False

    async def run(self, executor: Executor) -> None:
        """Load on the executor thread. Never raises for what ComfyUI does: without it pass-through still runs."""
        if self.backend is None:
            logger.info("only pass-through runs: %s", self.detail)
        else:
            await self._not_too_often()
            began = time.monotonic()
            try:
                self._info = await executor.submit(self.backend.load)
                await executor.submit(settle_heap)
            except Exception as exc:  # ComfyUI and its packs are anybody's code
                logger.exception("ComfyUI did not load from %s", self._directory)
                text = f"ComfyUI in {self._directory} did not load: {type(exc).__name__}: {exc}"
                self.problem = (str(exc) if isinstance(exc, LoadFailed) else text)[:DETAIL_CHARS]
                self.state = LoadState.FAILED
            else:
                self.state = LoadState.READY
                logger.info("ready for workflows after %.1f s", time.monotonic() - began)
        self._starts.done()
        self._settled.set()
        self._on_settled(self.state)

    async def _not_too_often(self) -> None:
        """A load that kills the process must not keep the machine busy with nothing else."""
        deaths, pause_s = self._starts.begin()
        if pause_s:
            self._waiting = f"ComfyUI's load ended {deaths} processes in a row; the next try is in {pause_s:.0f} s"
            logger.warning("%s", self._waiting)
            await asyncio.sleep(pause_s)
            self._waiting = ""

    def stop(self) -> None:
        """Whoever waits gets Stopping."""
        self._starts.done()
        self._stopped = True
        self._settled.set()

    @property
    def detail(self) -> str:
        """What is wrong and what to do; empty while nothing is."""
        return f"{self.problem}; {HOW_TO_GET_COMFYUI}" if self.problem else self._waiting

    def ready(self) -> Backend:
        """The loaded backend. Raises NotReady while it loads, WorkflowRefused when there is none."""
        if self.state is LoadState.LOADING:
            raise NotReady("ComfyUI is loading; try again in a few seconds")
        if self.backend is None or self.state is not LoadState.READY:
            raise WorkflowRefused(f"only pass-through runs here: {self.detail}")
        return self.backend

    async def wait(self, report: Report) -> Backend:
        """As ``ready``, after the load's end."""
        while self.state is LoadState.LOADING and not self._stopped:
            report(Stage("loading", self._waiting or "ComfyUI is loading"))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROGRESS_INTERVAL_S):
                    await self._settled.wait()
        if self._stopped:
            raise Stopping("the engine stops")
        return self.ready()

    def message(self) -> pb.ComfyUI:
        return pb.ComfyUI(
            state=self.state.value,
            version=self._info.version,
            directory=str(self._directory or ""),
            node_classes=self._info.node_classes,
            failed_packs=self._info.failed_packs,
            detail=self.detail,
        )

    def device(self) -> pb.Device:
        info = self.backend.device() if self.backend is not None else cpu_device()
        return pb.Device(
            type=info.type,
            name=info.name,
            uuid=info.uuid,
            memory_total_bytes=info.memory_total_bytes,
            memory_free_bytes=info.memory_free_bytes,
            compute_major=info.compute[0],
            compute_minor=info.compute[1],
            utilization_compute=info.utilization_compute,
            utilization_memory=info.utilization_memory,
        )
