"""An orchestrator and its gateway on this machine: takes registrations, owns the trickle server, drives workers.

Behaves as go-livepeer (protocol.md 3, 4), its traps included: registrations live in memory, the last one of a name
wins, a 401 from the worker drops it, and where the original would crash this raises ``OrchestratorPanic``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import aiohttp
from aiohttp import web

from ..trickle.connection import open_http
from .broker import Broker
from .channel import Signal
from .live_stream import CONTROL_KEEPALIVE_S, LiveStream, Mode, WorkerAnswer

logger = logging.getLogger(__name__)

START_TIMEOUT_S = {"byoc": 120.0, "live": 5.0}  # a job's own timeout_seconds; fixed in server/ai_process.go
_CALL_TIMEOUT_S = 30.0
_HEALTH_EVERY_S, _HEALTH_TIMEOUT_S, _HEALTH_LIMIT_S = 0.5, 5.0, 120.0  # ai/worker/container.go
_LIVE_STATUSES = (200, 400, 401, 422, 500)  # others leave the response nil (ai/worker/runner.gen.go)
_CURRENCIES = ("", "wei", "eth")  # others need a price feed, which is not set up here


class OrchestratorPanic(Exception):
    """The worker did what makes the original crash or drop its caller's connection."""


class WorkerRefused(Exception):
    """The worker did not take the stream; everything of it is gone."""

    def __init__(self, answer: WorkerAnswer) -> None:
        super().__init__(f"the worker answered {answer.status}: {answer.body}")
        self.answer = answer


@dataclass
class Worker:
    """One capability or one entry of aiModels.json."""

    name: str  # of the capability, or the model_id
    url: str  # without trailing slash
    capacity: int
    token: str
    body: Mapping[str, Any]  # as registered, or the entry
    load: int = 0  # streams we think it has; a new registration begins at 0

    @property
    def free(self) -> int:
        return max(0, self.capacity - self.load)


class Orchestrator:
    """``async with Orchestrator() as orchestrator`` serves on 127.0.0.1; leaving ends its streams and channels."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        secret: str = "",
        tls: ssl.SSLContext | None = None,
        keepalive_s: float = CONTROL_KEEPALIVE_S,
        broker: Broker | None = None,
    ) -> None:
        """secret: what workers must register with; empty accepts an empty header only."""
        self.secret = secret
        self.broker = broker or Broker()
        self.registrations = 0  # accepted so far
        self.refused_registrations = 0
        self.url = ""
        self._address = (host, port)
        self._tls = tls
        self._keepalive_s = keepalive_s
        self._capabilities: dict[str, Worker] = {}
        self._models: dict[str, Worker] = {}
        self._streams: set[LiveStream] = set()
        self._changed = Signal()
        self._stack = contextlib.AsyncExitStack()
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/capability/register", self._on_register)
        app.router.add_route("*", "/capability/unregister", self._on_unregister)
        self.broker.add_to(app)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, *self._address, ssl_context=self._tls).start()
        host, port = runner.addresses[0][:2]
        self.url = self.broker.origin = f"{'https' if self._tls else 'http'}://{host}:{port}"
        self._http = await self._stack.enter_async_context(open_http())
        self._stack.push_async_callback(self._close_streams)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    # ---- who can work

    @property
    def capabilities(self) -> Mapping[str, Worker]:
        return MappingProxyType(self._capabilities)

    @property
    def models(self) -> Mapping[str, Worker]:
        return MappingProxyType(self._models)

    async def registered(self, name: str, *, after: Worker | None = None, timeout_s: float = 30.0) -> Worker:
        """Wait until a worker has registered ``name``; with ``after`` until it has done so again."""
        async with asyncio.timeout(timeout_s):
            while (worker := self._capabilities.get(name)) is None or worker is after:
                await self._changed.wait()
        return worker

    async def unregistered(self, name: str, timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while name in self._capabilities:
                await self._changed.wait()

    async def registration_refused(self, times: int = 1, timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while self.refused_registrations < times:
                await self._changed.wait()

    async def restart(self) -> None:
        """Crash and come back at the same address: registrations, channels and connections are lost."""
        self._capabilities.clear()
        self._changed.fire()
        await self.broker.restart()
        await self._close_streams()

    async def add_model(self, entry: Mapping[str, Any], *, limit_s: float = _HEALTH_LIMIT_S) -> dict[str, Any]:
        """What the original does at its start for an entry of aiModels.json with a ``url``: ask until it is healthy.

        Gives the answers of /health, /hardware/info and /version. Raises OrchestratorPanic where the process would
        exit: ERROR, no health in ``limit_s``, or an answer that is not declared as JSON.
        """
        worker = Worker(
            str(entry["model_id"]),
            str(entry["url"]).rstrip("/"),
            entry.get("capacity", 1),
            entry.get("token", ""),
            entry,
        )
        answers: dict[str, Any] = {"health": await self._healthy(worker, limit_s)}
        for name, path in (("hardware", "/hardware/info"), ("version", "/version")):
            answers[name] = (await self._get(worker, path)).body
        self._models[worker.name] = worker
        return answers

    async def _healthy(self, worker: Worker, limit_s: float) -> Any:
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    answer: WorkerAnswer | None = None
                    with contextlib.suppress(aiohttp.ClientError, OSError):
                        answer = await self._get(worker, "/health")
                    if answer is not None and answer.status == 200 and isinstance(answer.body, dict):
                        if answer.body.get("status") == "ERROR":
                            raise OrchestratorPanic("the worker's health is ERROR")
                        return answer.body
                    await asyncio.sleep(_HEALTH_EVERY_S)
        except TimeoutError:
            raise OrchestratorPanic(f"the worker was not healthy within {limit_s:g} s") from None

    async def _get(self, worker: Worker, path: str) -> WorkerAnswer:
        timeout = aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT_S)
        async with self._http.get(
            worker.url + path, headers=_bearer(worker), timeout=timeout, allow_redirects=False
        ) as response:
            if response.status == 200 and response.content_type != "application/json":
                raise OrchestratorPanic(f"{path} answered 200 with {response.content_type}")
            return await _answer(response)

    async def _on_register(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        try:
            body = json.loads(await request.read())
            worker = Worker(
                body["name"], body["url"], int(body.get("capacity", 0)), body.get("token", ""), MappingProxyType(body)
            )
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            self._refused()
            return web.Response(status=400, text=f"Error registering capability: {exc}")
        if body.get("currency", "") not in _CURRENCIES:
            self._refused()
            if request.transport is not None:
                request.transport.abort()  # the handler panics: the connection closes without an answer
            return web.Response()
        self.registrations += 1
        self._capabilities[worker.name] = worker
        self._changed.fire()
        return web.Response(text="ok")

    async def _on_unregister(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        self._forget(await request.text())
        return web.Response(text="ok")

    def _refusal(self, request: web.Request) -> web.Response | None:
        if request.method != "POST":
            return web.Response(status=405, text="Method Not Allowed")
        if request.headers.get("Authorization", "") != self.secret:
            self._refused()
            return web.Response(status=400, text="invalid authorization")
        return None

    def _refused(self) -> None:
        self.refused_registrations += 1
        self._changed.fire()

    def _forget(self, name: str) -> None:
        self._capabilities.pop(name, None)
        self._changed.fire()

    # ---- streams

    @property
    def streams(self) -> frozenset[LiveStream]:
        return frozenset(self._streams)

    async def start_stream(
        self,
        mode: Mode = "byoc",
        *,
        name: str | None = None,
        params: Any = None,
        stream_id: str | None = None,
        ingress: bool = True,
        egress: bool = True,
        data: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> LiveStream:
        """Create the channels and call the worker's start. Raises WorkerRefused, and then nothing is left.

        name: capability or model; by default the only one. ingress, egress, data: what the client enabled (byoc).
        more: keys that a gateway adds to the body, over ours.
        """
        known = self._capabilities if mode == "byoc" else self._models
        worker = known[name] if name is not None else _only(known)
        manifest_id = stream_id or f"cam-{secrets.token_hex(4)}"
        if mode == "live":
            ingress, egress, data = True, True, False
        channels = self._create_channels(manifest_id, ingress=ingress, egress=egress, data=data)
        body: dict[str, Any] = {**channels, "params": params}
        if mode == "byoc":
            request_id = manifest_id
        else:
            request_id = secrets.token_hex(4)
            body |= {"model_id": worker.name, "manifest_id": manifest_id, "stream_id": f"str_{manifest_id}"}
        body["gateway_request_id"] = request_id

        async def post(path: str, payload: Any) -> WorkerAnswer:
            return await self._post(worker, path, request_id, payload, _CALL_TIMEOUT_S)

        stream = LiveStream(self.broker, self._http, request_id, mode, channels, post, self._keepalive_s)
        self._streams.add(stream)
        worker.load += 1
        await stream.open()
        try:
            await self._start(worker, mode, request_id, body | dict(more or {}))
        except BaseException:
            worker.load -= 1
            await stream.close()
            await self._delete(channels)
            self._streams.discard(stream)
            raise
        stream.on_end(lambda: self._ended(worker, stream))
        return stream

    async def _start(self, worker: Worker, mode: Mode, stream_id: str, body: dict[str, Any]) -> None:
        path = "/stream/start" if mode == "byoc" else "/live-video-to-video"
        answer = await self._post(worker, path, stream_id, body, START_TIMEOUT_S[mode])
        if mode == "live" and (answer.status not in _LIVE_STATUSES or not isinstance(answer.body, dict)):
            raise OrchestratorPanic(f"{path} answered {answer.status}: {answer.body}")
        if answer.status > 399:
            raise WorkerRefused(answer)

    def _create_channels(self, mid: str, *, ingress: bool, egress: bool, data: bool) -> dict[str, str]:
        """URL by the name in the start call; names and MIME types as byoc/stream_orchestrator.go."""
        wanted = [("control_url", "-control", "application/json"), ("events_url", "-events", "application/json")]
        if ingress:
            wanted.append(("subscribe_url", "", "video/MP2T"))
        if egress:
            wanted.append(("publish_url", "-out", "video/MP2T"))
        if data:
            wanted.append(("data_url", "-data", "application/jsonl"))
        return {key: self.broker.create(mid + suffix, mime) for key, suffix, mime in wanted}

    async def _delete(self, channels: Mapping[str, str]) -> None:
        for url in channels.values():
            await self.broker.delete(url.rpartition("/")[2])

    async def _post(self, worker: Worker, path: str, stream_id: str, payload: Any, timeout_s: float) -> WorkerAnswer:
        """One call to the worker. JSON for everything but bytes, which go without a content type, as a stop does."""
        headers = {"X-Stream-Id": stream_id} | _bearer(worker)
        options: dict[str, Any] = {"json": payload}
        if isinstance(payload, bytes):
            options = {"data": payload, "skip_auto_headers": ("Content-Type",)}
        async with self._http.post(
            worker.url + path,
            headers=headers,
            ssl=False,
            allow_redirects=False,  # the original follows, and loses the body
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            **options,
        ) as response:
            answer = await _answer(response)
        if answer.status == 401 and self._capabilities.get(worker.name) is worker:
            logger.warning("worker %s answers 401: its capability is removed", worker.name)
            self._forget(worker.name)
        return answer

    def _ended(self, worker: Worker, stream: LiveStream) -> None:
        # The registration of today, not of the start: after a new one its count of streams goes below zero.
        current = self._capabilities.get(worker.name, worker)
        current.load -= 1
        self._streams.discard(stream)

    async def _close_streams(self) -> None:
        for stream in list(self._streams):
            await stream.close()
        self._streams.clear()


def _only(known: Mapping[str, Worker]) -> Worker:
    if len(known) != 1:
        raise LookupError(f"say which worker: {', '.join(known) or 'none is known'}")
    return next(iter(known.values()))


def _bearer(worker: Worker) -> dict[str, str]:
    return {"Authorization": f"Bearer {worker.token}"} if worker.token else {}


async def _answer(response: aiohttp.ClientResponse) -> WorkerAnswer:
    text = await response.text(errors="replace")
    if response.content_type == "application/json":
        with contextlib.suppress(ValueError):
            return WorkerAnswer(response.status, json.loads(text))
    return WorkerAnswer(response.status, text)
