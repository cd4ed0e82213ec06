"""One live stream from start to end: channels, stages, control, and a clean way out.

A stream is one TaskGroup. It ends when its input or its control channel is over, its output channel is gone, somebody
stops it, nothing comes in for a minute, or a stage of ours fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proto import engine_pb2 as pb

from ..engine_client import EngineClient
from ..errors import HeadraceError, SizeIsFixed, Violation
from ..media.decode import Sound
from ..media.encode import EncoderSettings
from ..params import StartRequest, Update, parse_update
from ..trickle.connection import open_http
from ..trickle.control import control_messages
from ..trickle.data import DataWriter
from ..trickle.publisher import Publisher
from ..trickle.subscriber import Subscriber
from ..trickle.wire import ChannelClosed, ChannelError
from .av_sync import AudioGate
from .events import Events, now_ms
from .inference import Inference
from .intake import Decoded, Intake
from .ledger import Ledger, Outcome
from .mailbox import Entry, Mailbox
from .output import Output
from .pacing import Pacer
from .parameters import UpdateResult
from .schema import schema_of
from .state import StreamFacts, StreamState, stream_state

logger = logging.getLogger(__name__)

#: Silence of the input before its first byte after which the stream is over: a gateway starts the stream when the job
#: is accepted and publishes when its user connects, minutes later (protocol.md 3.4 step 5); the broker itself sweeps
#: idle channels after five.
FIRST_INPUT_S = 300.0

#: Frames between decoder and encoder. Two seconds of 30 fps, the usual burst; beyond it the channel waits.
MAX_WAITING_FRAMES = 60

#: Time for what is decoded to leave through graph and encoder when the input is over (protocol.md 6.3).
DRAIN_S = 2.0

#: Longest wait of a control message for an engine that is loading.
CONTROL_WAIT_S = 60.0

#: Characters of an update, as JSON, that events repeat. A whole workflow of 26 nodes has 10,000.
MAX_PARAMS_IN_EVENTS = 64 * 1024

#: Updates of the control channel that wait for an answer at one time; beyond it the channel waits.
MAX_CONTROLS = 64

PIPELINE_NAME = "comfystream"

_MATRICES = {"bt601": pb.Colour.MATRIX_BT601, "bt709": pb.Colour.MATRIX_BT709}


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What the operator decided for every stream."""

    latency_budget_s: float = 0.4
    preset: str = "superfast"  # of x264, one of config.PRESETS
    bit_rate: int | None = None  # bits per second; None: from size and rate
    segment_s: float = 2.0
    input_timeout_s: float = 60.0  # silence after which a stream is over (ai-runner's guardian, protocol.md 6.3)
    pipeline: str = PIPELINE_NAME


class StreamSession:
    """Made by the manager; `run` is its whole life. Nothing of it is shared with another stream."""

    def __init__(self, request: StartRequest, engines: Sequence[EngineClient], settings: StreamSettings) -> None:
        self.request = request
        self.stream_id = request.stream_id
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self.end_reason = ""
        self._own_failure = False
        self._started_at_ms = now_ms()
        self._started_at = self._loop.time()
        self._ledger = Ledger()
        self._mailbox = Mailbox(MAX_WAITING_FRAMES)
        self._pacer = Pacer(settings.latency_budget_s)
        self._gate: AudioGate[Sound] = AudioGate()
        self._intake: Intake | None = None
        self._output: Output | None = None
        self._data: DataWriter | None = None
        self._events = Events(None, self.status)
        self._inference = Inference(
            self.stream_id,
            engines,
            self._mailbox,
            self._events,
            request.workflow,
            budget_s=settings.latency_budget_s,
            on_text=self._on_text,
        )
        self._max_framerate = request.max_framerate
        self._size: tuple[int, int] | None = (
            (request.width, request.height) if request.width and request.height else None
        )
        self._next_frame_id = 0
        self._last_pts: int | None = None
        self._last_params: Mapping[str, Any] = request.params
        self._last_params_at_ms: int | None = None
        self._running = False
        self._refused_controls = 0

    # ---- life

    def stop(self, reason: str) -> None:
        """Ask the stream to end in order; `run` returns soon after."""
        self._end(reason)

    def _end(self, reason: str) -> None:
        if not self._ended.is_set():
            self.end_reason = reason
            logger.info("stream %s: ending: %s", self.stream_id, reason)
            self._ended.set()

    async def run(self) -> None:
        """Run until the stream is over. Never raises but CancelledError; `end_reason` says why it ended."""
        self._running = True
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._open(stack)
                stack.push_async_callback(self._say_farewell)
                await self._run_stages()
        except* ChannelClosed as group:
            self._end(f"a channel is over: {group.exceptions[0]}")
        except* Exception as group:  # any stage may fail in any way; the stream ends, the shim lives on
            self._own_failure = True
            logger.exception("stream %s failed", self.stream_id, exc_info=group)
            self._end(f"failed: {_first(group)}")
        finally:
            self._running = False
            for entry in self._mailbox.clear():
                self._ledger.settle(Outcome.DROPPED, entry.reason or "stream_ended")
            logger.info("stream %s: ended: %s; frames %s", self.stream_id, self.end_reason, self._ledger.as_json())

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        """Open every channel that the request names; the stack closes them in the reverse order."""
        request = self.request
        # Its own connections: nothing of this stream outlives it, and a slow one cannot starve another.
        http = await stack.enter_async_context(open_http())
        if request.events_url:
            events = await stack.enter_async_context(
                Publisher(http, request.events_url, content_type="application/json")
            )
            self._events.attach(events)
        publisher = None
        if request.publish_url:
            publisher = await stack.enter_async_context(
                Publisher(http, request.publish_url, content_type="video/mp2t")
            )
            stack.push_async_callback(self._delete_after_own_failure, publisher)
        if request.data_url:
            data = await stack.enter_async_context(
                Publisher(http, request.data_url, content_type="application/jsonl")
            )
            self._data = await stack.enter_async_context(DataWriter(data))
        self._output = Output(
            publisher,
            self._mailbox,
            self._gate,
            self._ledger,
            has_audio=lambda: self._intake is not None and self._intake.has_audio,
            settings=self._encoder_settings,
            on_first_segment=lambda: self._events.trace("runner_send_first_processed_segment"),
            name=self.stream_id,
        )
        stack.push_async_callback(self._output.close)
        if request.subscribe_url:
            subscriber = await stack.enter_async_context(Subscriber(http, request.subscribe_url))
            self._intake = Intake(
                subscriber,
                size=self._size,
                on_picture=self._on_picture,
                on_sound=self._on_sound,
                on_first_segment=lambda: self._events.trace("runner_receive_first_ingest_segment"),
                name=self.stream_id,
            )
            self._intake.max_framerate = self._max_framerate
            stack.callback(self._intake.close)
        self._control: Subscriber | None = None
        if request.control_url:
            self._control = await stack.enter_async_context(Subscriber(http, request.control_url))
        self._events.trace("runner_receive_stream_request")

    async def _run_stages(self) -> None:
        assert self._output is not None
        async with asyncio.TaskGroup() as stages:
            events = stages.create_task(self._events.run(), name=f"events {self.stream_id}")
            output = stages.create_task(self._output.run(), name=f"output {self.stream_id}")
            inference = stages.create_task(self._inference.run(), name=f"inference {self.stream_id}")
            listeners = [stages.create_task(self._watch_silence(), name=f"watchdog {self.stream_id}")]
            if self._intake is not None:
                listeners.append(stages.create_task(self._receive(self._intake), name=f"receive {self.stream_id}"))
            if self._control is not None:
                listeners.append(stages.create_task(self._follow_control(), name=f"control {self.stream_id}"))
            await self._ended.wait()
            # The ladder: stop reading, drain, flush, close, cancel.
            for task in listeners:
                task.cancel()
            self._mailbox.close()
            await asyncio.wait({output}, timeout=DRAIN_S)
            if not output.done():
                # What the engine still holds will not come in time: let the rest out unprocessed.
                self._mailbox.refuse("stream_ended")
                await asyncio.wait({output}, timeout=DRAIN_S)
            for task in (output, inference, events):
                task.cancel()

    async def _say_farewell(self) -> None:
        self._events.send_status()
        self._events.send("stream_stopped", {"message": self.end_reason, "frames": self._ledger.as_json()})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._events.flush()

    async def _delete_after_own_failure(self, publisher: Publisher) -> None:
        # The gateway fails over at once when the output channel is gone, and after 30 s of silence otherwise.
        if self._own_failure:
            with contextlib.suppress(ChannelError):
                await publisher.delete()

    async def _receive(self, intake: Intake) -> None:
        self._end(await intake.run())

    async def _watch_silence(self) -> None:
        if self._intake is None:
            return
        while True:
            last = self._intake.last_input_at
            limit_s = self._settings.input_timeout_s if last is not None else FIRST_INPUT_S
            left = (last if last is not None else self._started_at) + limit_s - self._loop.time()
            if left <= 0:
                self._end(f"no input for {limit_s:.0f} s")
                return
            # The first byte shortens the limit, so look again before the long one is over.
            await asyncio.sleep(min(left, self._settings.input_timeout_s))

    async def _follow_control(self) -> None:
        assert self._control is not None
        room = asyncio.Semaphore(MAX_CONTROLS)
        async with asyncio.TaskGroup() as updates:
            async for message in control_messages(self._control):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CONTROL_WAIT_S):
                        await self._inference.opened_or_refused()
                # Not one after the other: what comes while one is on its way goes together in the next.
                await room.acquire()
                task = updates.create_task(self._update_by_control(message), name=f"control {self.stream_id}")
                task.add_done_callback(lambda _: room.release())
            self._end(f"the control channel is over: {self._control.closed_reason}")

    async def _update_by_control(self, message: Any) -> None:
        try:
            await self.update(message)
        except HeadraceError as exc:
            self._refused_controls += 1
            self._events.error("update_refused", exc.message, errors=[each.as_json() for each in exc.violations])

    # ---- frames

    async def _on_picture(self, decoded: Decoded) -> None:
        now = self._loop.time()
        self._ledger.receive()
        pts = decoded.pts
        if self._last_pts is not None and pts <= self._last_pts:
            self._ledger.settle(Outcome.DROPPED, "not_increasing")
            return
        self._last_pts = pts
        if self._size is None or self._next_frame_id == 0:
            self._size = (decoded.width, decoded.height)
            self._inference.set_format(*self._size, _colour(decoded.colour))
        self._mailbox.put(
            Entry(
                frame_id=self._next_frame_id,
                pts=pts,
                planes=decoded.planes,
                width=decoded.width,
                height=decoded.height,
                colour=decoded.colour,
                arrived_at=now,
                due=self._pacer.due(pts, now),
            )
        )
        self._next_frame_id += 1
        await self._mailbox.room()

    def _on_sound(self, sound: Sound) -> None:
        # Sound may wait as long as its picture could; twice the budget covers a picture that was late itself.
        self._gate.put(sound, self._loop.time() + 2 * self._settings.latency_budget_s + 1.0)

    def _on_text(self, item: pb.TextItem) -> None:
        if self._data is not None:
            self._data.put({"type": "text", "pts": item.pts, "node": item.node_id, "text": item.text})

    def _encoder_settings(self, entry: Entry, has_audio: bool) -> EncoderSettings:
        # The first picture that goes out fixes the size; a graph that scales decides it if it answers in time.
        width, height = entry.width, entry.height
        if entry.outcome is Outcome.PROCESSED and self.request.width is None:
            width, height = entry.result.width, entry.result.height
        return EncoderSettings(
            width=width,
            height=height,
            frame_rate=None,
            bit_rate=self._settings.bit_rate,
            preset=self._settings.preset,  # type: ignore[arg-type]  # checked by config
            segment_s=self._settings.segment_s,
            audio=has_audio,
            colour=entry.colour,
        )

    # ---- parameters

    @property
    def prompt(self) -> Mapping[str, Any]:
        """The workflow that runs, API format, with every accepted override."""
        return self._inference.parameters.prompt

    @property
    def version(self) -> int:
        return self._inference.parameters.version

    async def update(self, body: Any, *, dry_run: bool = False, expected_version: int = 0) -> UpdateResult:
        """Apply one update in any of the accepted shapes. Raises a HeadraceError; then nothing has changed."""

        def read(prompt: Mapping[str, Any]) -> Update:
            update = parse_update(body, prompt)
            self._check_size(update)
            return update

        update, result = await self._inference.parameters.update(
            read, dry_run=dry_run, expected_version=expected_version
        )
        if not dry_run:
            if update.max_framerate is not None and self._intake is not None:
                self._intake.max_framerate = update.max_framerate
            # Every status event repeats it, and a segment of the events channel has a limit.
            small = len(json.dumps(body)) <= MAX_PARAMS_IN_EVENTS
            self._last_params = body if isinstance(body, Mapping) and small else {}
            self._last_params_at_ms = now_ms()
            facts = {"version": result.version, "effective_pts": result.effective_pts}
            self._events.send("params_updated", {"params": body if small else None, **facts})
        return result

    async def schema(self) -> dict[str, Any]:
        """Every input of every node of the running graph. Raises NotReady or EngineGone while the engine is away."""
        parameters = self._inference.parameters
        description = await parameters.describe()
        return {"stream_id": self.stream_id, **schema_of(description, parameters.outer_version(description.version))}

    def _check_size(self, update: Update) -> None:
        wanted = (update.width, update.height)
        if None not in wanted and self._size is not None and wanted != self._size:
            width, height = self._size
            raise SizeIsFixed(
                "the size of a running stream cannot change: players and the gateway keep the first one",
                (Violation("width", f"is {update.width}x{update.height}", f"{width}x{height}, or a new stream"),),
            )

    # ---- what the world may know

    @property
    def state(self) -> StreamState:
        return stream_state(self._facts())

    def _facts(self) -> StreamFacts:
        now = self._loop.time()
        inference = self._inference

        def age(moment: float | None) -> float | None:
            return None if moment is None else now - moment

        return StreamFacts(
            running=self._running,
            engine_open=inference.is_open,
            ever_processed=inference.ever_processed,
            age_s=now - self._started_at,
            input_age_s=age(self._intake.last_input_at if self._intake else None),
            input_fps=self._intake.rate.per_second if self._intake else 0.0,
            output_age_s=age(self._output.last_output_at if self._output else None),
            inference_fps=inference.rate.per_second,
            error_age_s=age(inference.last_error_at),
            restart_age_s=age(inference.last_reopen_at),
            workflow_refused=inference.refused is not None,
        )

    def status(self) -> dict[str, Any]:
        """The payload of the ``status`` event, ai-runner's shape (protocol.md 4.7) and our counters beside it."""
        inference = self._inference
        intake, output = self._intake, self._output
        params = dict(self._last_params)
        return {
            "type": "status",
            "pipeline": self._settings.pipeline,
            "state": self.state.value,
            "start_time": self._started_at_ms,
            "last_state_update_time": now_ms(),
            "input_status": {
                "last_input_time": self._wall_ms(intake.last_input_at if intake else None),
                "fps": round(intake.rate.per_second, 1) if intake else 0.0,
            },
            "inference_status": {
                "last_output_time": self._wall_ms(output.last_output_at if output else None),
                "fps": round(output.rate.per_second, 1) if output else 0.0,
                "processed_fps": round(inference.rate.per_second, 1),
                "graph_ms": round(inference.graph_ms, 2),
                "last_params_update_time": self._last_params_at_ms,
                "last_params": params or None,
                "last_params_hash": hashlib.md5(
                    json.dumps(params, sort_keys=True, default=str).encode(), usedforsecurity=False
                ).hexdigest(),
                "params_version": inference.parameters.version,
                "last_error_time": self._wall_ms(inference.last_error_at),
                "last_error": inference.last_error,
                "last_restart_time": self._wall_ms(inference.last_reopen_at),
                "last_restart_logs": None,
                "restart_count": inference.reopened,
            },
            "frames": self._ledger.as_json(),
            "last_status_timestamp": now_ms(),
            "timestamp": now_ms(),
        }

    def _wall_ms(self, moment: float | None) -> int | None:
        """A loop time as milliseconds since the Unix epoch."""
        return None if moment is None else round((time.time() - (self._loop.time() - moment)) * 1000)


def _colour(colour: Any) -> pb.Colour:
    return pb.Colour(
        matrix=_MATRICES[colour.matrix],
        range=pb.Colour.RANGE_FULL if colour.full_range else pb.Colour.RANGE_LIMITED,
    )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
