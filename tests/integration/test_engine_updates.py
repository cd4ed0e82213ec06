"""Parameters of a running session: all or nothing, between two frames, with the version in every result."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from proto import engine_pb2 as pb
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.engine_client import Client, Process, connected, eventually, grey, running_engine, settings_for

FRAME = grey(64, 48, 16)


def override(node_id: str, name: str, value: Any) -> pb.NodeOverride:
    return pb.NodeOverride(node_id=node_id, input=name, value_json=json.dumps(value))


async def update(client: Client, **fields: Any) -> pb.UpdateSessionResponse:
    fields.setdefault("session_id", "s")
    response: pb.UpdateSessionResponse = await client.stub.UpdateSession(pb.UpdateSessionRequest(**fields))
    return response


async def level(process: Process, frame_id: int) -> int:
    await process.frame(frame_id, FRAME)
    return (await process.result(frame_id)).picture.planes[0]


def violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    status = rpc_status.from_call(error)
    found: dict[str, str] = {}
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            found |= {violation.field: violation.description for violation in bad.field_violations}
    return found


async def test_override_holds_from_the_frame_that_the_answer_names(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(5), session_id="s")
        assert await level(process, 0) == 5
        waiting = asyncio.create_task(update(client, overrides=[override("5", "level", 77)]))
        number = 0
        while not waiting.done():
            number += 1
            await level(process, number)
        answer = waiting.result()
        assert answer.version == 2
        for result in process.results.values():
            expected = (77, 2) if result.pts >= answer.effective_pts else (5, 1)
            assert (result.picture.planes[0], result.version) == expected
        assert len(backend.graphs) == 1, "an override must keep the loaded graph"


async def test_running_frame_keeps_the_parameters_it_began_with(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(5), session_id="s")
        backend.gate.clear()
        await process.frames(pb.Frame(frame_id=number, pts=number, planes=FRAME) for number in range(2))
        await asyncio.to_thread(backend.running.wait)
        waiting = asyncio.create_task(update(client, overrides=[override("5", "level", 6)]))
        await asyncio.sleep(0.05)
        backend.gate.set()
        await process.result(1)
        answer = await waiting
        made = [(process.results[n].version, process.results[n].picture.planes[0]) for n in range(2)]
        assert made[0] == (1, 5)
        assert made[1] in {(1, 5), (2, 6)}
        assert answer.HasField("effective_pts") is (made[1][0] == 2)


async def test_update_without_frames_is_answered_without_pts(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        await client.open(workflow_json=workflow(5), session_id="s")
        answer = await update(client, overrides=[override("5", "level", 6)])
        assert answer.version == 2
        assert not answer.HasField("effective_pts")


async def test_wrong_override_changes_nothing_and_names_every_field(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(5), session_id="s")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await update(
                client,
                overrides=[
                    override("5", "level", 256),
                    override("5", "mode", "fail"),
                    override("5", "strength", 1),
                    override("77", "level", 1),
                ],
            )
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert set(violations(caught.value)) == {"nodes.5.inputs.level", "nodes.5.inputs.strength", "nodes.77"}
        assert await level(process, 0) == 5
        assert process.results[0].version == 1


@pytest.mark.parametrize("value_json", ["", "{", "nope"])
async def test_override_that_is_no_json_is_refused(tmp_path: Path, value_json: str) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        await client.open(workflow_json=workflow(5), session_id="s")
        wrong = pb.NodeOverride(node_id="5", input="level", value_json=value_json)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await update(client, overrides=[wrong])
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert set(violations(caught.value)) == {"nodes.5.inputs.level"}


async def test_dry_run_checks_and_changes_nothing(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(5), session_id="s")
        assert (await update(client, overrides=[override("5", "level", 6)], dry_run=True)).version == 1
        assert (await update(client, workflow_json=workflow(8), dry_run=True)).version == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await update(client, workflow_json=workflow(8).replace("Level", "Nivel"), dry_run=True)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert await level(process, 0) == 5
        assert len(backend.graphs) == 1


async def test_expected_version_that_is_over_is_aborted(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        await client.open(workflow_json=workflow(5), session_id="s")
        assert (await update(client, overrides=[override("5", "level", 6)], expected_version=1)).version == 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await update(client, overrides=[override("5", "level", 7)], expected_version=1)
        assert caught.value.code() is grpc.StatusCode.ABORTED


async def test_failing_update_is_reverted_and_both_sides_hear_of_it(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(5), session_id="s")
        assert await level(process, 0) == 5
        waiting = asyncio.create_task(update(client, overrides=[override("5", "mode", "fail")]))
        number = 0
        while not waiting.done():
            number += 1
            await process.frame(number, FRAME)
            await process.result(number)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await waiting
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "told to" in str(caught.value.details())
        assert [fault.code for fault in process.faults] == ["node_failed", "update_reverted"]
        assert await level(process, 1000) == 5
        assert process.results[1000].version == 3
        description = await client.stub.DescribeSession(pb.DescribeSessionRequest(session_id="s"))
        assert json.loads(description.workflow_json)["5"]["inputs"]["mode"] == "paint"


async def test_workflow_swaps_at_a_frame_boundary_and_the_old_graph_is_freed(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(session_id="s")
        assert await level(process, 0) == 16
        for number, wanted in ((1, 50), (2, 60)):
            answer = await update(client, workflow_json=workflow(wanted))
            assert answer.version == number + 1
            assert await level(process, number) == wanted
        assert (await update(client, workflow_json=workflow(60), overrides=[override("5", "level", 61)])).version == 4
        assert await level(process, 3) == 61
        await process.end_input()
        await process.to_end()

        async def all_closed() -> bool:
            return all(graph.closed for graph in backend.graphs)

        await eventually(all_closed)
        assert len(backend.graphs) == 3


async def test_workflow_that_fails_its_warm_up_leaves_the_old_one(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(5), session_id="s")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await update(client, workflow_json=workflow(mode="fail"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert violations(caught.value) == {"nodes.5": "told to"}
        assert await level(process, 0) == 5


async def test_description_has_types_ranges_and_values(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        await client.open(workflow_json=workflow(5), session_id="s")
        description = await client.stub.DescribeSession(pb.DescribeSessionRequest(session_id="s"))
        found = {(item.node_id, item.definition.name): item for item in description.parameters}
        item = found["5", "level"]
        assert (item.title, item.value_json, item.definition.type) == ("The level", "5", "INT")
        assert (item.definition.minimum, item.definition.maximum) == (0, 255)
        assert found["5", "image"].linked
        assert found["5", "image"].value_json == ""


async def test_unknown_session_is_not_found(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        for call in (
            client.stub.UpdateSession(pb.UpdateSessionRequest(session_id="nobody")),
            client.stub.DescribeSession(pb.DescribeSessionRequest(session_id="nobody")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
