"""One stream of a run: its source, its viewer, and the account that the shim gives of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import aiohttp

from gateway_shim.localnet.live_stream import LiveStream
from gateway_shim.trickle.publisher import Publisher

from .appliance import NAME, Appliance
from .figures import Judged, Span, judge, ledger_gap
from .plan import SETTLED_S
from .source import Recipe, Source
from .viewer import Viewer

_POLL_S = 0.1
_END_S = 20.0
_CATCH_UP_S = 3.0  # longer than any stall
OUTPUT_SEGMENT_S = 2.0  # StreamSettings.segment_s

PASS = {
    "1": {"class_type": "LoadTensor", "inputs": {}},
    "9": {"class_type": "SaveTensor", "inputs": {"images": ["1", 0]}},
}
INVERT = {
    "1": {"class_type": "LoadTensor", "inputs": {}},
    "5": {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": 1, "sigma": 0.1}},
    "6": {"class_type": "ImageInvert", "inputs": {"image": ["5", 0]}},
    "9": {"class_type": "SaveTensor", "inputs": {"images": ["6", 0]}},
}
SLOW = {
    "1": {"class_type": "LoadTensor", "inputs": {}},
    "5": {"class_type": "ChaosSlow", "inputs": {"image": ["1", 0], "seconds": 0.14}},
    "9": {"class_type": "SaveTensor", "inputs": {"images": ["5", 0]}},
}
WORKFLOWS: dict[str, dict[str, Any]] = {"pass": PASS, "invert": INVERT, "slow": SLOW}


class Stream:
    """Begins with `open`, ends with `close`; in between faults may do anything to it."""

    def __init__(self, appliance: Appliance, recipe: Recipe, graph: str) -> None:
        self._appliance = appliance
        self._recipe = recipe
        self._graph = graph
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[Any]] = []
        self.live: LiveStream
        self.source: Source
        self.viewer: Viewer
        self.excused: list[Span] = []
        self.cut_off = False  # ended by a fault, not by its source
        self.polls = 0
        self.inexact: list[str] = []  # accounts that do not add up
        self.processed_at: list[tuple[float, int]] = []  # monotonic time, processed frames
        self.ledger: dict[str, Any] = {}
        self.judged = Judged()

    @property
    def name(self) -> str:
        """Of its input channel; the others have it as their beginning."""
        return self.live.subscribe_url.rpartition("/")[2]

    async def open(self) -> None:
        params = {"prompts": WORKFLOWS[self._graph], "max_framerate": 60}
        self.live = await self._appliance.orchestrator.start_stream(name=NAME, params=params)
        http = self._appliance.http
        self.viewer = Viewer(http, self.live.publish_url)
        publisher = await self._stack.enter_async_context(
            Publisher(http, self.live.subscribe_url, content_type="video/MP2T")
        )
        self.source = Source(publisher, self._recipe)
        self._begin(self.viewer.run(), "viewer")
        self._begin(self.source.run(), "source")
        self._begin(self._poll(), "poll")

    def _begin(self, part: Any, name: str) -> None:
        self._tasks.append(asyncio.create_task(part, name=f"chaos {name}"))

    def excuse(self, before_s: float, after_s: float) -> None:
        """What is lost around now is no fault of ours."""
        now = self.source.content_s
        # A fault on a connection meets the next request, and both sides connect one segment ahead.
        segment_s = max(self._recipe.segment_s, OUTPUT_SEGMENT_S)
        self.excused.append(Span(now - before_s - 2 * segment_s, now + after_s + 4 * segment_s))

    async def _poll(self) -> None:
        while True:
            status = await self._appliance.status()
            self._check(((status or {}).get("streams") or {}).get(self.live.id))
            await asyncio.sleep(_POLL_S)

    def _check(self, event: dict[str, Any] | None) -> None:
        if not event:
            return
        self.polls += 1
        frames = event["frames"]
        if ledger_gap(frames):
            self.inexact.append(json.dumps(frames))
        self.processed_at.append((time.monotonic(), frames["processed"]))
        self.ledger = frames

    async def gone(self, timeout_s: float = _END_S) -> bool:
        """Wait until the shim has let go of the stream by itself."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            status = await self._appliance.status()
            if status is not None and self.live.id not in (status.get("streams") or {}):
                return True
            await asyncio.sleep(_POLL_S)
        return False

    async def _caught_up(self) -> None:
        """Until everything that was sent has come in: what a channel holds when it is deleted is lost."""
        for _ in range(round(_CATCH_UP_S / _POLL_S)):
            if self.ledger.get("received", 0) >= len(self.source.account.frames):
                break
            await asyncio.sleep(_POLL_S)

    async def close(self, *, stops: int = 1) -> None:
        """End the input, wait for the worker's farewell, and read the output to its end."""
        viewing, sourcing, polling = self._tasks
        self.source.stop()
        try:
            async with asyncio.timeout(_END_S):
                await sourcing
        except TimeoutError:
            sourcing.cancel()
        if not self.cut_off:
            await self._caught_up()
            await self.live.end_input()
            await self.gone()
        polling.cancel()
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            await self.live.stop(calls=stops)
        farewells = [event for event in self.live.events if event.get("type") == "stream_stopped"]
        for event in (each for each in self.live.events if "frames" in each):
            if ledger_gap(event["frames"]):
                self.inexact.append(json.dumps(event["frames"]))
        if farewells:
            self.ledger = farewells[-1]["frames"]
            if self.ledger["in_flight"]:
                self.inexact.append(f"at the end: {json.dumps(self.ledger)}")
        await asyncio.wait({viewing}, timeout=_END_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for task in (viewing, sourcing):
            if not task.cancelled() and (failure := task.exception()) is not None:
                raise failure
        with contextlib.suppress(ConnectionError):
            await self._stack.aclose()
        self.judged = await asyncio.to_thread(
            judge,
            self.source.account,
            self.viewer.view,
            self.excused,
            ended=not self.cut_off,
            settled_s=SETTLED_S if self._graph == "slow" else 0.0,
        )
