"""Builds beside running sessions: how long frames wait for them, and what shows when one does not return."""

import asyncio
import itertools
import threading
from pathlib import Path

from engine.backend import Building, FrameIn, Report, RunResult
from engine.graph.workflow import Prompt
from engine.wire import VideoFormat
from proto import engine_pb2 as pb
from tests.fakes.engine_backend import StubBackend, StubGraph, workflow
from tests.fakes.engine_client import Client, connected, eventually, grey, running_engine, settings_for

FRAME = grey(64, 48, 16)


class OrderedGraph(StubGraph):
    def run(self, prompt: Prompt, frames: list[FrameIn]) -> RunResult:
        assert isinstance(self.backend, OrderedBackend)
        self.backend.order.append("run")
        return super().run(prompt, frames)


class OrderedBackend(StubBackend):
    """``order``: what the executor thread did. A step waits while ``may_step`` is clear."""

    graph_class = OrderedGraph

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.may_step = threading.Event()
        self.may_step.set()

    def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Building:
        building = super().build(prompt, video, report)
        while True:
            self.order.append("step")
            self.may_step.wait(60)
            try:
                aside = next(building)
            except StopIteration as end:
                return end.value
            yield aside


async def listed(client: Client) -> pb.ListSessionsResponse:
    answer: pb.ListSessionsResponse = await client.stub.ListSessions(pb.ListSessionsRequest())
    return answer


async def test_frame_waits_for_one_step_however_many_streams_open(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path, max_sessions=16), OrderedBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        live = await client.open(workflow_json=workflow(1), session_id="live")
        backend.warm_up_steps, backend.step_s, backend.run_s = 4, 0.03, 0.002
        backend.order.clear()
        opening = [asyncio.create_task(client.open(workflow_json=workflow(2))) for _ in range(8)]
        for number in itertools.count():
            await live.frame(number, FRAME)
            await live.result(number)
            if all(task.done() for task in opening):
                break
        await asyncio.gather(*opening)
        steps = [len(list(group)) for kind, group in itertools.groupby(backend.order) if kind == "step"]
        # A frame that comes in the moment between two steps finds the second one submitted. It comes late itself now
        # and then: both ends share this process, and the machine has other work.
        assert sum(steps) == 8 * 5
        assert sorted(steps)[len(steps) * 3 // 4] <= 2, steps


async def test_step_that_does_not_return_shows_although_a_run_waits_behind_it(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path, step_limit_s=0.05), OrderedBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        live = await client.open(workflow_json=workflow(1), session_id="live")
        assert (await listed(client)).step_ms == 0
        backend.may_step.clear()
        stuck = client.process()
        video = pb.VideoFormat(width=64, height=48)
        await stuck.send(pb.ProcessRequest(open=pb.OpenSession(video=video, workflow_json=workflow(2))))
        await stuck.until("progress")
        stuck.call.cancel()  # its client gives up; the thread is still in the step
        await live.frame(0, FRAME)

        async def beyond() -> bool:
            found = await listed(client)
            return found.step_ms > found.step_limit_ms == 50 and found.run_ms == 0 and found.preparing

        await eventually(beyond)
        backend.may_step.set()
        await live.result(0)

        async def over() -> bool:
            return (await listed(client)).step_ms == 0

        await eventually(over)


async def test_run_of_a_session_is_no_step(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), OrderedBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        live = await client.open(workflow_json=workflow(1), session_id="live")
        backend.gate.clear()
        await live.frame(0, FRAME)
        await asyncio.to_thread(backend.running.wait)
        found = await listed(client)
        assert found.run_ms > 0
        assert found.step_ms == 0
        backend.gate.set()
        await live.result(0)
