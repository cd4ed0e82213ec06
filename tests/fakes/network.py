"""A whole network: a real broker and the whole shim in this process, and an engine in its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from engine.backend import Backend
from gateway_shim.localnet import probe
from gateway_shim.localnet.broker import Broker
from gateway_shim.localnet.source import Published, publish_file
from gateway_shim.settings import Settings
from gateway_shim.shim import Shim, running
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import Publisher
from gateway_shim.trickle.subscriber import Subscriber
from tests.fakes.engine_client import running_engine, settings_for

ROOT = Path(__file__).resolve().parents[2]

CHANNELS = {"subscribe_url": "", "publish_url": "-out", "control_url": "-control", "events_url": "-events"}


@dataclass(frozen=True)
class Received:
    """What a viewer got. ``numbers`` in order of display, ``pts`` of each."""

    numbers: list[int]
    pts: list[int]
    unreadable: int
    arrivals: probe.Arrivals
    path: Path


class LiveStream:
    """One stream from the network's side: the gateway that publishes, watches and listens."""

    def __init__(self, network: Network, stream_id: str, urls: dict[str, str], directory: Path) -> None:
        self.network = network
        self.id = stream_id
        self.urls = urls
        self.events: list[dict[str, Any]] = []
        self._heard = asyncio.Condition()
        self._directory = directory
        self._publisher: Publisher | None = None
        self._probe: asyncio.Task[probe.Arrivals] | None = None
        self._listener: asyncio.Task[None] | None = None

    def listen(self) -> None:
        path = self._directory / f"{self.id}-out.ts"
        if "publish_url" in self.urls:
            viewer = probe.Probe(self.network.http, self.urls["publish_url"], path)
            self._probe = asyncio.create_task(viewer.run())
        if "events_url" in self.urls:
            self._listener = asyncio.create_task(self._hear())

    async def _hear(self) -> None:
        async with Subscriber(self.network.http, self.urls["events_url"]) as subscriber:
            async for segment in subscriber:
                body = json.loads(await segment.read(1 << 20))
                assert set(body) == {"event", "queue_event_type"}
                async with self._heard:
                    self.events.append(body["event"])
                    self._heard.notify_all()

    async def event(self, kind: str, **facts: Any) -> dict[str, Any]:
        """The first event of a type, now or later, with these facts."""

        def find() -> dict[str, Any] | None:
            for event in self.events:
                if event["type"] == kind and all(event.get(key) == value for key, value in facts.items()):
                    return event
            return None

        async with self._heard:
            await self._heard.wait_for(lambda: find() is not None)
        found = find()
        assert found is not None
        return found

    async def publisher(self) -> Publisher:
        if self._publisher is None:
            publisher = Publisher(self.network.http, self.urls["subscribe_url"], content_type="video/MP2T")
            self._publisher = await publisher.__aenter__()
        return self._publisher

    async def publish(self, path: Path, **options: Any) -> Published:
        options = {"loops": 1, "realtime": False} | options
        return await publish_file(await self.publisher(), path, **options)

    async def publish_bytes(self, data: bytes) -> None:
        await (await self.publisher()).publish(data)

    async def control(self, message: Any) -> None:
        url = self.urls["control_url"]
        async with Publisher(self.network.http, url, content_type="application/json", resume=True) as channel:
            await channel.publish(message if isinstance(message, bytes) else json.dumps(message).encode())

    async def flow(self, frames: int = 25) -> None:
        """Wait until this many more frames have gone out."""
        session = self.network.shim.streams.active[self.id]
        until = session.status()["frames"]["published"] + frames
        while session.status()["frames"]["published"] < until:  # noqa: ASYNC110  # a counter makes no event
            await asyncio.sleep(0.02)

    async def end_input(self) -> None:
        """The client went away: its gateway deletes the input channel."""
        if self._publisher is not None:
            await self._publisher.__aexit__(None, None, None)
            self._publisher = None
        await self.network.broker.delete(self.id)

    async def received(self) -> Received:
        """After the end of the stream: what arrived. The orchestrator closes the other channels then."""
        await self.network.shim.streams.wait_idle()
        for suffix in ("-out", "-control"):
            await self.network.broker.delete(self.id + suffix)
        assert self._probe is not None
        arrivals = await self._probe
        path = self._directory / f"{self.id}-out.ts"
        numbers = probe.numbers(path) if path.stat().st_size else probe.Numbers({}, 0)
        pts = sorted(numbers.by_pts)
        return Received([numbers.by_pts[at] for at in pts], pts, numbers.unreadable, arrivals, path)

    async def close(self) -> None:
        if self._publisher is not None:
            await self._publisher.__aexit__(None, None, None)
        for name in ("", "-out", "-control", "-events"):
            await self.network.broker.delete(self.id + name)
        for task in (self._probe, self._listener):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


class Network:
    def __init__(
        self,
        broker: Broker,
        shim: Shim,
        http: aiohttp.ClientSession,
        directory: Path,
        backend: Backend | None,
        comfyui: Path | None,
        stub: Sequence[str] | None = None,
    ) -> None:
        self.broker = broker
        self._stub = stub
        self._comfyui = comfyui
        self._backend = backend
        self._engine = contextlib.AsyncExitStack()
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self.shim = shim
        self.http = http
        self.directory = self._directory = directory
        self._streams: list[LiveStream] = []

    async def start(
        self, stream_id: str = "cam", *, params: Any = None, without: Sequence[str] = (), **extra: Any
    ) -> LiveStream:
        """Start a stream as an orchestrator does (BYOC), with every channel but ``without``."""
        urls = {
            name: self.broker.create(stream_id + suffix, "video/MP2T")
            for name, suffix in CHANNELS.items()
            if name not in without
        }
        body = {"gateway_request_id": stream_id, **urls, "params": params, **extra}
        status, answer = await self.post("/stream/start", body)
        assert status == 200, answer
        stream = LiveStream(self, stream_id, urls, self._directory)
        stream.listen()
        self._streams.append(stream)
        return stream

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        async with self.http.post(self.shim.url + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> dict[str, Any]:
        async with self.http.get(self.shim.url + path) as response:
            answer: dict[str, Any] = await response.json()
            return answer

    async def start_engine(self, number: int = 0) -> None:
        address = self.shim.engines[number].address
        if self._backend is not None:
            settings = settings_for(self._directory, address=address)
            await self._engine.enter_async_context(running_engine(settings, self._backend))
        else:
            await self._start_process(number)
            self._engine.push_async_callback(self._end, number)
        await self.shim.engines[number].ready()

    async def _start_process(self, number: int) -> None:
        address = self.shim.engines[number].address
        if self._stub is not None:
            program = ["tests.fakes.engine_process", address, *self._stub]
        else:
            comfyui = str(self._comfyui or "none")
            program = ["engine", "--address", address, "--comfyui-dir", comfyui, "--log-level", "warning"]
        # The stand-in lies in this repository, not where headrace is installed.
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._processes[number] = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", *program, env=environment
        )

    async def keep_engine(self, number: int = 0) -> None:
        """What supervisord does, until cancelled: start it again whenever it ends."""
        while True:
            await self._processes[number].wait()
            await self._start_process(number)

    def engine_pid(self, number: int = 0) -> int:
        return self._processes[number].pid

    async def stop_engine(self) -> None:
        await self._engine.aclose()

    async def kill_engine(self, number: int = 0) -> None:
        """As the kernel does when memory runs out."""
        process = self._processes[number]
        process.kill()
        await process.wait()

    async def _end(self, number: int) -> None:
        process = self._processes[number]
        if process.returncode is None:
            process.terminate()
        await process.wait()

    async def close(self) -> None:
        for stream in self._streams:
            await stream.close()
        await self.stop_engine()


@contextlib.asynccontextmanager
async def network(
    directory: Path,
    *,
    engine: bool = True,
    engines: int = 1,
    backend: Backend | None = None,
    comfyui: Path | None = None,
    stub: Sequence[str] | None = None,
    **settings: Any,
) -> AsyncIterator[Network]:
    """``engine`` False: nobody listens at the addresses of the ``engines``. ``backend``: a stand-in for ComfyUI.
    ``comfyui``: the real one, in an engine process. ``stub``: arguments of ``engine_process``, a stand-in in one."""
    async with contextlib.AsyncExitStack() as stack:
        broker = await stack.enter_async_context(Broker())
        addresses = [f"{settings_for(directory).address}{number or ''}" for number in range(engines)]
        lane = os.environ.get("HEADRACE_TEST_LANE", "auto")
        settings = {"listen_port": 0, "drain_s": 0.0, "run_dir": directory, "lane": lane} | settings
        shim = await stack.enter_async_context(running(Settings(engine_address=",".join(addresses), **settings)))
        http = await stack.enter_async_context(open_http())
        net = Network(broker, shim, http, directory, backend, comfyui, stub)
        stack.push_async_callback(net.close)
        for number in range(engines if engine else 0):
            await net.start_engine(number)
        yield net
