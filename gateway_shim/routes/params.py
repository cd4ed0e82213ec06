"""Changing a running stream: one handler behind every name that callers use (protocol.md 8, row 2)."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ..errors import InvalidRequest, MalformedRequest, Violation
from ..keys import ENVELOPE
from .context import CONTEXT, read_body, stream_header

_TRUE = ("1", "true", "yes", "on", "")
_FALSE = ("0", "false", "no", "off")


async def update(request: web.Request) -> web.Response:
    """Apply an update whole or not at all; the running workflow goes on when it is refused.

    The stream is named by the path, X-Stream-Id, ``?stream_id=`` or the body, else it is the only one. ``?dry_run=1``
    checks and changes nothing; ``If-Match: "3"`` applies only on top of version 3, else 412.
    """
    context = request.app[CONTEXT]
    dry_run = _dry_run(request)
    expected_version = _expected_version(request)
    body = await read_body(request)
    result = await context.streams.update(
        context.resolve(_stream_name(request, body)), body, dry_run=dry_run, expected_version=expected_version
    )
    message = "The update is valid; nothing was changed" if dry_run else "Parameters updated successfully"
    return web.json_response(
        {
            "status": "success",
            "message": message,
            "version": result.version,
            "effective_pts": result.effective_pts,
        },
        headers={"ETag": f'"{result.version}"'},
    )


async def schema(request: web.Request) -> web.Response:
    """Every knob of the running graph with its type, range and value; 503 while the engine is away.

    The ETag is the version that ``If-Match`` of an update takes.
    """
    context = request.app[CONTEXT]
    answer = await context.streams.schema(context.resolve(_stream_name(request, None)))
    return web.json_response(answer, headers={"ETag": f'"{answer["version"]}"'})


def _stream_name(request: web.Request, body: Any) -> str | None:
    name = request.match_info.get("stream") or stream_header(request) or request.query.get("stream_id")
    if not name and isinstance(body, dict):
        name = next((body[key] for key in ENVELOPE[:3] if isinstance(body.get(key), str)), None)
    return name or None


def _dry_run(request: web.Request) -> bool:
    text = request.query.get("dry_run", "0").strip().lower()
    if text not in (*_TRUE, *_FALSE):
        raise InvalidRequest("dry_run is not valid", (Violation("dry_run", f"is {text!r}", "1 or 0"),))
    return text in _TRUE


def _expected_version(request: web.Request) -> int:
    """The version that the caller built on; 0 for any."""
    text = request.headers.get("If-Match", "*").strip()
    if text == "*":
        return 0
    digits = text.removeprefix("W/").strip('"')
    if not (digits.isascii() and digits.isdigit()) or int(digits) == 0 or len(digits) > 18:
        raise MalformedRequest('If-Match must be one version such as "3", or *')
    return int(digits)


def add_routes(router: web.UrlDispatcher) -> None:
    for prefix in ("", "/api"):
        router.add_post(f"{prefix}/stream/params", update)
        router.add_post(f"{prefix}/stream/update", update)
        router.add_get(f"{prefix}/stream/params/schema", schema)
    router.add_post("/live/video-to-video/update", update)
    router.add_post("/live/video-to-video/{stream}/update", update)
    router.add_get("/live/video-to-video/{stream}/schema", schema)
