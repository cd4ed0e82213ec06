"""One live stream from start to end: its parts, their tasks, updates, and a clean way out.

A stream is one TaskGroup. It ends when its input or its control channel is over, its output channel is gone, somebody
stops it, nothing comes in for a minute, or a stage of ours fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from proto import engine_pb2 as pb

from ..engine_client import EngineClient
from ..errors import SizeIsFixed, Violation
from ..logs import current_stream
from ..media.decode import DecoderSettings
from ..params import StartRequest, Update, parse_update
from ..trickle.publisher import Publisher
from ..trickle.wire import ChannelClosed, ChannelError
from .admission import Admission
from .av_sync import AudioGate
from .channels import Channels
from .control import ControlUpdates
from .engine_sound import EngineSound
from .events import Events
from .fallback import Fallback, Policy
from .generate import Generator
from .inference import Inference
from .intake import Intake
from .journal import Kept, Record
from .keeper import Keeper
from .ledger import Ledger, Outcome
from .mailbox import Mailbox
from .output import Output
from .output_form import OutputForm
from .parameters import UpdateResult
from .places import USUAL
from .report import Report
from .schema import schema_of
from .settings import StreamSettings
from .state import StreamState
from .text import records_of

logger = logging.getLogger(__name__)

#: Silence of the input before its first byte after which the stream is over: a gateway starts the stream when the job
#: is accepted and publishes when its user connects, minutes later (protocol.md 3.4 step 5); the broker itself sweeps
#: idle channels after five.
FIRST_INPUT_S = 300.0

#: Time for what is decoded to leave through graph and encoder when the input is over (protocol.md 6.3).
DRAIN_S = 2.0

#: Longest wait of a control message for an engine that is loading.
CONTROL_WAIT_S = 60.0


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
        self._opening: asyncio.Timeout | None = None  # while channels are being opened
        self._channels = Channels(request)
        self._ledger = Ledger()
        self._mailbox = Mailbox(USUAL)
        budget_s = request.latency_budget_ms / 1000 if request.latency_budget_ms else settings.latency_budget_s
        self._sound = EngineSound(AudioGate())
        self._intake: Intake | None = None
        self._generator: Generator | None = None  # in the place of an input channel
        self._output: Output | None = None
        self._control: ControlUpdates | None = None
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
        self._admission = Admission(
            self._mailbox,
            self._sound,
            self._ledger,
            budget_s=budget_s,
            size=(request.width, request.height) if request.width and request.height else None,
            last_pts=None if kept is None else kept.position.pts,
            on_format=self._inference.set_format,
        )
        self._form = OutputForm(request, settings, self._inference, self._keeper)
        self._report = Report(settings.pipeline, self._inference, self._ledger, request.params, self._loop.time)

    # ---- life

    @property
    def ending(self) -> bool:
        """Whether it is on its way out; it takes no update any more and will soon make room."""
        return self._ended.is_set()

    def stop(self, reason: str, *, abandon_output: bool = False) -> None:
        """Ask the stream to end in order; `run` returns soon after.

        abandon_output: delete the output channel, so that the gateway looks for another worker at once.
        """
        self._channels.abandoned |= abandon_output
        self._end(reason)

    def _end(self, reason: str) -> None:
        if not self._ended.is_set():
            self.end_reason = reason
            logger.info("stream %s: ending: %s", self.stream_id, reason)
            self._ended.set()
            if self._opening is not None:
                self._opening.reschedule(self._loop.time())

    async def run(self) -> None:
        """Run until the stream is over. Never raises but CancelledError; `end_reason` says why it ended."""
        current_stream.set(self.stream_id)
        self._report.running = True
        try:
            await self._keeper.taken_up()
            async with contextlib.AsyncExitStack() as stack:
                await self._reasoned(self._open_unless_ended(stack))
                if not self.ending:
                    await self._reasoned(self._run_stages())
                self._settle_rest()  # the farewell, which goes out while channels close, has the account of frames
        except ChannelError as exc:
            # Of a channel that did not close cleanly; why the stream ended is known by now.
            logger.info("stream %s: %s", self.stream_id, exc)
        finally:
            self._keeper.forget()
            self._report.running = False
            self._settle_rest()
            logger.info("stream %s: ended: %s; frames %s", self.stream_id, self.end_reason, self._ledger.as_json())

    def _settle_rest(self) -> None:
        """Nobody shows what still waits."""
        for entry in self._mailbox.clear():
            self._ledger.settle(Outcome.DROPPED, entry.reason or "stream_ended")

    async def _reasoned(self, part: Coroutine[Any, Any, None]) -> None:
        """Run a part of the stream's life; what it raises becomes the reason of the end, and is known before the
        channels close: they carry the farewell, and the output channel goes with a failure of ours."""
        try:
            await part
        except* ChannelClosed as group:
            self._end(f"a channel is over: {_first(group)}")
        except* Exception as group:  # any stage may fail in any way; the stream ends, the shim lives on
            self._channels.abandoned = True
            logger.exception("stream %s failed", self.stream_id, exc_info=group)
            self._events.error("stream_failed", f"the stream failed: {_first(group)}")
            self._end(f"failed: {_first(group)}")

    async def _open_unless_ended(self, stack: contextlib.AsyncExitStack) -> None:
        """A broker that does not answer is waited for 30 s; whoever stops the stream meanwhile need not wait."""
        try:
            async with asyncio.timeout(None) as self._opening:
                await self._open(stack)
        except TimeoutError:
            if not self.ending:
                raise
        finally:
            self._opening = None

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        """Open every channel that the request names, and make what reads and writes them; the stack closes all of it
        in the reverse order."""
        request, channels = self.request, self._channels
        await channels.open_outgoing(stack, self._events, self._say_farewell)
        self._output = self._report.output = Output(
            channels.output,
            self._mailbox,
            self._sound.out,
            self._ledger,
            settings=self._form.encoder_settings,
            fallback=self._fallback,
            before_first=self._form.size_known,
            on_first_segment=lambda: self._events.trace("runner_send_first_processed_segment"),
            before_pictures=self._keeper.before_pictures,
            missing=self._admission.pause.missing,
            name=self.stream_id,
        )
        stack.push_async_callback(self._output.close)
        await channels.open_incoming(stack, self._keeper.control_start)
        if channels.input is not None:
            self._intake = Intake(
                channels.input,
                size=self._admission.size,
                on_picture=self._admission.picture,
                on_sound=self._admission.sound,
                on_first_segment=lambda: self._events.trace("runner_receive_first_ingest_segment"),
                moved=lambda: self._admission.pause.offset,
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
            self._generator = Generator(
                self._admission.size, request.max_framerate, self._admission.picture, self._keeper.first_pts
            )
        if channels.control is not None:
            self._control = ControlUpdates(channels.control, self._update_when_possible, self._events)
        self._report.intake = self._form.source = self._keeper.intake = self._source
        self._keeper.control = self._control
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
            if self._channels.output is not None:
                listeners.append(begin(self._watch_output(self._channels.output), "output channel"))
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
            if self._channels.data is not None:  # text of frames that went out already
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

    @property
    def _source(self) -> Intake | Generator | None:
        return self._intake or self._generator

    def _on_text(self, item: pb.TextItem) -> None:
        if self._channels.data is not None:
            for record in records_of(item):
                self._channels.data.put(record)

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
                self._admission.pacer.budget_s = self._inference.traffic.budget_s = update.latency_budget_ms / 1000
                self._keeper.asked(latency_budget_ms=update.latency_budget_ms)
            if update.fallback is not None:
                self._fallback.policy = Policy(update.fallback)
                self._keeper.asked(fallback=update.fallback)
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
        wanted, size = (update.width, update.height), self._admission.size
        if None not in wanted and size is not None and wanted != size:
            width, height = size
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


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
