"""The HTTP surface on a real socket, over the stand-ins of ``streams``, with the client of an orchestrator."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway_shim.app import create_app
from gateway_shim.settings import Settings
from tests.fakes.streams import FakeEngine, FakeStreams

BYOC_START = {
    "gateway_request_id": "cam1-9f3a1c07",
    "control_url": "https://orch:8935/ai/trickle/cam1-9f3a1c07-control",
    "events_url": "https://orch:8935/ai/trickle/cam1-9f3a1c07-events",
    "subscribe_url": "https://orch:8935/ai/trickle/cam1-9f3a1c07",
    "publish_url": "https://orch:8935/ai/trickle/cam1-9f3a1c07-out",
    "data_url": "https://orch:8935/ai/trickle/cam1-9f3a1c07-data",
    "params": {"width": 512, "height": 512, "max_framerate": 30},
}

LIVE_START = {
    "subscribe_url": "https://orch:8935/ai/trickle/8e21f0aa",
    "publish_url": "https://orch:8935/ai/trickle/8e21f0aa-out",
    "control_url": "https://orch:8935/ai/trickle/8e21f0aa-control",
    "events_url": "https://orch:8935/ai/trickle/8e21f0aa-events",
    "model_id": "comfystream",
    "params": {},
    "gateway_request_id": "51c0de77",
    "manifest_id": "8e21f0aa",
    "stream_id": "str_x",
}


@dataclass
class Answer:
    status: int
    headers: Any
    json: Any


@dataclass
class Worker:
    app: web.Application
    streams: FakeStreams
    engine: FakeEngine
    http: aiohttp.ClientSession
    url: str

    async def call(self, method: str, path: str, **options: Any) -> Answer:
        """One request; never follows a redirect, and insists on JSON in the answer."""
        async with self.http.request(method, self.url + path, allow_redirects=False, **options) as response:
            assert response.content_type == "application/json", await response.text()
            return Answer(response.status, response.headers, await response.json())

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return await self.call("POST", path, json=body, **options)

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.call("GET", path, **options)


@contextlib.asynccontextmanager
async def worker(*, capacity: int = 1, **settings: Any) -> AsyncIterator[Worker]:
    streams, engine = FakeStreams(capacity), FakeEngine()
    app = create_app(Settings(capacity=capacity, **settings), streams, [engine])
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        yield Worker(app, streams, engine, http, str(server.make_url("")).rstrip("/"))
