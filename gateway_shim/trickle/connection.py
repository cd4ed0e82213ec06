"""The HTTP under a channel: one way to send a request that may stay open for hours."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp

logger = logging.getLogger(__name__)

# A long poll and an open POST last as long as the stream does: only connecting is bounded. Whoever reads or writes
# has its own idea of silence.
CONNECT_TIMEOUT_S = 10.0
_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_connect=5.0, sock_read=None)
_HEADERS = {"Accept-Encoding": "identity"}  # a compressing proxy would hold bytes back

# What a request that did not get through raises: refused, reset, cut off, timed out, not HTTP.
FAILURES = (aiohttp.ClientError, OSError, TimeoutError)


def connected(failure: BaseException) -> bool:
    """Whether there was a connection before the request failed."""
    return not isinstance(failure, (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError))


def open_http() -> aiohttp.ClientSession:
    """A session for any number of channels. Close it after the last subscriber and publisher.

    Without a limit of connections: each channel holds two, and a pool that is full would make a segment wait for the
    end of another stream.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


#: Seconds between two lines about descriptors that ran out, and when each loop had its last one.
_NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})
_SHORTAGE_EVERY_S = 10.0
_shortage: WeakKeyDictionary[asyncio.AbstractEventLoop, float] = WeakKeyDictionary()


def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's exception handler, for a program that posts.

    A connection that is reset just when the end of a body is to be written makes aiohttp's own task for the body fail
    (3.14: ``write_eof`` in ``ClientRequest.write_bytes``), which nobody awaits; the request fails for its caller as
    well. An error with a traceback would be news of nothing. Where descriptors run out asyncio tells of each
    connection that waits, with a traceback, which once rotated the whole log away. All else is asyncio's to tell.
    """
    error, task = context.get("exception"), context.get("future")
    name = getattr(task.get_coro(), "__qualname__", "") if isinstance(task, asyncio.Task) else ""
    if isinstance(error, aiohttp.ClientConnectionResetError) and name == "ClientRequest.write_bytes":
        logger.debug("a connection was gone before the end of its body: %s", error)
    elif isinstance(error, OSError) and error.errno in _NO_DESCRIPTOR and "accept" in context.get("message", ""):
        if loop.time() - _shortage.get(loop, -_SHORTAGE_EVERY_S) >= _SHORTAGE_EVERY_S:
            _shortage[loop] = loop.time()
            logger.error("no descriptor is left for a connection: %s", error)
    else:
        loop.default_exception_handler(context)


async def send(
    http: aiohttp.ClientSession,
    method: str,
    url: str,
    *,
    data: Any = None,
    headers: dict[str, str] | None = None,
) -> aiohttp.ClientResponse:
    """Returns when the response headers are there; the caller closes or reads the response.

    Certificates are not verified: orchestrators serve trickle with one they signed themselves, and possession of the
    URL is the only credential. Redirects are not followed: some would turn a POST into a GET.
    """
    return await http.request(
        method,
        url,
        data=data,
        headers=_HEADERS | (headers or {}),
        timeout=_TIMEOUT,
        ssl=False,
        allow_redirects=False,
    )
