"""One stream as an orchestrator and its gateway drive it: channels, keep-alives, updates, events, and the end.

The gateway's part (control, events, data) goes through real HTTP, as the worker's does. ``orchestrator`` makes them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from ..trickle.publisher import Publisher
from ..trickle.subscriber import Subscriber
from .broker import Broker
from .channel import Channel, Signal

logger = logging.getLogger(__name__)

#: "byoc": a registered capability, driven by /stream/*. "live": an entry of aiModels.json, driven by channels alone.
Mode = Literal["byoc", "live"]

CONTROL_KEEPALIVE_S = 10.0  # go-livepeer server/ai_live_video.go
_SEGMENT_LIMIT_BYTES = 10 << 20

#: How long the worker may take to end a live stream by itself, which nobody tells it to but the end of its channels.
_RELEASE_S = 10.0


@dataclass(frozen=True, slots=True)
class WorkerAnswer:
    status: int
    body: Any  # JSON, or text where it is none


class Inbox:
    """What came on a channel, in order; ``next`` hands each thing out once."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._read = 0
        self._ended = False
        self._changed = Signal()

    def put(self, item: Any) -> None:
        self.all.append(item)
        self._changed.fire()

    def end(self) -> None:
        self._ended = True
        self._changed.fire()

    async def next(self, wanted: Callable[[Any], bool], timeout_s: float) -> Any:
        """The next wanted thing; what lies before it is passed over. LookupError when the channel ends first."""
        async with asyncio.timeout(timeout_s):
            while True:
                while self._read < len(self.all):
                    item = self.all[self._read]
                    self._read += 1
                    if wanted(item):
                        return item
                if self._ended:
                    raise LookupError("the channel ended")
                await self._changed.wait()


class LiveStream:
    """A running stream. Its owner, the orchestrator, opens it; ``stop`` ends it and may be called again."""

    def __init__(
        self,
        broker: Broker,
        http: aiohttp.ClientSession,
        stream_id: str,
        mode: Mode,
        channels: Mapping[str, str],
        post: Callable[[str, Any], Awaitable[WorkerAnswer]],
        keepalive_s: float,
    ) -> None:
        """channels: URL by the name that the start call gives it (``subscribe_url`` is what the worker reads).
        post: calls the worker about this stream; path and body, JSON or bytes."""
        self.id = stream_id
        self.mode = mode
        self.channels = dict(channels)
        self.ended = asyncio.Event()
        self._broker = broker
        self._http = http
        self._post = post
        self._keepalive_s = keepalive_s
        self._events = Inbox()
        self._data = Inbox()
        self._control: Publisher | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._on_end: Callable[[], None] = lambda: None

    # ---- what one looks at

    @property
    def subscribe_url(self) -> str:
        """Where the worker reads its input, and a source publishes it."""
        return self.channels["subscribe_url"]

    @property
    def publish_url(self) -> str:
        """Where the worker publishes its output, and a probe reads it."""
        return self.channels["publish_url"]

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every event so far, as the gateway takes it out of its envelope."""
        return self._events.all

    @property
    def data(self) -> list[Any]:
        """Every value of the data channel so far, one a line."""
        return self._data.all

    async def next_event(self, kind: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """The next event of type ``kind`` that was not handed out yet. LookupError when the channel ends first."""
        event: dict[str, Any] = await self._events.next(lambda event: event.get("type") == kind, timeout_s)
        return event

    async def next_data(self, timeout_s: float = 30.0) -> Any:
        return await self._data.next(lambda _: True, timeout_s)

    # ---- what one does

    async def update(self, body: Any) -> WorkerAnswer | None:
        """Change parameters the way the gateway does: over HTTP, or over the control channel (None: no answer)."""
        if self.mode == "byoc":
            return await self._post("/stream/params", body)
        await self.write_control(body)
        return None

    async def write_control(self, value: Any) -> None:
        """One value, or bytes as they are, as one segment of the control channel."""
        assert self._control is not None
        await self._control.publish(value if isinstance(value, bytes) else json.dumps(value).encode())

    async def end_input(self) -> None:
        """The client went away: its input channel ends, all else stays."""
        await self._end_channels("subscribe_url")

    async def stop(self, reason: str = "stream ended", calls: int = 1) -> None:
        """End the stream as a client's stop does: input and control end, the worker is told, the rest ends.

        calls: how often a BYOC worker is told; three times happens (protocol.md 3.5).
        """
        if self.ended.is_set():
            return
        self.ended.set()
        await self._end_channels("control_url", "subscribe_url")
        if self.mode == "byoc":
            for _ in range(calls):
                try:
                    await self._post("/stream/stop", reason.encode())
                except (aiohttp.ClientError, TimeoutError) as exc:  # the stream is removed regardless
                    logger.warning("stream %s: the worker cannot be told to stop: %s", self.id, exc)
        else:
            await self._released()
        await self._end_channels(*self.channels)
        await self.close()
        self._on_end()

    # ---- for the orchestrator

    async def open(self) -> None:
        """Before the worker is called, so that nothing it says is lost."""
        self._control = await Publisher(
            self._http, self.channels["control_url"], content_type="application/json"
        ).__aenter__()
        self._begin(self._keep_alive(self._control), "keep-alive")
        self._begin(self._read(self.channels["events_url"], self._events, _events_of), "events")
        if "data_url" in self.channels:
            self._begin(self._read(self.channels["data_url"], self._data, _lines_of), "data")

    def on_end(self, call: Callable[[], None]) -> None:
        """``call`` once the stream was stopped."""
        self._on_end = call

    async def close(self) -> None:
        """End our own tasks; the channels are somebody else's business."""
        self.ended.set()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._control is not None:
            await self._control.aclose()
        self._events.end()
        self._data.end()

    def _begin(self, work: Any, name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=f"{name} of {self.id}"))

    async def _keep_alive(self, control: Publisher) -> None:
        while not control.closed.is_set():
            await asyncio.sleep(self._keepalive_s)
            try:
                await control.publish(b'{"keep":"alive"}')
            except ConnectionError:
                return

    async def _read(self, url: str, inbox: Inbox, values_of: Callable[[bytes], list[Any]]) -> None:
        try:
            async with Subscriber(self._http, url, start=0) as subscriber:
                async for segment in subscriber:
                    try:
                        for value in values_of(await segment.read(_SEGMENT_LIMIT_BYTES)):
                            inbox.put(value)
                    except (ValueError, ConnectionError) as exc:  # the gateway drops it and goes on
                        logger.warning("stream %s: a segment of %s cannot be read: %s", self.id, url, exc)
        finally:
            inbox.end()

    async def _end_channels(self, *names: str) -> None:
        for name in names:
            if name in self.channels:
                await self._broker.delete(self.channels[name].rpartition("/")[2])

    async def _released(self) -> None:
        """Until the worker has let go of its output, which it does once it saw the end of its input."""
        channel = self._broker.channels.get(self.publish_url.rpartition("/")[2])
        if channel is None:
            return

        def unused(channel: Channel) -> bool:
            head = channel.next_write
            return not any(channel.at_work("POST", seq) for seq in range(max(0, head - 1), head + 2))

        try:
            async with asyncio.timeout(_RELEASE_S):
                await channel.wait_for(unused)
        except LookupError:
            return
        except TimeoutError:
            logger.warning("stream %s: the worker still holds its output after %g s", self.id, _RELEASE_S)


def _events_of(text: bytes) -> list[Any]:
    """The gateway parses a whole segment: one object, with its event inside or by itself (protocol.md 4.7)."""
    if not text:
        return []
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    event = message.get("event", message)
    if not isinstance(event, dict):
        raise ValueError("the event is not a JSON object")
    return [event]


def _lines_of(text: bytes) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]
