"""One live stream from start to end: channels, stages, control, and a clean way out.

A stream is one TaskGroup. It ends when its input or its control channel is over, its output channel is gone, somebody
stops it, nothing comes in for a minute, or a stage of ours fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from proto import engine_pb2 as pb

from ..engine_client import EngineClient
from ..errors import SizeIsFixed, Violation
from ..logs import current_stream
from ..media.decode import DecoderSettings, Sound
from ..media.hardware import ON_CPU, Codecs
from ..media.settings import EncoderSettings
from ..params import StartRequest, Update, parse_update
from ..trickle.connection import open_http
from ..trickle.data import DataWriter
from ..trickle.publisher import Publisher, PublisherTiming
from ..trickle.subscriber import Subscriber
from ..trickle.wire import ChannelClosed, ChannelError
from .av_sync import AudioGate
from .control import ControlUpdates
from .engine_sound import EngineSound
from .events import Events
from .fallback import Fallback, Policy
from .generate import Generator
from .inference import Inference
from .intake import Decoded, Intake
from .journal import Kept, Record
from .keeper import Keeper
from .ledger import Ledger, Outcome
from .mailbox import Entry, Mailbox
from .output import Output
from .pacing import Pacer
from .parameters import UpdateResult
from .pause import Pause
from .report import Report
from .schema import schema_of
from .state import StreamState
from .text import records_of

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

#: A channel that takes nothing must not hold up the end of a stream beyond supervisord's patience (stopwaitsecs).
PUBLISHER_TIMING = PublisherTiming(close_s=2.0, request_s=2.0)

#: Longest wait for the size of the graph's pictures, from when the first one is due: what comes meanwhile waits too,
#: and goes out with it. A graph that loads for longer has its pictures scaled to the input's size.
SIZE_WAIT_S = 2.0

PIPELINE_NAME = "comfystream"

_MATRICES = {"bt601": pb.Colour.MATRIX_BT601, "bt709": pb.Colour.MATRIX_BT709}


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What the operator decided for every stream."""

    latency_budget_s: float = 0.4  # of streams that do not say
    fallback: Policy = Policy.AUTO  # of streams that do not say
    preset: str = "auto"  # of x264, one of settings.PRESETS, or auto
    bit_rate: int | None = None  # bits per second; None: from size and rate
    codecs: Codecs = ON_CPU  # what the machine has
    codec_threads: int = 0  # of each codec; 0: from the machine and the pictures
    capacity: int = 1  # streams that share the machine
    segment_s: float = 2.0
    input_timeout_s: float = 60.0  # silence after which a stream is over (ai-runner's guardian, protocol.md 6.3)
    pipeline: str = PIPELINE_NAME


class StreamSession:
    """Made by the manager; `run` is its whole life. Nothing of it is shared with another stream."""

    def __init__(
        self,
        request: StartRequest,
        engines: Sequence[EngineClient],
        settings: StreamSettings,
        *,
        record: Record | None = None,
        kept: Kept | None = None,
    ) -> None:
        """record: where to keep what a successor needs. kept: what a predecessor kept of this stream."""
        self.request = request
        self.stream_id = request.stream_id
        self.end_reason = ""
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._ended = asyncio.Event()
        self._abandon_output = False
        self._ledger = Ledger()
        self._mailbox = Mailbox(MAX_WAITING_FRAMES)
        budget_s = request.latency_budget_ms / 1000 if request.latency_budget_ms else settings.latency_budget_s
        self._pacer = Pacer(budget_s)
        self._pause = Pause(self._pacer)
        self._sound = EngineSound(AudioGate())
        self._publisher: Publisher | None = None
        self._intake: Intake | None = None
        self._generator: Generator | None = None  # in the place of an input channel
        self._output: Output | None = None
        self._control: ControlUpdates | None = None
        self._data: DataWriter | None = None
        self._events = Events(None, self.status)
        self._keeper = Keeper(request, record, kept)
        self._inference = Inference(
            self.stream_id,
            engines,
            self._mailbox,
            self._events,
            request.workflow if kept is None else kept.facts.prompt,
            budget_s=budget_s,
            sound=self._sound,
            on_text=self._on_text,
            version=1 if kept is None else kept.facts.version,
        )
        self._keeper.parameters = self._inference.parameters
        self._fallback = Fallback(
            Policy(request.fallback) if request.fallback else settings.fallback,
            gives_pictures=lambda: self._inference.traffic.gives_pictures,
            notice=self._inference.notice,
        )
        self._report = Report(settings.pipeline, self._inference, self._ledger, request.params, self._loop.time)
        self._size: tuple[int, int] | None = (
            (request.width, request.height) if request.width and request.height else None
        )
        self._next_frame_id = 0
        self._last_pts: int | None = None if kept is None else kept.position.pts

    # ---- life

    @property
    def ending(self) -> bool:
        """Whether it is on its way out; it takes no update any more and will soon make room."""
        return self._ended.is_set()

    def stop(self, reason: str, *, abandon_output: bool = False) -> None:
        """Ask the stream to end in order; `run` returns soon after.

        abandon_output: delete the output channel, so that the gateway looks for another worker at once.
        """
        self._abandon_output |= abandon_output
        self._end(reason)

    def _end(self, reason: str) -> None:
        if not self._ended.is_set():
            self.end_reason = reason
            logger.info("stream %s: ending: %s", self.stream_id, reason)
            self._ended.set()

    async def run(self) -> None:
        """Run until the stream is over. Never raises but CancelledError; `end_reason` says why it ended."""
        current_stream.set(self.stream_id)
        self._report.running = True
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._reasoned(self._open(stack))
                if not self.ending:
                    await self._reasoned(self._run_stages())
        except ChannelError as exc:
            # Of a channel that did not close cleanly; why the stream ended is known by now.
            logger.info("stream %s: %s", self.stream_id, exc)
        finally:
            self._keeper.forget()
            self._report.running = False
            for entry in self._mailbox.clear():
                self._ledger.settle(Outcome.DROPPED, entry.reason or "stream_ended")
            logger.info("stream %s: ended: %s; frames %s", self.stream_id, self.end_reason, self._ledger.as_json())

    async def _reasoned(self, part: Coroutine[Any, Any, None]) -> None:
        """Run a part of the stream's life; what it raises becomes the reason of the end, and is known before the
        channels close: they carry the farewell, and the output channel goes with a failure of ours."""
        try:
            await part
        except* ChannelClosed as group:
            self._end(f"a channel is over: {_first(group)}")
        except* Exception as group:  # any stage may fail in any way; the stream ends, the shim lives on
            self._abandon_output = True
            logger.exception("stream %s failed", self.stream_id, exc_info=group)
            self._events.error("stream_failed", f"the stream failed: {_first(group)}")
            self._end(f"failed: {_first(group)}")

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        """Open every channel that the request names; the stack closes them in the reverse order."""
        request = self.request
        # Its own connections: nothing of this stream outlives it, and a slow one cannot starve another.
        http = await stack.enter_async_context(open_http())

        def publisher(url: str, content_type: str) -> Publisher:
            # Resumed: on a channel that somebody wrote to before, an index from zero would be discarded (1.5).
            return Publisher(http, url, content_type=content_type, resume=True, timing=PUBLISHER_TIMING)

        if request.events_url:
            events = await stack.enter_async_context(publisher(request.events_url, "application/json"))
            self._events.attach(events)
            stack.push_async_callback(self._say_farewell)
        if request.publish_url:
            self._publisher = await stack.enter_async_context(publisher(request.publish_url, "video/mp2t"))
            stack.push_async_callback(self._delete_abandoned, self._publisher)
        if request.data_url:
            data = await stack.enter_async_context(publisher(request.data_url, "application/jsonl"))
            self._data = await stack.enter_async_context(DataWriter(data))
        self._output = self._report.output = Output(
            self._publisher,
            self._mailbox,
            self._sound.out,
            self._ledger,
            has_audio=lambda: self._intake is not None and self._intake.has_audio,
            settings=self._encoder_settings,
            fallback=self._fallback,
            before_first=self._size_known,
            on_first_segment=lambda: self._events.trace("runner_send_first_processed_segment"),
            before_pictures=self._keeper.before_pictures,
            missing=self._pause.missing,
            name=self.stream_id,
        )
        stack.push_async_callback(self._output.close)
        if request.subscribe_url:
            subscriber = await stack.enter_async_context(Subscriber(http, request.subscribe_url))
            self._intake = self._report.intake = Intake(
                subscriber,
                size=self._size,
                on_picture=self._on_picture,
                on_sound=self._on_sound,
                on_first_segment=lambda: self._events.trace("runner_receive_first_ingest_segment"),
                decoder=DecoderSettings(
                    threads=self._settings.codec_threads,
                    streams=self._settings.capacity,
                    device=self._settings.codecs.decoder,
                ),
                resumed=self._keeper.position,
                name=self.stream_id,
            )
            self._intake.max_framerate = request.max_framerate
            stack.push_async_callback(self._intake.close)
        else:
            self._generator = Generator(self._size, request.max_framerate, self._on_picture, self._keeper.first_pts)
            self._report.intake = self._generator
        if request.control_url:
            subscriber = Subscriber(http, request.control_url, start=self._keeper.control_start)
            control = await stack.enter_async_context(subscriber)
            self._control = ControlUpdates(control, self._update_when_possible, self._events)
        self._keeper.intake, self._keeper.control = self._source, self._control
        self._keeper.announce(self._events)

    async def _run_stages(self) -> None:
        assert self._output is not None
        async with asyncio.TaskGroup() as stages:

            def begin(part: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
                return stages.create_task(part, name=f"{name} {self.stream_id}")

            events = begin(self._events.run(), "events")
            output = begin(self._output.run(), "output")
            inference = begin(self._inference.run(), "inference")
            listeners = [begin(self._watch_silence(), "watchdog"), begin(self._keeper.run(), "journal")]
            if self._publisher is not None:
                listeners.append(begin(self._watch_output(self._publisher), "output channel"))
            if self._intake is not None:
                listeners.append(begin(self._end_with(self._intake.run()), "receive"))
            if self._generator is not None:
                listeners.append(begin(self._generator.run(), "generate"))
            if self._control is not None:
                listeners.append(begin(self._end_with(self._control.run()), "control"))
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
            if self._data is not None:  # text of frames that went out already
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_S):
                        await self._inference.finish()
            for task in (output, inference, events):
                task.cancel()

    async def _say_farewell(self) -> None:
        self._events.send_status()
        self._events.send("stream_stopped", {"message": self.end_reason, "frames": self._ledger.as_json()})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._events.flush()

    async def _delete_abandoned(self, publisher: Publisher) -> None:
        # The gateway fails over at once when the output channel is gone, and after 30 s of silence otherwise.
        if self._abandon_output:
            with contextlib.suppress(ChannelError):
                await publisher.delete()

    async def _end_with(self, part: Coroutine[Any, Any, str]) -> None:
        self._end(await part)

    async def _watch_output(self, publisher: Publisher) -> None:
        """The orchestrator may end the output channel while nothing is written to it."""
        await publisher.closed.wait()
        self._end(f"the output channel is over: {publisher.closed_reason}")

    async def _watch_silence(self) -> None:
        while True:
            source = self._source
            last = source.last_input_at if source is not None else None
            limit_s = self._settings.input_timeout_s if last is not None else FIRST_INPUT_S
            left = (last if last is not None else self._started_at) + limit_s - self._loop.time()
            if left <= 0:
                self._end(f"no input for {limit_s:.0f} s")
                return
            # The first byte shortens the limit, so look again before the long one is over.
            await asyncio.sleep(min(left, self._settings.input_timeout_s))

    # ---- frames

    @property
    def _source(self) -> Intake | Generator | None:
        return self._intake or self._generator

    async def _on_picture(self, decoded: Decoded) -> None:
        now = self._loop.time()
        self._ledger.receive()
        pts = self._pause.picture(decoded.pts, now)
        if pts is None:
            self._ledger.settle(Outcome.DROPPED, "after_pause")
            return
        self._moved()
        if self._last_pts is not None and pts <= self._last_pts:
            self._ledger.settle(Outcome.DROPPED, "not_increasing")
            return
        self._last_pts = pts
        if self._size is None or self._next_frame_id == 0:
            self._size = (decoded.frame.width, decoded.frame.height)
            self._inference.set_format(*self._size, _colour(decoded.colour))
        self._mailbox.put(
            Entry(
                frame_id=self._next_frame_id,
                pts=pts,
                frame=decoded.frame,
                colour=decoded.colour,
                arrived_at=now,
                due=self._pacer.due(pts, now),
            )
        )
        self._next_frame_id += 1
        await self._mailbox.room()

    def _on_sound(self, sound: Sound) -> None:
        # Sound may wait as long as its picture could; twice the budget covers a picture that was late itself.
        now = self._loop.time()
        pts = self._pause.sound(sound.pts, now)
        self._moved()
        self._sound.put(sound if pts == sound.pts else replace(sound, pts=pts), now + 2 * self._pacer.budget_s + 1.0)

    def _moved(self) -> None:
        if self._intake is not None:
            self._intake.moved = self._pause.offset

    def _on_text(self, item: pb.TextItem) -> None:
        if self._data is not None:
            for record in records_of(item):
                self._data.put(record)

    async def _size_known(self) -> None:
        """Before the first picture goes out: give an engine that opens our session the time to say its size."""
        if self.request.width is None and not self._keeper.is_shaped and self._inference.may_open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SIZE_WAIT_S):
                    await self._inference.answerable()

    def _encoder_settings(self, entry: Entry, has_audio: bool) -> EncoderSettings:
        # The first picture that goes out fixes the size; a graph that scales decides it if the engine was ready.
        width, height = entry.frame.width, entry.frame.height
        if self.request.width is None:
            if entry.result is not None:
                width, height = entry.result.width, entry.result.height
            elif self._inference.traffic.picture_size is not None:
                width, height = self._inference.traffic.picture_size
        settings = EncoderSettings(
            width=width,
            height=height,
            frame_rate=self._source.frame_rate if self._source is not None else None,
            bit_rate=self._settings.bit_rate,
            codec=self._settings.codecs.encoder,
            threads=self._settings.codec_threads,
            streams=self._settings.capacity,
            preset=self._settings.preset,  # type: ignore[arg-type]  # checked by config
            segment_s=self._settings.segment_s,
            audio=has_audio,
            colour=entry.colour,
        )
        return self._keeper.shaped(settings)

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
            source = self._source
            if update.max_framerate is not None and source is not None:
                source.max_framerate = update.max_framerate
            if update.latency_budget_ms is not None:
                self._pacer.budget_s = self._inference.traffic.budget_s = update.latency_budget_ms / 1000
            if update.fallback is not None:
                self._fallback.policy = Policy(update.fallback)
            shown = self._report.updated(body)
            facts = {"version": result.version, "effective_pts": result.effective_pts}
            self._events.send("params_updated", {"params": shown, **facts})
            await self._keeper.keep()
        return result

    async def _update_when_possible(self, body: Any) -> None:
        """An update from the control channel, where nobody can be told to come back."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONTROL_WAIT_S):
                await self._inference.answerable()
        await self.update(body)

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
        return self._report.state

    def status(self) -> dict[str, Any]:
        """The payload of the ``status`` event; see `Report`."""
        return self._report.status()


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
