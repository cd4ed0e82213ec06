"""Registration against an orchestrator that forgets, refuses and is away (protocol.md 3.1, 3.2, 7.38 to 7.40)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from gateway_shim.engine_client import EngineState
from gateway_shim.localnet.orchestrator import Orchestrator, OrchestratorPanic, WorkerRefused
from gateway_shim.orchestrator import ai_models
from gateway_shim.orchestrator.byoc import ByocRegistration, RegistrationFailed, RegistrationRefused
from gateway_shim.orchestrator.registrar import Registrar, RegistrarTiming, RegistrationState
from gateway_shim.routes.context import CONTEXT
from gateway_shim.settings import Settings
from tests.fakes.worker import worker

QUICK = RegistrarTiming(again_s=0.05, first_retry_s=0.02, longest_retry_s=0.1, refused_retry_s=0.02, dropped_s=0.02)
ONCE = RegistrarTiming(again_s=3600, first_retry_s=0.02, refused_retry_s=3600, dropped_s=0.02)


class Shim:
    """Readiness and idleness by hand."""

    def __init__(self, registrar: Registrar) -> None:
        self.registrar = registrar
        self.ready = True
        self.idle = True

    def become(self, *, ready: bool = True, idle: bool = True) -> None:
        self.ready, self.idle = ready, idle
        self.registrar.look()


@contextlib.asynccontextmanager
async def registering(
    url: str, timing: RegistrarTiming = ONCE, *, ready: bool = True, **settings: str | int
) -> AsyncIterator[Shim]:
    async with aiohttp.ClientSession() as http:
        registration = ByocRegistration(http, Settings(orch_url=url, **settings), "http://10.0.0.5:8188/")  # type: ignore[arg-type]
        registrar = Registrar(registration, ready=lambda: shim.ready, idle=lambda: shim.idle, timing=timing)
        shim = Shim(registrar)
        shim.ready = ready
        async with registrar:
            yield shim


async def reached(state: RegistrationState, shim: Shim) -> None:
    async with asyncio.timeout(20):
        await shim.registrar.reached(state)


async def test_the_body_has_exactly_the_keys_of_the_contract() -> None:
    settings: dict[str, str | int] = {
        "orch_secret": "hush",
        "auth_token": "s3cret",
        "capability_name": "blur",
        "capability_description": "blurs",
        "capacity": 3,
        "capability_price_per_unit": 5,
        "capability_price_scaling": 10,
    }
    async with Orchestrator(secret="hush") as orchestrator, registering(orchestrator.url, **settings):
        registered = await orchestrator.registered("blur")
        assert registered.body == {
            "name": "blur",
            "description": "blurs",
            "url": "http://10.0.0.5:8188",
            "capacity": 3,
            "price_per_unit": 5,
            "price_scaling": 10,
            "currency": "wei",
            "token": "s3cret",
        }


async def test_without_a_token_none_is_sent_and_without_a_secret_no_header() -> None:
    async with Orchestrator() as orchestrator, registering(orchestrator.url):
        assert "token" not in (await orchestrator.registered("comfystream")).body


async def test_registers_only_once_the_engine_is_ready() -> None:
    async with Orchestrator() as orchestrator, registering(orchestrator.url, QUICK, ready=False) as shim:
        shim.registrar.look()
        await asyncio.sleep(0.1)
        assert orchestrator.registrations == 0
        assert shim.registrar.state is RegistrationState.WAITING
        shim.become(ready=True)
        await orchestrator.registered("comfystream")


async def test_unregisters_by_plain_name_at_the_end() -> None:
    async with Orchestrator(secret="hush") as orchestrator:
        async with registering(orchestrator.url, orch_secret="hush"):
            await orchestrator.registered("comfystream")
        assert not orchestrator.capabilities


async def test_an_orchestrator_that_restarts_knows_us_again() -> None:
    async with Orchestrator() as orchestrator, registering(orchestrator.url, QUICK):
        first = await orchestrator.registered("comfystream")
        await orchestrator.restart()
        assert await orchestrator.registered("comfystream", after=first) is not first


async def test_never_registers_again_while_a_stream_runs() -> None:
    async with Orchestrator() as orchestrator, registering(orchestrator.url, QUICK) as shim:
        await orchestrator.registered("comfystream")
        shim.become(idle=False)
        await asyncio.sleep(0.05)  # one that was under way may still arrive
        registrations = orchestrator.registrations
        await asyncio.sleep(0.3)
        assert orchestrator.registrations == registrations
        shim.become(idle=True)
        await orchestrator.registered("comfystream", after=orchestrator.capabilities["comfystream"])


async def test_goes_on_until_the_orchestrator_appears(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    async with registering(f"http://127.0.0.1:{port}", QUICK) as shim:
        await reached(RegistrationState.FAILING, shim)
        await asyncio.sleep(0.3)  # several attempts
        assert len([record for record in caplog.records if "cannot register" in record.message]) == 1
        async with Orchestrator(port=port) as orchestrator:
            await orchestrator.registered("comfystream")
            await reached(RegistrationState.REGISTERED, shim)


async def test_a_wrong_secret_is_an_error_for_people_and_tried_again_slowly(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        Orchestrator(secret="right") as orchestrator,
        registering(orchestrator.url, QUICK, orch_secret="wrong") as shim,
    ):
        await orchestrator.registration_refused(times=3)
        assert shim.registrar.state is RegistrationState.REFUSED
        (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert "invalid authorization" in record.message
        assert "ORCH_SECRET" in record.message
        assert "wrong" not in record.message
        orchestrator.secret = "wrong"
        await reached(RegistrationState.REGISTERED, shim)
        assert shim.registrar.last_error == ""


async def test_a_currency_without_price_feed_is_a_dropped_connection_and_retried() -> None:
    async with (
        Orchestrator() as orchestrator,
        registering(orchestrator.url, QUICK, capability_currency="usd") as shim,
    ):
        await orchestrator.registration_refused(times=2)
        await reached(RegistrationState.FAILING, shim)
        assert not orchestrator.capabilities


async def test_shutdown_is_not_held_up_by_an_orchestrator_that_does_not_answer() -> None:
    called = asyncio.Event()

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    timing = RegistrarTiming(unregister_s=0.2)
    loop = asyncio.get_running_loop()
    async with server:
        async with registering(f"http://127.0.0.1:{port}", timing) as shim:
            await called.wait()
            began = loop.time()
        assert loop.time() - began < 5
        assert shim.registrar.state is RegistrationState.ENDED


async def test_a_redirect_or_a_server_error_is_not_taken_for_success() -> None:
    async with aiohttp.ClientSession() as http:
        for status, kind in ((302, RegistrationFailed), (500, RegistrationFailed), (404, RegistrationRefused)):
            server = await asyncio.start_server(_answering(status), "127.0.0.1", 0)
            async with server:
                url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
                with pytest.raises(kind):
                    await ByocRegistration(http, Settings(orch_url=url), "http://w").register()


def _answering(status: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d X\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n" % status)
        writer.close()

    return answer


async def test_a_certificate_that_the_orchestrator_made_itself_is_accepted(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=orch", "-days", "1"]
    await asyncio.to_thread(
        subprocess.run, [*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    async with Orchestrator(tls=tls) as orchestrator, registering(orchestrator.url):
        assert orchestrator.url.startswith("https://")
        await orchestrator.registered("comfystream")


async def test_a_401_drops_the_capability_and_brings_it_back_once_idle() -> None:
    """The whole circle: register, a call with a stale token, removal by the orchestrator, registration again."""
    async with (
        worker(auth_token="fresh", capability_name="blur") as shim,
        Orchestrator() as orchestrator,
        aiohttp.ClientSession() as http,
    ):
        settings = Settings(orch_url=orchestrator.url, auth_token="fresh", capability_name="blur")
        registrar = Registrar(
            ByocRegistration(http, settings, shim.url), ready=lambda: True, idle=lambda: True, timing=ONCE
        )
        shim.app[CONTEXT].on_unauthorized = registrar.again
        async with registrar:
            first = await orchestrator.registered("blur")
            first.token = "stale"
            with pytest.raises(WorkerRefused) as refused:
                await orchestrator.start_stream()
            assert refused.value.answer.status == 401
            assert orchestrator.capabilities.get("blur") is not first
            await orchestrator.registered("blur", after=first)
            stream = await orchestrator.start_stream()
            assert stream.id in shim.streams.active
            await stream.stop()


async def test_the_orchestrator_counts_load_as_the_original_does() -> None:
    async with worker(capacity=1) as shim, Orchestrator() as orchestrator, aiohttp.ClientSession() as http:
        registration = ByocRegistration(http, Settings(orch_url=orchestrator.url), shim.url)
        await registration.register()
        capability = orchestrator.capabilities["comfystream"]
        stream = await orchestrator.start_stream(params={"width": 64, "height": 64}, data=True)
        assert (capability.load, capability.free) == (1, 0)
        with pytest.raises(WorkerRefused) as refused:
            await orchestrator.start_stream()
        assert refused.value.answer.status == 503
        assert capability.load == 1
        assert set(shim.streams.active[stream.id].request.channels) == {
            "subscribe_url",
            "publish_url",
            "control_url",
            "events_url",
            "data_url",
        }
        update = await stream.update({"5": {"alpha": 2}})
        assert update is not None
        assert (update.status, update.body["version"]) == (200, 2)
        await registration.register()  # while busy: what the registrar never does
        await stream.stop(calls=3)
        assert orchestrator.capabilities["comfystream"].load == -1
        assert not shim.streams.active
        assert not orchestrator.broker.channels


async def test_ai_models_entry_passes_an_orchestrators_start() -> None:
    async with worker(capacity=2, auth_token="s3cret") as shim, Orchestrator() as orchestrator:
        settings = Settings(capability_url=shim.url, auth_token="s3cret", capacity=2)
        (entry,) = ai_models.entries(settings)
        assert entry == {
            "pipeline": "live-video-to-video",
            "model_id": "comfystream",
            "url": shim.url,
            "token": "s3cret",
            "price_per_unit": 0,
            "pixels_per_unit": 1,
            "warm": True,
            "capacity": 2,
        }
        answers = await orchestrator.add_model(entry)
        assert answers["health"] == {"status": "IDLE"}
        assert answers["version"]["model_id"] == entry["model_id"]
        assert answers["version"]["pipeline"] == entry["pipeline"]
        stream = await orchestrator.start_stream("live", params={})
        assert stream.id in shim.streams.active
        await orchestrator.start_stream("live")
        with pytest.raises(WorkerRefused) as refused:
            await orchestrator.start_stream("live")
        assert refused.value.answer.status == 500
        assert "insufficient capacity" in refused.value.answer.body["detail"]["msg"]


async def test_an_orchestrator_would_exit_on_a_worker_in_error() -> None:
    async with worker() as shim, Orchestrator() as orchestrator:
        now = 0.0
        context = shim.app[CONTEXT]
        context._clock = lambda: now
        shim.engine.state = EngineState.DEAD
        (entry,) = ai_models.entries(Settings(capability_url=shim.url))
        await orchestrator.add_model(entry)
        now = 1000.0
        with pytest.raises(OrchestratorPanic):
            await orchestrator.add_model(entry)
