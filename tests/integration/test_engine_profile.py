"""ProfileSession: stage and node times of a session's next frames."""

import asyncio
import itertools
from pathlib import Path

import grpc
import pytest

from proto import engine_pb2 as pb
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.engine_client import Client, Process, connected, grey, running_engine, settings_for

FRAME = grey(64, 48, 16)


async def profile(client: Client, session_id: str, **fields: int) -> pb.SessionProfile:
    request = pb.ProfileSessionRequest(session_id=session_id, **fields)
    answer: pb.SessionProfile = await client.stub.ProfileSession(request)
    return answer


async def frames_until(
    process: Process, asked: asyncio.Task[pb.SessionProfile], most: int | None = None
) -> pb.SessionProfile:
    """most: frames that are sent; the answer is waited for without any more."""
    for number in itertools.count() if most is None else range(most):
        await process.frame(number, FRAME)
        await process.result(number)
        if asked.done():
            return asked.result()
    return await asked


async def test_profile_has_the_stages_and_nodes_of_as_many_frames_as_were_asked_for(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, StubBackend()), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(), session_id="s")
        found = await frames_until(process, asyncio.create_task(profile(client, "s", frames=5)))
        assert found.frames == 5
        stages = {stage.stage: stage for stage in found.stages}
        assert list(stages) == ["waiting", "convert_in", "graph", "convert_out"]
        assert (stages["graph"].mean_ms, stages["graph"].p95_ms) == (1.5, 1.5)
        assert stages["convert_in"].mean_ms == pytest.approx(0.15)
        assert stages["convert_out"].mean_ms == pytest.approx(0.05)
        (node,) = found.nodes
        assert (node.node_id, node.class_type, node.mean_ms) == ("5", "Level", 1.5)
        assert node.runs >= 5


async def test_two_who_ask_are_answered_one_after_the_other(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, StubBackend()), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(), session_id="s")
        both = [asyncio.create_task(profile(client, "s", frames=3)) for _ in range(2)]
        await frames_until(process, both[0])
        assert (await frames_until_from(process, both[1])).frames == 3


async def frames_until_from(process: Process, asked: asyncio.Task[pb.SessionProfile]) -> pb.SessionProfile:
    number = max(process.results)
    while not asked.done():
        number += 1
        await process.frame(number, FRAME)
        await process.result(number)
    return asked.result()


async def test_pass_through_has_no_nodes_and_too_few_frames_are_what_there_is(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(session_id="s")
        asked = asyncio.create_task(profile(client, "s", frames=1000, timeout_ms=300))
        found = await frames_until(process, asked, most=900)  # a quick machine makes a thousand in that time
        assert 0 < found.frames < 1000
        assert not found.nodes


async def test_session_that_ends_ends_its_profile(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(), session_id="s")
        asked = asyncio.create_task(profile(client, "s", timeout_ms=60_000))
        await process.frame(0, FRAME)
        await process.result(0)
        process.call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if (await asked).frames:  # it was asked in time
                raise grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), grpc.aio.Metadata())
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("fields", [{"frames": 1001}, {"timeout_ms": 60_001}])
async def test_profile_that_is_too_long_is_refused(tmp_path: Path, fields: dict[str, int]) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        await client.open(session_id="s")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await profile(client, "s", **fields)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
