"""The HTTP application."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from .connections import Connections
from .routes import byoc, live_video, middleware, params, system
from .routes.context import CONTEXT, Context, Engine, Streams
from .settings import Settings

CONNECTIONS: web.AppKey[Connections] = web.AppKey("connections", Connections)


def create_app(settings: Settings, streams: Streams, engines: Sequence[Engine]) -> web.Application:
    """The HTTP surface over parts that somebody else owns; ``app[CONTEXT]`` is what the handlers share.

    No page of another origin may call: there is no CORS header, and what a browser sends without asking is refused.
    """
    connections = Connections()
    app = web.Application(
        client_max_size=settings.body_limit_bytes,
        middlewares=[connections.middleware, middleware.errors, middleware.same_site, middleware.bearer],
    )
    app[CONNECTIONS] = connections
    app[CONTEXT] = Context(settings, streams, engines)
    for routes in (byoc, live_video, params, system):
        routes.add_routes(app.router)
    return app
