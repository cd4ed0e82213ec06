"""Sessions with graphs: credits, drops, failures, ends. Stub graphs, real gRPC."""

import asyncio
import itertools
from pathlib import Path

import grpc
import pytest

from engine import service
from engine.credits import PIPELINE_FRAMES
from engine.pace import VISIT_FRAMES
from proto import engine_pb2 as pb
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.engine_client import Client, connected, eventually, grey, running_engine, settings_for

WIDTH, HEIGHT = 64, 48
FRAME = grey(WIDTH, HEIGHT, 16)


async def in_flight(client: Client, session_id: str, count: int) -> None:
    """Until the session holds that many frames."""

    async def check() -> bool:
        return (await state(client, session_id)).frames_in_flight == count

    await eventually(check)


async def state(client: Client, session_id: str) -> pb.SessionState:
    listed = await client.stub.ListSessions(pb.ListSessionsRequest())
    return next(session for session in listed.sessions if session.session_id == session_id)


async def test_frames_go_through_the_graph_in_batches(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(9), max_batch=4, session_id="s")
        assert process.opened is not None
        assert process.opened.runner == "stub"
        assert process.credits == PIPELINE_FRAMES + 4
        assert [item.stage for item in process.progress][-1] == pb.Progress.STAGE_READY
        backend.gate.clear()
        await process.frame(0, FRAME)
        await asyncio.to_thread(backend.running.wait)
        await process.frames(pb.Frame(frame_id=number, pts=number, planes=FRAME) for number in range(1, 6))
        await in_flight(client, "s", 6)
        backend.gate.set()
        await process.end_input()
        await process.to_end()
        assert [frames for _, frames in backend.log] == [(0,), (1, 2, 3, 4), (5,)]
        assert process.order == [0, 1, 2, 3, 4, 5]
        result = process.results[5]
        assert (result.picture.planes[0], result.graph_us, result.convert_us, result.version) == (9, 1500, 200, 1)
        assert process.credits == PIPELINE_FRAMES + 4, "every credit came back"


async def test_frame_without_credit_is_dropped_and_costs_nothing(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(), session_id="s")
        granted = process.credits
        backend.gate.clear()
        await process.frames(pb.Frame(frame_id=number, planes=FRAME) for number in range(granted + 2))
        for number in (granted, granted + 1):
            assert (await process.result(number)).dropped.reason == pb.Dropped.REASON_NO_CREDIT
        backend.gate.set()
        await process.end_input()
        await process.to_end()
        made = [number for number, result in process.results.items() if result.HasField("picture")]
        assert sorted(made) == list(range(granted))
        # The client's own count went below zero for the two; the engine gave nothing back for them. As quick a graph
        # as the stub's has credits for whole visits.
        assert process.credits == granted + 2 * (VISIT_FRAMES - 1) - 2


async def test_frame_past_the_latency_budget_is_skipped(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(), session_id="s", latency_budget_ms=60_000)
        await process.frame(0, FRAME, age_ms=59_000)
        await process.frame(1, FRAME, age_ms=60_001)
        assert (await process.result(0)).HasField("picture")
        assert (await process.result(1)).dropped.reason == pb.Dropped.REASON_LATE
        await process.end_input()
        await process.to_end()


@pytest.mark.parametrize("planes", [b"", FRAME[:-1], FRAME + b"x"])
async def test_frame_of_wrong_size_fails_and_the_session_goes_on(tmp_path: Path, planes: bytes) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(WIDTH, HEIGHT)
        granted = process.credits
        await process.frame(0, planes)
        failed = (await process.result(0)).failed
        assert failed.code == "bad_frame"
        assert f"has {len(planes)} bytes" in failed.message
        await process.frame(1, FRAME)
        assert (await process.result(1)).picture.planes == FRAME
        assert process.credits == granted


async def test_frame_ids_have_to_grow(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(WIDTH, HEIGHT)
        await process.frame(5, FRAME)
        assert (await process.result(5)).HasField("picture")
        await process.frame(4, FRAME)
        assert "frame_id has to grow" in (await process.result(4)).failed.message


async def test_node_that_raises_fails_its_frames_only(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(), session_id="s")
        backend.graphs[0].run = _failing_once(backend.graphs[0].run)  # type: ignore[method-assign]
        await process.frame(0, FRAME)
        failed = (await process.result(0)).failed
        assert (failed.code, failed.node_id, failed.class_type) == ("node_failed", "5", "Level")
        assert (failed.exception, failed.message) == ("RuntimeError", "out of luck")
        assert process.faults == [failed]
        await process.frame(1, FRAME)
        assert (await process.result(1)).HasField("picture")
        counters = await state(client, "s")
        assert (counters.frames_failed, counters.frames_processed, counters.last_fault) == (1, 1, failed)


def _failing_once(run):  # type: ignore[no-untyped-def]
    from engine.backend import GraphFailed

    calls = []

    def wrapped(prompt, frames):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 1:
            raise GraphFailed("out of luck", node_id="5", class_type="Level", exception="RuntimeError")
        return run(prompt, frames)

    return wrapped


async def test_runner_bug_does_not_reach_the_client(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(mode="bug"))
        await process.frame(0, FRAME)
        failed = (await process.result(0)).failed
        assert failed.exception == "KeyError"
        assert "secret" not in failed.message
        assert "/secret/path" in caplog.text


async def test_graph_without_picture_drops_and_other_sizes_and_texts_arrive(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        nothing = await client.open(workflow_json=workflow(mode="nothing"))
        await nothing.frame(0, FRAME)
        assert (await nothing.result(0)).dropped.reason == pb.Dropped.REASON_NO_OUTPUT
        half = await client.open(workflow_json=workflow(mode="half"))
        await half.frame(0, FRAME)
        picture = (await half.result(0)).picture
        assert (picture.width, picture.height, len(picture.planes)) == (WIDTH // 2, HEIGHT, len(FRAME) // 2)
        text = await client.open(workflow_json=workflow(3, mode="text"))
        await text.frame(0, FRAME, pts=4711)
        await text.result(0)
        assert [(item.node_id, item.text, item.pts) for item in text.texts] == [("5", "level 3", 4711)]


async def test_client_that_disappears_leaves_nothing(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend) as server, connected(settings.address) as client:
        async with connected(settings.address) as other:
            backend.gate.clear()
            process = await other.open(workflow_json=workflow(), session_id="gone")
            await process.frame(0, FRAME)
            await process.frame(1, FRAME)
            await asyncio.to_thread(backend.running.wait)

        async def closed() -> bool:
            return not server.engine.sessions

        await eventually(closed)
        backend.gate.set()
        again = await client.open(workflow_json=workflow(8), session_id="gone")
        await again.frame(0, FRAME)
        assert (await again.result(0)).picture.planes[0] == 8
        assert [graph.closed for graph in backend.graphs] == [True, False]
        counters = await state(client, "gone")
        assert counters.frames_received == 1, "counters of the first session survived it"
        assert list(server.engine.sessions) == ["gone"]


async def test_half_closed_call_drains_like_end_of_input(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(WIDTH, HEIGHT)
        await process.frame(0, FRAME)
        await process.call.done_writing()
        await process.to_end()
        assert process.order == [0]
        assert await process.call.code() is grpc.StatusCode.OK


async def test_session_that_held_the_device_long_lets_the_other_catch_up(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        first = await client.open(workflow_json=workflow(1), session_id="first")
        second = await client.open(workflow_json=workflow(2), session_id="second")
        backend.gate.clear()
        await first.frames(pb.Frame(frame_id=number, planes=FRAME) for number in range(3))
        await asyncio.to_thread(backend.running.wait)
        await second.frames(pb.Frame(frame_id=number, planes=FRAME) for number in range(3))
        await in_flight(client, "second", 3)
        backend.gate.set()
        for process, level in ((first, 1), (second, 2)):
            await process.end_input()
            await process.to_end()
            assert {result.picture.planes[0] for result in process.results.values()} == {level}
        turns = [backend.graphs.index(graph) for graph, _ in backend.log]
        # The gate was shut during the first run, which took all the time that there was.
        assert turns == [0, 1, 1, 1, 0, 0]


async def test_pass_through_does_not_wait_for_somebody_elses_graph(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        slow = await client.open(workflow_json=workflow())
        backend.gate.clear()
        await slow.frame(0, FRAME)
        await asyncio.to_thread(backend.running.wait)
        process = await client.open(WIDTH, HEIGHT)
        await process.frame(0, FRAME)
        assert (await process.result(0)).picture.planes == FRAME
        backend.gate.set()
        await slow.result(0)


async def test_sessions_end_as_unavailable_when_the_engine_stops(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with connected(settings.address) as client:
        async with running_engine(settings, backend):
            process = await client.open(workflow_json=workflow())
            backend.gate.clear()
            await process.frame(0, FRAME)
            await process.frame(1, FRAME)
            await asyncio.to_thread(backend.running.wait)
            await in_flight(client, process.session_id, 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.to_end()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert {result.dropped.reason for result in process.results.values()} == {pb.Dropped.REASON_CLOSED}
        assert process.order == [0, 1]
        assert backend.graphs[0].closed


async def test_equal_sessions_share_a_run_until_one_is_changed(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    backend.shares = True
    async with running_engine(settings, backend), connected(settings.address) as client:
        names = ("first", "second", "third")
        processes = [
            await client.open(workflow_json=workflow(level), session_id=name)
            for name, level in zip(names, (1, 1, 2), strict=True)
        ]

        async def all_send(number: int) -> list[int]:
            """Levels of the pictures, with the frames waiting behind somebody else's run."""
            backend.gate.clear()
            backend.running.clear()
            await processes[2].frame(2 * number, FRAME)
            await asyncio.to_thread(backend.running.wait)
            for name, process in zip(names, processes, strict=True):
                await process.frame(2 * number + 1, FRAME)
                await in_flight(client, name, 2 if name == "third" else 1)
            backend.gate.set()
            return [(await process.result(2 * number + 1)).picture.planes[0] for process in processes]

        assert await all_send(0) == [1, 1, 2]
        assert [len(ids) for _, ids in backend.log].count(2) == 1, "one run for the two"
        override = pb.NodeOverride(node_id="5", input="level", value_json="9")
        await client.stub.UpdateSession(pb.UpdateSessionRequest(session_id="second", overrides=[override]))
        assert await all_send(1) == [1, 9, 2]
        assert [len(ids) for _, ids in backend.log].count(2) == 1
        for process, version in zip(processes, (1, 2, 1), strict=True):
            assert process.results[3].version == version
            assert process.credits == processes[0].credits


async def test_engine_whose_device_is_lost_ends_and_one_whose_graph_fails_does_not(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend) as server, connected(settings.address) as client:
        process = await client.open(WIDTH, HEIGHT, workflow_json=workflow(mode="bug"))
        await process.frame(0, FRAME)
        assert (await process.result(0)).HasField("failed")
        assert not server.engine.broken.is_set()
        backend.lost = True
        frames = itertools.count(1)

        async def broken() -> bool:
            number = next(frames)
            await process.frame(number, FRAME)
            await process.result(number)
            return server.engine.broken.is_set()

        await eventually(broken)


async def test_session_whose_call_is_cancelled_at_its_very_end_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled(task: asyncio.Task[None]) -> None:
        task.cancel()
        if task.get_name() == "write responses":
            raise asyncio.CancelledError  # of the call itself, in the moment in which it waits for its writer

    monkeypatch.setattr(service, "_cancelled", cancelled)
    settings = settings_for(tmp_path)
    async with running_engine(settings) as server, connected(settings.address) as client:
        process = await client.open(WIDTH, HEIGHT)
        process.call.cancel()
        await eventually(lambda: asyncio.sleep(0, not server.engine.sessions))
