"""The appliance as it runs: shim and engine in processes of their own, the network around them in this one.

CPU time is read from the kernel's clock of each process, so that broker, source and viewer, which live here, are not
in it. Both programs run under ``bench.timed``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from gateway_shim.localnet import numbered, probe
from gateway_shim.localnet.broker import Broker
from gateway_shim.localnet.programs import embedded_comfyui, free_port, plain_environment
from gateway_shim.localnet.source import Published, publish_file
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import OutgoingSegment, Publisher

from . import material
from .timed import Page, takes_beside

#: This package lies in the repository, not where headrace is installed.
ROOT = Path(__file__).resolve().parents[1]

READY_S = 120.0
#: Frames that may be under way between source and viewer when nobody paces them: enough that some wait for the
#: decoder, the engine and the encoder, and fewer than the shim holds.
AHEAD = 40
#: A picture may differ from the clip's by this many levels on average: what another pass of H.264 takes at these
#: rates.
MAX_MEAN_ERROR = 3.0

PASS_THROUGH = {
    "1": {"class_type": "LoadTensor", "inputs": {}},
    "2": {"class_type": "SaveTensor", "inputs": {"images": ["1", 0]}},
}


def crop(width: int, height: int) -> dict[str, Any]:
    """A graph that makes a view of the whole picture: both conversions and the plan, and no work on pixels."""
    inputs = {"image": ["1", 0], "x": 0, "y": 0, "width": width, "height": height}
    return {
        "1": {"class_type": "LoadTensor", "inputs": {}},
        "2": {"class_type": "ImageCrop", "inputs": inputs},
        "3": {"class_type": "SaveTensor", "inputs": {"images": ["2", 0]}},
    }


class WrongOutput(AssertionError):
    """What came out is not what went in: the figures of this run mean nothing."""


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process, to the nanosecond: its clock, see clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


def memory_bytes(pid: int) -> int:
    """Memory of a process, what it shares with the engine included: all slots, whether a picture was in them or not,
    for their pages are there from the beginning."""
    resident, untouched, is_ring = 0, 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # the line that begins a mapping
            is_ring = "/memfd:headrace-ring" in rest
        elif name == "Size:" and is_ring:
            untouched += int(rest.split()[0])
        elif name == "Rss:":
            resident += int(rest.split()[0])
            untouched -= int(rest.split()[0]) * is_ring
    return (resident + untouched) * 1024


@dataclass
class Reading:
    """What was used up to one moment. ``frames`` had arrived at the viewer."""

    at: float
    frames: int
    shim_s: float
    engine_s: float
    stages_ns: dict[str, int]
    calls: dict[str, int]


@dataclass
class Watched:
    """One stream, from its source to its viewer."""

    readings: list[Reading]
    published: Published
    arrivals: probe.Arrivals
    path: Path
    written: list[int] = field(default_factory=list)  # bytes that the source wrote for each frame
    sent_at: list[float] = field(default_factory=list)  # when
    taken: list[tuple[int, int]] = field(default_factory=list)  # segment and bytes of each piece that went out
    frames: dict[str, int] = field(default_factory=dict)  # the stream's ledger


class Throttle:
    """A publisher whose writes wait: for the viewer, so that ``ahead`` frames are under way, or each for its moment,
    in seconds after the first."""

    def __init__(self, publisher: Publisher, moments: Iterable[float] | None, ahead: int = AHEAD) -> None:
        self._ahead = ahead
        self.written: list[int] = []
        self.sent_at: list[float] = []
        self.arrived = 0
        self.changed = asyncio.Event()
        self._publisher = publisher
        self._moments = None if moments is None else iter(moments)
        self._segment: OutgoingSegment | None = None

    async def open_segment(self) -> Throttle:
        self._segment = await self._publisher.open_segment()
        return self

    async def write(self, data: bytes) -> None:
        if self._moments is None:
            while len(self.written) - self.arrived >= self._ahead:
                self.changed.clear()
                await self.changed.wait()
        else:
            due = next(self._moments) + (self.sent_at[0] if self.sent_at else time.monotonic())
            if due > time.monotonic():  # what comes in one burst is written in one
                await asyncio.sleep(due - time.monotonic())
        assert self._segment is not None
        self.sent_at.append(time.monotonic())
        self.written.append(len(data))
        await self._segment.write(data)

    async def close(self) -> None:
        assert self._segment is not None
        await self._segment.finish()


class Appliance:
    """Made by ``running``. One shim at a time; the engine stays for all of them."""

    def __init__(self, broker: Broker, http: aiohttp.ClientSession, folder: Path, comfyui: str) -> None:
        self.broker = broker
        self.http = http
        self.folder = folder
        self._environment = plain_environment(os.environ) | {
            "HEADRACE_ENGINE_ADDRESS": f"unix:{folder}/engine.sock",
            "HEADRACE_RUN_DIR": str(folder),
            "HEADRACE_TRICKLE_HOSTS": "*",
            "HEADRACE_LOG_LEVEL": "warning",
            "HEADRACE_ENGINE_LOG_LEVEL": "warning",
            # Threads of a codec would be work that no watch sees.
            "HEADRACE_ENCODER_PRESET": "superfast",
            "HEADRACE_CODEC": "cpu",
            "HEADRACE_CODEC_THREADS": "1",
            "CAPABILITY_CAPACITY": "16",
            "HEADRACE_ENGINE_MAX_SESSIONS": "16",
            "COMFYUI_DIR": comfyui,
            "PYTHONPATH": str(ROOT),
        }
        self._engine: asyncio.subprocess.Process | None = None
        self._shim: asyncio.subprocess.Process | None = None
        self._pages: list[Page] = []
        self._streams = 0
        self.url = ""

    @property
    def address(self) -> str:
        """Of the engine."""
        return self._environment["HEADRACE_ENGINE_ADDRESS"]

    @property
    def engine_pid(self) -> int:
        assert self._engine is not None
        return self._engine.pid

    @property
    def shim_pid(self) -> int:
        assert self._shim is not None
        return self._shim.pid

    async def _start(self, program: str, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        page = self.folder / f"{program}.page"
        page.unlink(missing_ok=True)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "bench.timed",
            str(page),
            program,
            *arguments,
            env=self._environment | environment,
        )

    async def start_engine(self) -> None:
        self._engine = await self._start("engine")

    @contextlib.asynccontextmanager
    async def shim(self, *, moments: Path | None = None, budget_ms: int = 1500) -> AsyncIterator[None]:
        """A shim that can take streams, for as long as the block lasts. budget_ms: the trip's own default is long,
        because frames that wait are the point and none may be dropped for it."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        options = [] if moments is None else ["--moments", str(moments)]
        self._shim = await self._start(
            "gateway_shim",
            *options,
            HEADRACE_LISTEN_PORT=str(port),
            HEADRACE_LATENCY_BUDGET_MS=str(budget_ms),
        )
        try:
            await self._ready()
            self._pages = [Page(self.folder / f"{program}.page") for program in ("gateway_shim", "engine")]
            yield
        finally:
            await _end(self._shim)
            self._shim = None

    async def _ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            for process in (self._shim, self._engine):
                if process is not None and process.returncode is not None:
                    raise RuntimeError(f"a program ended with exit code {process.returncode}; its log is above")
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with self.http.get(f"{self.url}/health") as answer:
                    if (await answer.json()).get("status") == "IDLE":
                        return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"shim and engine were not ready within {READY_S:g} s")

    def reading(self, frames: int) -> Reading:
        stages: dict[str, int] = {}
        calls: dict[str, int] = {}
        for page in self._pages:
            for name, (nanoseconds, count) in page.read().items():
                stages[name] = stages.get(name, 0) + nanoseconds
                calls[name] = calls.get(name, 0) + count
        return Reading(time.monotonic(), frames, cpu_s(self.shim_pid), cpu_s(self.engine_pid), stages, calls)

    async def play(
        self,
        clip: Path,
        workflow: Mapping[str, Any],
        frames: int,
        *,
        marks: range,
        interval_s: float | None = None,
        ahead: int = AHEAD,
        codec_only: int = 0,
        on_unit: Callable[[], None] = lambda: None,
    ) -> Watched:
        """One stream of ``frames`` frames. interval_s: between two of them; None: as fast as they get through.

        A reading is taken when as many frames have arrived as ``marks`` says. codec_only: frames up to which no stage
        but the codec is timed.
        """
        for page in self._pages:
            page.watch_all(not codec_only)
        self._streams += 1
        name = f"bench-{self._streams}"
        path = self.folder / f"{name}.ts"
        urls = {
            "subscribe_url": self.broker.create(name, "video/MP2T"),
            "publish_url": self.broker.create(f"{name}-out", "video/MP2T"),
        }
        await self._post("/stream/start", {"gateway_request_id": name, **urls, "params": {"prompts": workflow}})
        readings: list[Reading] = []
        all_there = asyncio.Event()
        async with Publisher(self.http, urls["subscribe_url"], content_type="video/MP2T") as publisher:
            moments = None if interval_s is None else itertools.count(0, interval_s)
            throttle = Throttle(publisher, moments, ahead)

            def count(unit: Any) -> None:
                throttle.arrived += 1
                throttle.changed.set()
                on_unit()
                if throttle.arrived in marks:
                    readings.append(self.reading(throttle.arrived))
                if throttle.arrived == codec_only:
                    for page in self._pages:
                        page.watch_all(True)
                if throttle.arrived == frames:
                    all_there.set()

            viewer = probe.Probe(self.http, urls["publish_url"], path, on_unit=count)
            watching = asyncio.create_task(viewer.run())
            publishing = asyncio.create_task(
                publish_file(
                    throttle,  # type: ignore[arg-type]  # what it needs of a publisher
                    clip,
                    duration_s=(frames - 0.5) / material.RATE,
                    realtime=False,
                )
            )
            waiting = asyncio.create_task(all_there.wait())
            try:
                await asyncio.wait({waiting, watching}, timeout=READY_S, return_when=asyncio.FIRST_COMPLETED)
                ledger = await self._ledger(name)
                if not waiting.done():
                    raise WrongOutput(f"{throttle.arrived} of {frames} frames arrived; the ledger says {ledger}")
                published = await publishing
                # Not when it was muxed: it waited here until its time had come.
                published.video.update(zip(published.video, throttle.sent_at, strict=True))
            finally:
                for task in (waiting, publishing):
                    task.cancel()
                await self._post("/stream/stop", {"gateway_request_id": name}, **{"X-Stream-Id": name})
                for channel in (name, f"{name}-out"):
                    await self.broker.delete(channel)
                await asyncio.wait({watching})
        taken = self._taken(urls["publish_url"])
        return Watched(readings, published, viewer.arrivals, path, throttle.written, throttle.sent_at, taken, ledger)

    def _taken(self, url: str) -> list[tuple[int, int]]:
        lines = takes_beside(self.folder / "gateway_shim.page").read_text().splitlines()
        found = [line.rsplit(" ", 2) for line in lines]
        return [(int(segment), int(size)) for at, segment, size in found if at == url]

    async def _ledger(self, name: str) -> dict[str, int]:
        async with self.http.get(f"{self.url}/stream/status") as answer:
            status = await answer.json()
        frames: dict[str, int] = status.get("streams", {}).get(name, {}).get("frames", {})
        return frames

    async def _post(self, path: str, body: Any, **headers: str) -> None:
        async with self.http.post(self.url + path, json=body, headers=headers) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{path} answered {answer.status}: {await answer.text()}")


async def _end(process: asyncio.subprocess.Process | None) -> None:
    if process is not None and process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 15)
        except TimeoutError:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Appliance]:
    """A broker and an engine that loads; ``shim`` waits for it."""
    comfyui = embedded_comfyui() or os.environ.get("COMFYUI_DIR", "")
    if not comfyui:
        raise RuntimeError("there is no ComfyUI: run `make comfyui` or set COMFYUI_DIR")
    with tempfile.TemporaryDirectory(prefix="hr") as folder:  # short: sockets lie below it
        async with Broker() as broker, open_http() as http:
            appliance = Appliance(broker, http, Path(folder), comfyui)
            await appliance.start_engine()
            try:
                yield appliance
            finally:
                await _end(appliance._engine)


def check(watched: Watched, frames: int, clip: Path, *, processed: bool = True) -> float:
    """Every frame arrived once and in order, with its number, processed, and looks like the clip's.

    processed: False where a machine may be too slow for the stream: then a frame may have passed by the engine, and
    the one before it be shown once more in its place, as often as the stream's account says.
    Returns the mean difference in levels. Raises WrongOutput.
    """
    pts = watched.arrivals.pts
    if pts != sorted(watched.published.video) or len(pts) != frames:
        raise WrongOutput(f"{len(pts)} pictures for {len(watched.published.video)} of {frames}, or in another order")
    if processed and watched.frames.get("processed") != frames:
        raise WrongOutput(f"of {frames} frames not all were processed: {json.dumps(watched.frames)}")
    shown = {number: numbered.luma_of(frame).copy() for number, (_, frame) in enumerate(probe.pictures(clip))}
    errors = []
    count, repeated, before = 0, 0 if processed else watched.frames.get("repeated", 0), None
    for at, (_, frame) in enumerate(probe.pictures(watched.path)):
        count += 1
        luma = numbered.luma_of(frame)
        number = numbered.read_number(luma)
        if number != at % material.FRAMES:
            if number is None or number != before or not repeated:
                raise WrongOutput(f"picture {at} carries number {number}")
            repeated -= 1
        before = number
        if at % 15 == 0:
            errors.append(float(np.abs(luma.astype(np.int16) - shown[number]).mean()))
    if count != frames:
        raise WrongOutput(f"{count} of {frames} pictures can be decoded")
    if max(errors) > MAX_MEAN_ERROR:
        raise WrongOutput(f"a picture differs by {max(errors):.1f} levels on average, {MAX_MEAN_ERROR} are allowed")
    return max(errors)
