"""What holds for every request: who may call, and what an error looks like on the wire."""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from ..errors import BodyTooSlow, CrossSite, HeadraceError, Unauthorized, Violation, error_body
from . import live_video
from .context import CONTEXT
from .own_names import is_own

logger = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every error is JSON in both peers' shapes; nothing is ever a redirect (an orchestrator's client would drop the
    body). What nobody foresaw is logged once, with an id that the caller gets too."""
    try:
        return await handler(request)
    except HeadraceError as exc:
        response = _answer(request, exc.http_status, exc.code, exc.message, exc.violations)
        if request.content.exception() is not None or isinstance(exc, BodyTooSlow):
            response.force_close()  # the rest of the body is in the way of another request; the caller has to know
        if isinstance(exc, Unauthorized):
            response.headers["WWW-Authenticate"] = "Bearer"
        return response
    except web.HTTPException as exc:
        if exc.status < 400:
            raise
        text, allowed = exc.reason, exc.headers.get("Allow", "")
        if exc.status == 404:
            text = f"there is nothing at {request.path[:200]!r}; the README, HTTP API, lists what there is"
        elif allowed:
            text = f"{request.path[:200]!r} takes {allowed}, not {request.method}"
        response = _answer(request, exc.status, exc.reason.lower().replace(" ", "_"), text)
        if allowed:
            response.headers["Allow"] = allowed
        return response
    except Exception:  # any handler may have a bug; the caller gets an id, the log the rest, the server lives on
        incident = uuid.uuid4().hex[:8]
        logger.exception("incident %s: %s %s failed", incident, request.method, request.path)
        return _answer(request, 500, HeadraceError.code, f"internal error, incident {incident}")


@web.middleware
async def same_site(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Browsers let any page post to any address. None but our own may: its Origin is the Host that was called, and
    that Host is ours. No page knows a token, whatever it is called; without one a shim that listens to this machine
    alone takes no other name at all, for what a page reads where it came from has no Origin."""
    context = request.app[CONTEXT]
    origin = request.headers.get("Origin")
    if origin is not None and _place_of(origin) != request.host.lower():
        raise CrossSite(f"calls from pages of {origin[:200]!r} are refused")
    strict = not context.settings.auth_token and (origin is not None or context.settings.is_local)
    if strict and not is_own(request.host, context.own_names):
        remedy = "if it is, say so with capability_url, or set auth_token"
        raise CrossSite(f"this worker is not called {request.host[:200]!r}; {remedy}")
    return await handler(request)


def _place_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # half a bracket
        return None


@web.middleware
async def bearer(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """With a token configured every path needs it, ``/health`` included: orchestrators send it on every call
    (protocol.md 3.1, 4.1), and an open health check would hide a wrong token until the first stream fails."""
    context = request.app[CONTEXT]
    token = context.settings.auth_token
    if token:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode("utf-8", "surrogateescape"), token.encode()
        ):
            context.on_unauthorized()
            raise Unauthorized("the bearer token is missing or wrong")
    return await handler(request)


def _answer(
    request: web.Request, status: int, code: str, message: str, violations: tuple[Violation, ...] = ()
) -> web.Response:
    if request.path in live_video.START_PATHS:
        return live_video.refusal(status, code, message, violations)
    return web.json_response(error_body(status, code, message, violations), status=status)
