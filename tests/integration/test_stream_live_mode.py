"""Mode A, the external container of ``aiModels.json``, through the real shim: channels alone say what happens."""

import asyncio
from pathlib import Path

import pytest

from gateway_shim.localnet import probe
from gateway_shim.localnet.numbered import write_clip
from gateway_shim.localnet.orchestrator import Orchestrator
from gateway_shim.localnet.source import publish_file
from gateway_shim.orchestrator import ai_models
from gateway_shim.settings import Settings
from gateway_shim.shim import running
from gateway_shim.stream import events
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import Publisher
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.engine_client import running_engine, settings_for
from tests.fakes.network import network


async def test_start_update_and_end_by_channels_alone(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=90, width=64, height=64)
    engine = settings_for(tmp_path)
    settings = Settings(
        listen_port=0, drain_s=0.0, run_dir=tmp_path, engine_address=engine.address, model_id="effect"
    )
    async with running_engine(engine, StubBackend()), Orchestrator() as orchestrator, running(settings) as shim:
        (entry,) = ai_models.entries(settings)
        handshake = await orchestrator.add_model({**entry, "url": shim.url})
        assert handshake["version"]["model_id"] == "effect"
        await shim.engines[0].ready()
        stream = await orchestrator.start_stream(mode="live", name="effect", params={"prompt": workflow(level=60)})
        async with open_http() as http:
            out = tmp_path / "out.ts"
            watching = asyncio.create_task(probe.Probe(http, stream.publish_url, out).run())
            async with Publisher(http, stream.subscribe_url, content_type="video/MP2T") as publisher:
                publishing = asyncio.create_task(publish_file(publisher, clip, loops=1))
                await stream.next_event("runner_send_first_processed_segment")
                await stream.write_control({"5": {"level": 200}})
                assert (await stream.next_event("params_updated"))["version"] == 2
                await publishing
            await stream.end_input()
            stopped = await stream.next_event("stream_stopped")
            await shim.streams.wait_idle()
            await stream.stop()
            await watching
    assert stopped["frames"]["received"] == stopped["frames"]["published"] == 90
    looks = [frame.to_ndarray(format="gray").mean() > 150 for _, frame in probe.pictures(out)]
    assert looks == sorted(looks)
    assert set(looks) == {False, True}


async def test_status_goes_on_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten seconds in life; the gateway gives a worker up after thirty without an event.
    assert events.STATUS_EVERY_S == 10.0
    monkeypatch.setattr(events, "STATUS_EVERY_S", 0.2)
    async with network(tmp_path) as net:
        stream = await net.start()
        async with asyncio.timeout(60):
            while sum(event["type"] == "status" for event in stream.events) < 4:  # noqa: ASYNC110  # counted, not one
                await asyncio.sleep(0.05)
