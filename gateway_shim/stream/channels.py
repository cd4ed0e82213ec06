"""The channels of one stream: those that its start request names, opened in order and closed in the reverse one."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import aiohttp

from ..params import StartRequest
from ..trickle.connection import open_http
from ..trickle.data import DataWriter
from ..trickle.publisher import Publisher, PublisherTiming
from ..trickle.subscriber import Subscriber
from ..trickle.wire import UNREACHABLE, ChannelClosed, ChannelError
from .events import Events

#: A channel that takes nothing must not hold up the end of a stream beyond supervisord's patience (stopwaitsecs).
PUBLISHER_TIMING = PublisherTiming(close_s=2.0, request_s=2.0)


class Channels:
    """Each is None where the request names none, and until it is opened.

    They close with the stack that they are opened on. What writes to the outgoing ones is pushed on it between the
    two calls: it then ends when nothing is read any more, and before its channel.
    """

    def __init__(self, request: StartRequest) -> None:
        self.output: Publisher | None = None
        self.data: DataWriter | None = None
        self.input: Subscriber | None = None
        self.control: Subscriber | None = None
        self.abandoned = False  # the output channel is deleted when it closes
        self._request = request
        self._http: aiohttp.ClientSession | None = None

    async def open_outgoing(
        self, stack: contextlib.AsyncExitStack, events: Events, farewell: Callable[[], Awaitable[None]]
    ) -> None:
        """Events, output and data. Raises ChannelError.

        events: gets its channel as soon as that is open. farewell: called when all but the events channel are closed.
        """
        request = self._request
        # Its own connections: nothing of this stream outlives it, and a slow one cannot starve another.
        http = self._http = await stack.enter_async_context(open_http())

        async def opened(url: str, content_type: str) -> Publisher:
            # Resumed: on a channel that somebody wrote to before, an index from zero would be discarded (1.5).
            publisher = Publisher(http, url, content_type=content_type, resume=True, timing=PUBLISHER_TIMING)
            await stack.enter_async_context(publisher)
            if publisher.closed_reason == UNREACHABLE:  # so are the others, and each would be tried for as long
                raise ChannelClosed(UNREACHABLE)
            return publisher

        if request.events_url:
            events.attach(await opened(request.events_url, "application/json"))
            stack.push_async_callback(farewell)
        if request.publish_url:
            self.output = await opened(request.publish_url, "video/mp2t")
            stack.push_async_callback(self._delete_abandoned, self.output)
        if request.data_url:
            data = await opened(request.data_url, "application/jsonl")
            self.data = await stack.enter_async_context(DataWriter(data))

    async def open_incoming(self, stack: contextlib.AsyncExitStack, control_start: int) -> None:
        """Input and control, after the others. control_start: the first segment to read of the control channel."""
        request, http = self._request, self._http
        assert http is not None
        if request.subscribe_url:
            self.input = await stack.enter_async_context(Subscriber(http, request.subscribe_url))
        if request.control_url:
            # The last update holds, and none may come after it for hours: it is not to be skipped.
            control = Subscriber(http, request.control_url, start=control_start, oldest_first=True)
            self.control = await stack.enter_async_context(control)

    async def _delete_abandoned(self, output: Publisher) -> None:
        # The gateway fails over at once when the output channel is gone, and after 30 s of silence otherwise.
        if self.abandoned:
            with contextlib.suppress(ChannelError):
                await output.delete()
