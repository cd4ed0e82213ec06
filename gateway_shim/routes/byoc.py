"""What an orchestrator calls for a registered capability (protocol.md 3.3): start, stop, status.

Each is served at ``/stream/...`` and ``/api/stream/...``: documents and clients disagree (protocol.md 8, row 1).
"""

from __future__ import annotations

import asyncio
import threading

from aiohttp import web

from ..errors import NoSuchStream
from ..params import parse_start
from ..status import state_body, status_body
from .context import CONTEXT, read_body, stream_header

#: How much of a stop call's body is kept: it is a reason for people, at most a line of error text.
_REASON_BYTES = 1024
#: A body that was announced and does not come must not keep a stream alive.
_REASON_WAIT_S = 1.0


async def start(request: web.Request) -> web.Response:
    """200 once the stream runs, which waits for no model. The same call again is answered 200 again."""
    context = request.app[CONTEXT]
    start_request = parse_start(await read_body(request), require_id=True, default_id=stream_header(request) or "")
    session = await context.start(start_request)
    stream_id = session.request.stream_id
    return web.json_response(
        {
            "status": "success",
            "message": "Stream started successfully",
            "request_id": stream_id,
            "stream_id": stream_id,
            "current_state": state_body(context.facts()),
        }
    )


async def stop(request: web.Request) -> web.Response:
    """Always 200: gateways stop a stream up to three times, late, with any body, and also streams that never were."""
    context = request.app[CONTEXT]
    try:
        async with asyncio.timeout(_REASON_WAIT_S):
            text = (await request.content.read(_REASON_BYTES)).decode("utf-8", "replace").strip()
        reason = "".join(character if character.isprintable() else " " for character in text)
    except Exception as exc:  # a body that cannot be read (reset, bad encoding) must not keep a stream alive
        reason = f"unreadable reason: {exc}"
    name = stream_header(request) or request.query.get("stream_id") or None
    try:
        stopped = await context.streams.stop(context.resolve(name), reason or "stop call")
    except NoSuchStream:
        stopped = False
    message = "Stream stopped successfully" if stopped else "No such stream is running"
    return web.json_response({"status": "success", "message": message, "stopped": stopped})


async def status(request: web.Request) -> web.Response:
    """The worker's state and every stream's status event; with X-Stream-Id or ``?stream_id=`` only that one's."""
    context = request.app[CONTEXT]
    name = stream_header(request) or request.query.get("stream_id") or None
    active = context.streams.active
    if name is not None:
        stream_id = context.resolve(name) or name
        active = {stream_id: active[stream_id]}
    events = {stream_id: session.status() for stream_id, session in active.items()}
    # The loop's own pool grows to its bound by and by and stays: no sign of anything left over.
    threads = sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())
    return web.json_response(status_body(context.facts(), events, tasks=len(asyncio.all_tasks()), threads=threads))


def add_routes(router: web.UrlDispatcher) -> None:
    for prefix in ("", "/api"):
        router.add_post(f"{prefix}/stream/start", start)
        router.add_post(f"{prefix}/stream/stop", stop)
        router.add_get(f"{prefix}/stream/status", status)
