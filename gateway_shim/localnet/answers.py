"""Answers of a Go server that aiohttp has no words for: in the midst of a body, and none at all."""

from __future__ import annotations

import asyncio
import socket
import struct

from aiohttp import web
from aiohttp.http import HttpProcessingError

LINGER_S = 0.5  # net/http, rstAvoidanceDelay
# What reading a request body raises when the client is gone or does not speak HTTP.
BODY_FAILURES = (OSError, web.RequestPayloadError, HttpProcessingError)


async def answer_early(request: web.Request, response: web.Response) -> web.Response:
    """Answer a request whose body may not have ended, and end its connection.

    The rest of the body is read for a moment, since closing on unread bytes resets the connection, and the reset may
    overtake the answer. aiohttp would do the same for 10 s, whether or not the client is still there.
    """
    response.force_close()
    try:
        await response.prepare(request)
        await response.write_eof()
        async with asyncio.timeout(LINGER_S):
            while not request.content.at_eof():
                await request.content.readany()
    except (TimeoutError, *BODY_FAILURES):
        pass
    if not request.content.at_eof():
        request.protocol.force_close()
    return response


def gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def reset(request: web.Request) -> None:
    """Drop the connection with a RST, unanswered."""
    transport = request.transport
    if transport is None:
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def text(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers=headers)


def not_allowed(*allowed: str) -> web.Response:
    return web.Response(status=405, headers={"Allow": ", ".join(sorted(allowed))})
