"""The shim as a program: everything it owns, opened in order and closed in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from .app import CONNECTIONS, create_app
from .config import SettingsError
from .engine_client import EngineClient
from .errors import MalformedRequest
from .json_text import read_json
from .media.hardware import Codecs, probe
from .orchestrator.byoc import ByocRegistration
from .orchestrator.registrar import Registrar, RegistrarTiming
from .routes.context import CONTEXT, Context
from .settings import Settings
from .stream.fallback import Policy
from .stream.journal import Journal
from .stream.manager import Streams
from .stream.settings import StreamSettings
from .trickle.connection import on_loop_error

logger = logging.getLogger(__name__)

#: For a GPU's driver to wake, encode and decode.
_PROBE_S = 5.0

#: For requests that run when the server stops; streams have ended by then.
_REQUEST_GRACE_S = 2.0


@dataclass(frozen=True)
class Shim:
    """A shim that listens."""

    settings: Settings
    streams: Streams
    engines: tuple[EngineClient, ...]
    registrar: Registrar | None
    context: Context
    port: int  # really bound

    @property
    def url(self) -> str:
        """Without trailing slash."""
        return self.settings.local_url(self.port)


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Shim]:
    """Run the whole shim; leaving stops it in the order that loses least.

    Up: engine clients (no engine need be there), streams, HTTP, and only when that listens, the registration.
    Down: the registration goes first so that nothing more is sent, then streams get ``drain_s`` to end, then HTTP.
    """
    workflow = _default_workflow(settings)
    observers: list[Callable[[], object]] = []

    def changed() -> None:
        for observer in observers:
            observer()

    asyncio.get_running_loop().set_exception_handler(on_loop_error)
    codecs = await _codecs(settings)
    async with contextlib.AsyncExitStack() as stack:
        engines = tuple(
            [
                await stack.enter_async_context(
                    EngineClient(address, share_memory=settings.lane == "auto", on_change=changed)
                )
                for address in settings.engine_addresses
            ]
        )
        journal = Journal.open(settings.run_dir)
        left = []
        if journal is not None:
            stack.callback(journal.close)
            left = journal.read()
        streams = await stack.enter_async_context(
            Streams(
                engines,
                capacity=settings.capacity,
                settings=StreamSettings(
                    latency_budget_s=settings.latency_budget_ms / 1000,
                    fallback=Policy(settings.fallback),
                    pipeline=settings.pipeline,
                    input_timeout_s=settings.input_timeout_s,
                    preset=settings.encoder_preset,
                    bit_rate=settings.bit_rate or None,
                    codecs=codecs,
                    codec_threads=settings.codec_threads,
                    capacity=settings.capacity,
                ),
                default_workflow=workflow,
                on_change=changed,
                journal=journal,
            )
        )
        app = create_app(settings, streams, engines)
        context = app[CONTEXT]
        context.codecs = str(codecs)
        observers.append(context.facts)
        port = await stack.enter_async_context(_listening(app, settings))
        # After the port, which tells whether it is ours to go on; before any request, which takes a turn of the loop.
        streams.take_up(left, settings.resume_within_s)
        stack.push_async_callback(streams.drain, settings.drain_s)
        registrar = None
        if settings.orch_url:
            http = await stack.enter_async_context(aiohttp.ClientSession())
            registrar = Registrar(
                ByocRegistration(http, settings, settings.public_url(port)),
                ready=lambda: context.facts().engine == "READY" and not context.draining,
                idle=lambda: not streams.active,
                timing=RegistrarTiming(again_s=settings.reregister_s),
                known=bool(left),
            )
            observers.append(registrar.look)
            context.on_unauthorized = registrar.again
            await stack.enter_async_context(registrar)
        stack.callback(setattr, context, "draining", True)
        yield Shim(settings, streams, engines, registrar, context, port)


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run until ``stop`` is set."""
    async with running(settings) as shim:
        logger.info(
            "listening on %s, capacity %d, engines %s",
            shim.url,
            settings.capacity,
            ", ".join(settings.engine_addresses),
        )
        await stop.wait()
        logger.info("stopping: %d streams", len(shim.streams.active))
    logger.info("stopped")


@contextlib.asynccontextmanager
async def _listening(app: web.Application, settings: Settings) -> AsyncIterator[int]:
    """Serve ``app``; gives the bound port."""
    options: dict[str, Any] = {} if settings.access_log else {"access_log": None}
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=_REQUEST_GRACE_S, **options)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.listen_host, settings.listen_port).start()
        async with app[CONNECTIONS].watched(runner):
            yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def _codecs(settings: Settings) -> Codecs:
    """What this machine encodes and decodes with. A driver that does not answer must not hold up the start."""
    probing = asyncio.ensure_future(asyncio.to_thread(probe, settings.codec))  # type: ignore[arg-type]
    done, _ = await asyncio.wait({probing}, timeout=_PROBE_S)
    codecs = probing.result() if done else Codecs(reason=f"the GPU's driver did not answer within {_PROBE_S:.0f} s")
    logger.info("codecs: %s", codecs)
    return codecs


def _default_workflow(settings: Settings) -> dict[str, Any] | None:
    if settings.default_workflow is None:
        return None
    try:
        workflow = read_json(settings.default_workflow.read_bytes())
    except (OSError, MalformedRequest) as exc:
        raise SettingsError([f"default_workflow {settings.default_workflow} cannot be read: {exc}."]) from exc
    if not isinstance(workflow, dict):
        raise SettingsError([f"default_workflow {settings.default_workflow} holds no workflow: not a JSON object."])
    return workflow
