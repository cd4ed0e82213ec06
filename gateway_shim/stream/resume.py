"""After a shim was killed: which of its streams go on here, and how the others are given away.

The gateway notices nothing but silence. It gives a worker up after 30 s without a finished output segment or without
an event (protocol.md 1.8); until then the channels are as they were and a resumed publisher goes on behind `/next`.
Deleting `-out` makes it look for another worker at once (protocol.md 6.3, 7 rule 44).
"""

from __future__ import annotations

import asyncio
import logging
import time

from ..trickle.connection import open_http
from ..trickle.publisher import Publisher
from ..trickle.wire import ChannelError
from .journal import Kept

logger = logging.getLogger(__name__)

#: A stream that is resumed this often in such a time is probably what kills the shim: as often as both Python peers
#: restart a codec (protocol.md 2.3).
MAX_RESUMES = 3
RESUMES_WITHIN_S = 120.0

#: For all of it: an orchestrator that does not answer has closed the stream in any case.
HAND_OVER_S = 5.0


def why_not(kept: Kept, within_s: float) -> str | None:
    """Why this stream has to be handed over; None when it can go on. within_s: silence that its gateway bears."""
    if kept.silent_s >= within_s:
        return f"{kept.silent_s:.1f} s of silence, the limit is {within_s:g} s"
    lately = [at for at in kept.facts.resumed_at if time.time() - at < RESUMES_WITHIN_S]
    if len(lately) >= MAX_RESUMES:
        return f"it was resumed {len(lately)} times in {RESUMES_WITHIN_S:.0f} s"
    return None


async def hand_over(kept: Kept) -> None:
    """Delete the stream's output, so that its gateway goes elsewhere, and forget it."""
    request = kept.facts.request
    try:
        async with asyncio.timeout(HAND_OVER_S), open_http() as http:
            for url in filter(None, (request.publish_url, request.data_url)):
                try:
                    await Publisher(http, url, content_type="").delete()
                except ChannelError as exc:
                    logger.debug("stream %s: %s", request.stream_id, exc)
    except TimeoutError:
        logger.warning("stream %s: its channels did not answer within %g s", request.stream_id, HAND_OVER_S)
    finally:
        kept.record.remove()
