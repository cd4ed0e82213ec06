"""An engine without ComfyUI, over a real Unix socket, with a client that has only the generated code."""

from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto import VERSION, WIRE_VERSION
from proto import engine_pb2 as pb
from tests.fakes.engine_client import connected, grey, running_engine, settings_for

WIDTH, HEIGHT = 64, 48


async def test_every_frame_comes_back_as_it_went(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(WIDTH, HEIGHT, session_id="a")
        assert process.opened is not None
        assert process.opened.runner == "pass_through"
        assert process.credits >= 2
        for number in range(200):
            while process.credits == 0:
                await process.until("results")
            await process.frame(number, grey(WIDTH, HEIGHT, number), pts=number * 3003)
        await process.end_input()
        await process.to_end()
        assert process.order == list(range(200))
        for number, result in process.results.items():
            assert result.pts == number * 3003
            assert result.picture.planes == grey(WIDTH, HEIGHT, number)
            assert (result.picture.width, result.picture.height, result.version) == (WIDTH, HEIGHT, 1)


async def test_server_says_what_it_is_and_how_to_get_comfyui(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        info = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.version, info.wire_version) == (VERSION, WIRE_VERSION)
        assert info.comfyui.state == pb.ComfyUI.STATE_ABSENT
        assert "run make comfyui, or set COMFYUI_DIR to your ComfyUI" in info.comfyui.detail
        assert info.limits.max_sessions == settings.max_sessions
        health = health_pb2_grpc.HealthStub(client.channel)
        serving = {
            name: (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
            for name in ("", "headrace.engine.v1.Engine", "comfyui")
        }
        assert serving[""] == serving["headrace.engine.v1.Engine"] == health_pb2.HealthCheckResponse.SERVING
        assert serving["comfyui"] == health_pb2.HealthCheckResponse.NOT_SERVING
