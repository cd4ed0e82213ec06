"""Who and how we are: polled by orchestrators at their start (protocol.md 4.2, 4.3) and by anybody else.

Every answer is JSON: an orchestrator that gets 200 without that content type crashes.
"""

from __future__ import annotations

import logging

from aiohttp import web

from proto import VERSION

from ..status import hardware_body, health
from .context import CONTEXT

logger = logging.getLogger(__name__)


async def get_health(request: web.Request) -> web.Response:
    try:
        word = health(request.app[CONTEXT].facts())
    except Exception:  # the peer knows this one body, and polls again
        logger.exception("health could not be computed")
        return web.json_response({"detail": {"msg": "Failed to retrieve pipeline status."}}, status=500)
    return web.json_response({"status": word.value})


async def get_version(request: web.Request) -> web.Response:
    settings = request.app[CONTEXT].settings
    return web.json_response({"pipeline": settings.pipeline, "model_id": settings.model_id, "version": VERSION})


async def get_app_version(_request: web.Request) -> web.Response:
    return web.json_response({"version": VERSION})


async def get_hardware_info(request: web.Request) -> web.Response:
    return _hardware(request, usage=False)


async def get_hardware_stats(request: web.Request) -> web.Response:
    return _hardware(request, usage=True)


def _hardware(request: web.Request, *, usage: bool) -> web.Response:
    context = request.app[CONTEXT]
    devices = [engine.info.device for engine in context.engines if engine.info is not None]
    return web.json_response(
        hardware_body(context.settings.pipeline, context.settings.model_id, devices, usage=usage)
    )


def add_routes(router: web.UrlDispatcher) -> None:
    for path, handler in (
        ("/health", get_health),
        ("/version", get_version),
        ("/app-version", get_app_version),
        ("/hardware/info", get_hardware_info),
        ("/hardware/stats", get_hardware_stats),
    ):
        router.add_get(path, handler)
        router.add_get(path + "/", handler)
