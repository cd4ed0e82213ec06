"""What the engine refuses, and how it says so; what it does while ComfyUI loads or when it failed to."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto import WIRE_VERSION
from proto import engine_pb2 as pb
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.engine_client import Client, connected, eventually, grey, running_engine, settings_for
from tests.integration.test_engine_updates import violations

HOW = "run make comfyui, or set COMFYUI_DIR to your ComfyUI"
SOUND = pb.AudioFormat(sample_rate=48000, channels=2)
AUDIO = json.dumps(
    {
        "1": {"class_type": "LoadAudioTensor", "inputs": {}},
        "2": {"class_type": "SaveAudioTensor", "inputs": {"audio": ["1", 0]}},
    }
)


def video(**changes: Any) -> pb.VideoFormat:
    return pb.VideoFormat(**{"width": 64, "height": 48} | changes)


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"video": video(width=63)}, grpc.StatusCode.INVALID_ARGUMENT, "video.width"),
        ({"video": video(height=0)}, grpc.StatusCode.INVALID_ARGUMENT, "video.height"),
        ({"video": video(width=8192)}, grpc.StatusCode.INVALID_ARGUMENT, "video.width"),
        ({"video": video(time_base=pb.Rational(numerator=1))}, grpc.StatusCode.INVALID_ARGUMENT, "video.time_base"),
        ({"video": video(pixel_format=9)}, grpc.StatusCode.INVALID_ARGUMENT, "video.pixel_format"),
        ({"video": None}, grpc.StatusCode.INVALID_ARGUMENT, "video"),
        ({"session_id": "with space"}, grpc.StatusCode.INVALID_ARGUMENT, "session_id"),
        ({"workflow_json": "{"}, grpc.StatusCode.INVALID_ARGUMENT, "workflow_json"),
        ({"video": None, "audio": SOUND}, grpc.StatusCode.INVALID_ARGUMENT, "video"),
        ({"video": None, "workflow_json": AUDIO}, grpc.StatusCode.FAILED_PRECONDITION, "nodes.1"),
        ({"workflow_json": workflow().replace("Level", "Nivel")}, grpc.StatusCode.FAILED_PRECONDITION, "nodes.5"),
        ({"workflow_json": workflow(mode="fail")}, grpc.StatusCode.FAILED_PRECONDITION, "nodes.5"),
        ({"wire_version": WIRE_VERSION + 1}, grpc.StatusCode.FAILED_PRECONDITION, None),
        ({"audio": pb.AudioFormat(sample_rate=48000)}, grpc.StatusCode.INVALID_ARGUMENT, "audio.channels"),
        ({"audio": pb.AudioFormat(sample_rate=1, channels=2)}, grpc.StatusCode.INVALID_ARGUMENT, "audio.sample_rate"),
    ],
)
async def test_open_is_refused_with_the_field(
    tmp_path: Path, fields: dict[str, Any], code: grpc.StatusCode, field: str | None
) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, StubBackend()) as server, connected(settings.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.open(**{"video": video()} | fields)
        assert caught.value.code() is code
        if field is not None:
            assert field in violations(caught.value)
        assert not server.engine.sessions
        # Nothing of the refused one stands in the way of the next.
        process = await client.open(session_id=str(fields.get("session_id", "x")).replace(" ", ""))
        await process.frame(0, grey(64, 48, 1))
        assert (await process.result(0)).HasField("picture")


async def test_frames_before_open_are_refused(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = client.process()
        await process.frame(0, b"")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.to_end()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        empty = client.process()
        await empty.call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await empty.to_end()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_second_open_ends_the_call_and_answers_its_frames(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow())
        backend.gate.clear()
        await process.frame(0, grey(64, 48, 1))
        await asyncio.to_thread(backend.running.wait)
        await process.send(pb.ProcessRequest(open=pb.OpenSession(video=video())))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.to_end()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert process.results[0].dropped.reason == pb.Dropped.REASON_CLOSED
        backend.gate.set()


async def test_session_id_and_capacity_are_kept(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, max_sessions=2)
    async with running_engine(settings), connected(settings.address) as client:
        await client.open(session_id="a")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.open(session_id="a")
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        chosen = await client.open()
        assert chosen.session_id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.open(session_id="c")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_without_comfyui_every_other_workflow_is_refused_with_the_remedy(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.open(workflow_json=workflow())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert HOW in str(caught.value.details())
        process = await client.open(session_id="s")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.stub.UpdateSession(pb.UpdateSessionRequest(session_id="s", workflow_json=workflow()))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert HOW in str(caught.value.details())
        checked = await client.stub.CheckWorkflow(pb.CheckWorkflowRequest(workflow_json=workflow()))
        assert not checked.runnable
        assert [(item.code, item.remedy) for item in checked.findings] == [("no_comfyui", HOW)]
        assert (await client.stub.CheckWorkflow(pb.CheckWorkflowRequest())).runnable
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.stub.ListNodes(pb.ListNodesRequest())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await process.end_input()
        await process.to_end()


async def test_while_comfyui_loads_sessions_wait_with_progress_and_pass_through_runs(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    backend.may_load.clear()
    async with running_engine(settings, backend), connected(settings.address) as client:
        info = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.comfyui.state == pb.ComfyUI.STATE_LOADING
        health = health_pb2_grpc.HealthStub(client.channel)
        request = health_pb2.HealthCheckRequest(service="headrace.engine.v1.Engine")
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.stub.ListNodes(pb.ListNodesRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

        through = await client.open()
        await through.frame(0, grey(64, 48, 1))
        assert (await through.result(0)).HasField("picture")

        process = client.process()
        await process.send(pb.ProcessRequest(open=pb.OpenSession(video=video(), workflow_json=workflow())))
        first = await process.read()
        assert first is not None
        assert first.progress.stage == pb.Progress.STAGE_LOADING
        assert process.credits == 0
        backend.may_load.set()
        await process.until("opened")
        assert process.credits > 0
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        info = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.comfyui.state, info.comfyui.version) == (pb.ComfyUI.STATE_READY, "0.0.1")
        assert (info.comfyui.node_classes, list(info.comfyui.failed_packs)) == (3, ["broken_pack"])
        nodes = (await client.stub.ListNodes(pb.ListNodesRequest(class_prefix="Le"))).nodes
        assert [node.class_type for node in nodes] == ["Level"]
        assert [item.name for item in nodes[0].inputs] == ["image", "level", "mode"]


async def test_client_that_leaves_while_it_waits_for_comfyui_frees_its_place(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path, max_sessions=1), StubBackend()
    backend.may_load.clear()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = client.process()
        await process.send(pb.ProcessRequest(open=pb.OpenSession(video=video(), workflow_json=workflow())))
        await process.until("progress")
        process.call.cancel()
        while True:
            try:
                await client.open()
                break
            except grpc.aio.AioRpcError as exc:
                assert exc.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
        backend.may_load.set()


async def test_comfyui_that_does_not_load_is_named_and_pass_through_runs(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    backend.load_error = ImportError("no module named einops")
    async with running_engine(settings, backend), connected(settings.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.open(workflow_json=workflow())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "no module named einops" in str(caught.value.details())
        assert HOW in str(caught.value.details())
        info = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.comfyui.state == pb.ComfyUI.STATE_FAILED
        assert "einops" in info.comfyui.detail
        process = await client.open()
        await process.frame(0, grey(64, 48, 1))
        assert (await process.result(0)).HasField("picture")


async def test_shared_memory_that_cannot_be_had_is_not_agreed(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(session_id="s", shared_memory=pb.SharedMemory(version=1))
        assert process.opened is not None
        assert not process.opened.shared_memory


async def test_4k_frames_fit_into_messages(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(3840, 2160, max_batch=2)
        planes = bytes(3840 * 2160 * 3 // 2)
        await process.frames(pb.Frame(frame_id=number, planes=planes) for number in range(2))
        assert len((await process.result(1)).picture.planes) == len(planes)


@pytest.mark.parametrize("data", [b"\x12\xff\xff\xff\xff\x0f", b"\x12\x04\x0a\x02\x08\x80", b"\xff" * 40])
async def test_bytes_that_are_no_message_end_the_call(tmp_path: Path, data: bytes) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        raw = client.channel.stream_stream("/headrace.engine.v1.Engine/Process")
        call = raw()
        video = pb.VideoFormat(width=64, height=48)
        await call.write(pb.ProcessRequest(open=pb.OpenSession(session_id="s", video=video)).SerializeToString())
        await call.read()
        await call.write(data)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "ProcessRequest" in await call.details()
        assert (await client.open(session_id="s")).credits, "the session is closed, and its name free again"


async def test_check_takes_overrides_as_a_session_does(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, StubBackend()), connected(settings.address) as client:

        async def check(name: str, value: str) -> pb.CheckWorkflowResponse:
            override = pb.NodeOverride(node_id="5", input=name, value_json=value)
            request = pb.CheckWorkflowRequest(workflow_json=workflow(), overrides=[override])
            answer: pb.CheckWorkflowResponse = await client.stub.CheckWorkflow(request)
            return answer

        await eventually(lambda: ready(client))
        answer = await check("level", "9")
        assert answer.runnable
        assert '"level": 9' in answer.workflow_json
        for name, value in (("nothing", "1"), ("level", "256")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(name, value)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"nodes.5.inputs.{name}" in str(caught.value.details())


async def ready(client: Client) -> bool:
    info = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
    return bool(info.comfyui.state == pb.ComfyUI.STATE_READY)
