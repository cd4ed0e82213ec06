"""What an orchestrator calls when it knows us from its ``aiModels.json`` (protocol.md 4.4): the start of a stream.

There is no stop call; the stream ends with its channels. Updates come over the control channel.
"""

from __future__ import annotations

import logging

from aiohttp import web

from ..errors import StreamsFull, Violation, error_body
from ..params import parse_start
from .context import CONTEXT, read_body, stream_header

logger = logging.getLogger(__name__)

#: The second is how the documents write it (protocol.md 8, row 3).
START_PATHS = ("/live-video-to-video", "/live/video-to-video")

#: What makes a gateway choose another orchestrator without blame (go-livepeer server/ai_process.go).
FULL = "insufficient capacity"


async def start(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    body = await read_body(request)
    start_request = parse_start(body, require_id=False, default_id=stream_header(request) or "")
    if start_request.model_id not in ("", context.settings.model_id):
        # Its aiModels.json and our MODEL_ID disagree; the stream is fine, only version checks of gateways are not.
        logger.warning(
            "stream %s: the orchestrator asks for model %r, this worker is %r",
            start_request.stream_id,
            start_request.model_id,
            context.settings.model_id,
        )
    session = await context.start(start_request)
    # The three URLs are empty in ai-runner's answer too; the orchestrator ignores them.
    return web.json_response(
        {
            "status": "success",
            "message": "Stream started successfully",
            "request_id": session.request.stream_id,
            "publish_url": "",
            "subscribe_url": "",
            "control_url": "",
        }
    )


def refusal(status: int, code: str, message: str, violations: tuple[Violation, ...]) -> web.Response:
    """An error in one of the few forms that this caller survives.

    Any status but 400, 401, 422 and 500 makes the orchestrator's handler panic (protocol.md 4.4): other faults of the
    caller become 400, everything else 500.
    """
    if status not in (400, 401, 422, 500):
        status = 400 if 400 <= status < 500 else 500
    if code == StreamsFull.code and FULL not in message:
        message = f"{FULL}: {message}"
    return web.json_response(error_body(status, code, message, violations), status=status)


def add_routes(router: web.UrlDispatcher) -> None:
    for path in START_PATHS:
        router.add_post(path, start)
