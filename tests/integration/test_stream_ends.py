"""How streams end and what they hold meanwhile: reasons told, channels handed back, nothing unbounded."""

import asyncio
import json
import math
import socket
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from gateway_shim.localnet.numbered import write_clip
from gateway_shim.media.encode import Encoder
from gateway_shim.stream import channels, intake
from gateway_shim.trickle import publisher
from gateway_shim.trickle.publisher import Publisher
from gateway_shim.trickle.wire import ChannelClosed
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.network import CHANNELS, network


async def test_failure_of_ours_is_told_and_the_output_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[object]:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Encoder, "video", fail)
    clip = write_clip(tmp_path / "a.ts", frames=30)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish(clip)
        stopped = await stream.event("stream_stopped")
        await stream.event("error", reason="stream_failed")
        assert "no such luck" in stopped["message"]
        await net.shim.streams.wait_idle()
        assert "cam-out" not in net.broker.channels, "so that the gateway fails over at once"
        assert (await net.get("/health"))["status"] == "IDLE"


async def test_output_channel_that_ends_while_nothing_is_written_ends_the_stream(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.event("status")
        await net.broker.delete("cam-out")
        stopped = await stream.event("stream_stopped")
        await net.shim.streams.wait_idle()
    assert "output channel" in stopped["message"]


async def test_shutdown_hands_the_stream_over(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.event("status")
        await net.shim.streams.drain(0.0)
        assert "cam-out" not in net.broker.channels
        assert (await stream.event("stream_stopped"))["message"] == "this worker is shutting down"


async def test_start_right_after_a_stop_waits_for_the_end(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=30)
    async with network(tmp_path) as net:
        first = await net.start("one")
        await first.publish(clip)
        net.shim.streams.get("one").stop("told to")
        second = await net.start("two")
        assert net.shim.streams.get("two").stream_id == second.id


async def test_used_channel_is_resumed(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=60)
    async with network(tmp_path) as net:
        url = net.broker.create("cam-out", "video/MP2T")
        async with Publisher(net.http, url, content_type="video/MP2T") as before:
            for _ in range(7):
                await before.publish(b"of another worker")
        stream = await net.start()
        await stream.publish(clip)
        await stream.end_input()
        await net.shim.streams.wait_idle()
        assert net.broker.channels["cam-out"].next_write >= 8, "the write head did not go back"


@pytest.mark.parametrize("stream_id", ["my cam", "Kamera \u00fc", "x" * 200])
async def test_any_name_of_a_stream_is_processed(tmp_path: Path, stream_id: str) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=30)
    async with network(tmp_path) as net:
        out = net.broker.create("o", "video/MP2T")
        source = net.broker.create("i", "video/MP2T")
        body = {"gateway_request_id": stream_id, "subscribe_url": source, "publish_url": out}
        status, answer = await net.post("/stream/start", body)
        assert status == 200, answer
        async with Publisher(net.http, source, content_type="video/MP2T") as publisher:
            await publisher.publish(clip.read_bytes())
            session = net.shim.streams.get(stream_id)
            while session.status()["frames"]["processed"] < 30:  # noqa: ASYNC110  # a counter makes no event
                await asyncio.sleep(0.02)


async def test_many_updates_on_control_end_with_the_last(tmp_path: Path) -> None:
    async with network(tmp_path, backend=StubBackend()) as net:
        stream = await net.start(params={"prompts": json.loads(workflow(level=60))})
        # No frame flows, and with one each second would be the most that could be answered one by one.
        for level in range(100, 115):
            await stream.control({"5": {"level": level}})
        session = net.shim.streams.active["cam"]
        async with asyncio.timeout(30):
            while session.prompt["5"]["inputs"]["level"] != 114:  # noqa: ASYNC110  # nothing says when
                await asyncio.sleep(0.02)


async def test_update_before_the_first_frame_is_kept(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=30, width=64, height=64)
    async with network(tmp_path, backend=StubBackend()) as net:
        stream = await net.start(params={"prompts": json.loads(workflow(level=60))})
        status, answer = await net.post("/stream/params", {"5": {"level": 200}})
        assert (status, answer["version"], answer["effective_pts"]) == (200, 2, None)
        status, _ = await net.post("/stream/params", {"prompts": {"1": {"class_type": "Nope", "inputs": {}}}})
        assert status == 422
        # Refused as a session would: ComfyUI's own check lets inputs pass that no node has.
        for wrong, path in (({"nothing": 1}, "nothing"), ({"level": 256}, "level"), ({"level": "x"}, "level")):
            status, answer = await net.post("/stream/params", {"5": wrong})
            assert (status, answer["errors"][0]["path"]) == (422, f"nodes.5.inputs.{path}"), answer
        await stream.publish(clip)
        await stream.flow(1)
        status, answer = await net.post("/stream/params", {"5": {"level": 201}}, **{"If-Match": "2"})
        assert (status, answer["version"]) == (200, 3), "versions go on"
        assert net.shim.streams.active["cam"].prompt["5"]["inputs"]["level"] == 201


@pytest.mark.parametrize("message", ['{"5":{"\\ud800":1}}', '{"width":' + "[" * 500 + "]" * 500 + "}", '{"x":1e999}'])
async def test_control_message_that_is_no_text_does_not_hurt(tmp_path: Path, message: str) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=30)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.control(message.encode())
        await stream.control({"max_framerate": 30})
        await stream.event("params_updated")
        async with net.http.post(net.shim.url + "/stream/params", data=message.encode()) as response:
            assert response.status == 400
        await stream.publish(clip)
        await stream.end_input()
        assert (await stream.received()).numbers == list(range(30))


async def test_graph_that_hangs_holds_no_more_than_the_mailbox(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=200, width=64, height=64)
    backend = StubBackend()
    async with network(tmp_path, backend=backend, latency_budget_ms=100) as net:
        stream = await net.start(params={"prompts": json.loads(workflow(level=60))})
        backend.gate.clear()
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        await stream.flow(100)
        mailbox = net.shim.streams.active["cam"]._mailbox
        assert len(mailbox._unsent) <= len(mailbox) <= 60
        backend.gate.set()
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)


@pytest.mark.parametrize("cap", [24, 20, 15, 7])
def test_frame_rate_caps_are_met_not_halved(cap: int) -> None:
    thinned = intake.Intake.__new__(intake.Intake)
    thinned.max_framerate, thinned._due_pts = cap, None
    jitter = [0, 90, -90, 45]
    kept = [number for number in range(300) if thinned._is_due(number * 3000 + jitter[number % 4])]
    assert math.isclose(len(kept), cap * 10, abs_tol=cap * 0.1 + 1)


async def test_lost_segment_is_followed_by_another_at_once(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=150)
    async with network(tmp_path) as net:
        stream = await net.start()
        net.broker.faults.reset("POST", "cam-out", 1, after_bytes=2000)
        await stream.publish(clip, realtime=True)
        await stream.end_input()
        received = await stream.received()
        status = await stream.event("stream_stopped")
    lost = 150 - len(received.numbers)
    assert 0 < lost < 30, "less than the rest of the segment"
    assert status["frames"]["published"] < 150, "the ledger does not count what no channel took"


async def test_stop_whose_body_never_comes_stops(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.event("status")
        port = int(net.shim.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /stream/stop HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n")
        async with asyncio.timeout(20):
            assert b"200" in await reader.readline()
        writer.write(b"0123456789")
        writer.close()
        await writer.wait_closed()
        assert not net.shim.streams.active


async def test_page_of_another_origin_is_refused(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        await net.start()
        status, answer = await net.post("/stream/stop", None, Origin="https://evil.example")
        assert (status, answer["code"]) == (403, "cross_site")
        assert list(net.shim.streams.active) == ["cam"]


async def test_start_without_a_channel_takes_no_place(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        for path, body in (("/stream/start", {"gateway_request_id": "leak"}), ("/live-video-to-video", {})):
            status, _ = await net.post(path, body)
            assert status == 422, path
        assert not net.shim.streams.active


async def test_channel_that_was_never_there_refuses_nothing_but_the_stream(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        gone = net.broker.url + "/nobody"
        status, _ = await net.post("/stream/start", {"gateway_request_id": "cam", "publish_url": gone})
        assert status == 200
        await net.shim.streams.wait_idle()
        with pytest.raises(ChannelClosed):
            async with Publisher(net.http, gone, content_type="video/MP2T", resume=True) as publisher:
                await publisher.publish(b"x")


async def test_stop_does_not_wait_for_a_broker_that_is_not_there(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))  # and does not listen: refused
            url = f"http://127.0.0.1:{nobody.getsockname()[1]}/ai/trickle/cam"
            urls = {name: url + suffix for name, suffix in CHANNELS.items()}
            assert (await net.post("/stream/start", {"gateway_request_id": "cam", **urls}))[0] == 200
            session = net.shim.streams.active["cam"]
            async with asyncio.timeout(5):  # 30 s a channel before
                assert (await net.post("/stream/stop", {"gateway_request_id": "cam"}))[0] == 200
                await net.shim.streams.wait_idle()
            assert session.end_reason


async def test_broker_that_is_not_there_is_waited_for_once_and_not_by_each_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "PUBLISHER_TIMING", replace(channels.PUBLISHER_TIMING, unreachable_s=1.0))
    async with network(tmp_path) as net:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{nobody.getsockname()[1]}/ai/trickle/cam"
            urls = {name: url + suffix for name, suffix in CHANNELS.items()}
            assert (await net.post("/stream/start", {"gateway_request_id": "cam", **urls}))[0] == 200
            session = net.shim.streams.active["cam"]
            asked: list[str] = []
            real = publisher.send

            async def counted(http: aiohttp.ClientSession, method: str, at: str, **more: object) -> object:
                asked.append(at)
                return await real(http, method, at, **more)

            monkeypatch.setattr(publisher, "send", counted)
            await net.shim.streams.wait_idle()
            assert "unreachable" in session.end_reason
            assert {at.rpartition("/")[0].rpartition("/")[2] for at in asked} <= {"cam-events"}


async def test_account_of_the_farewell_has_nothing_in_flight_whatever_ended_the_stream(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=30, width=64, height=64)
    backend = StubBackend()
    async with network(tmp_path, backend=backend, latency_budget_ms=20_000) as net:
        stream = await net.start(params={"prompts": json.loads(workflow())})
        backend.gate.clear()
        try:
            await stream.publish(clip)
            await asyncio.to_thread(backend.running.wait)
            await net.broker.delete("cam-out")
            frames = (await stream.event("stream_stopped"))["frames"]
        finally:
            backend.gate.set()
        await net.shim.streams.wait_idle()
    assert frames["received"] > 0
    assert frames["in_flight"] == 0, frames
    assert frames["received"] == sum(frames[name] for name in ("processed", "failed", "passed_through", "dropped"))
