"""What nodes say may be no text. It costs its session nothing, and nobody else anything."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.answers import Answers
from engine.backend import GraphFailed, RunResult
from engine.utf8 import utf8
from proto import engine_pb2 as pb
from tests.fakes.engine_backend import StubBackend, StubGraph, workflow
from tests.fakes.engine_client import connected, grey, running_engine, settings_for

HALF = "half an emoji \ud83d"  # as json.loads gives it
NAME = "caf\udce9.png"  # as os.listdir gives what is not UTF-8
FRAME = grey(64, 48, 16)


class Saying(StubBackend):
    """Graphs whose level says what a node does."""

    class graph_class(StubGraph):  # the name that the stub looks for
        def run(self, prompt: Any, frames: Any) -> RunResult:
            level = prompt["5"]["inputs"]["level"]
            if level == 66:
                return RunResult(super().run(prompt, frames).pictures, [("5", HALF)])
            if level == 67:
                raise GraphFailed(f"no such file: {NAME}", node_id="5", class_type="Level", exception=NAME)
            if level == 68:
                raise asyncio.CancelledError
            return super().run(prompt, frames)


def test_text_that_utf8_has_stays_as_it_is() -> None:
    assert [utf8(text) for text in ("plain", "Grüße 😀", HALF, NAME)] == [
        "plain",
        "Grüße 😀",
        "half an emoji ?",
        "caf?.png",
    ]


async def test_no_text_of_a_node_ends_anything(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, Saying()) as server, connected(settings.address) as client:
        said, failed, cancelled, good = [
            await client.open(workflow_json=workflow(level)) for level in (66, 67, 68, 7)
        ]
        for process in (said, failed, cancelled, good):
            await process.frame(1, FRAME)
            await process.result(1)
        assert said.results[1].WhichOneof("outcome") == "picture"
        assert [item.text for item in said.texts] == ["half an emoji ?"]
        fault = failed.results[1].failed
        assert (fault.message, fault.exception) == ("no such file: caf?.png", "caf?.png")
        assert cancelled.results[1].failed.exception == "RuntimeError"
        assert good.results[1].WhichOneof("outcome") == "picture"
        assert not server.engine.broken.is_set()


async def test_what_can_be_told_to_nobody_ends_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_run = Answers.of_run

    def breaks(self: Answers, run: Any, result: RunResult, *rest: Any) -> Any:
        if result.texts:
            raise ValueError("no message holds this")
        return of_run(self, run, result, *rest)

    monkeypatch.setattr(Answers, "of_run", breaks)
    settings = settings_for(tmp_path)
    async with running_engine(settings, Saying()) as server, connected(settings.address) as client:
        bad = await client.open(workflow_json=workflow(66), session_id="bad")
        good = await client.open(workflow_json=workflow(7), session_id="good")
        await bad.frame(1, FRAME)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while not bad.ended:
                await bad.read()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        await good.frame(1, FRAME)
        await good.result(1)
        assert list(server.engine.sessions) == ["good"]
        assert not server.engine.broken.is_set()


async def test_a_build_that_fails_with_no_text_is_refused_with_its_reason(tmp_path: Path) -> None:
    class Lost(StubBackend):
        def build(self, prompt: Any, video: Any, report: Any) -> Any:
            yield None
            raise GraphFailed(f"no such file: {NAME}", node_id="5", class_type="Level")

    settings = settings_for(tmp_path)
    async with running_engine(settings, Lost()), connected(settings.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.open(workflow_json=workflow())
        assert "no such file: caf?.png" in (caught.value.details() or "")


async def test_a_workflow_with_half_a_character_is_refused(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, StubBackend()), connected(settings.address) as client:
        broken = workflow().replace("The level", "\\ud83d")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.open(workflow_json=broken)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "half of a surrogate pair" in (caught.value.details() or "")
        process = await client.open(workflow_json=workflow().replace("The level", "\\ud83d\\ude00"), session_id="s")
        update = pb.UpdateSessionRequest(
            session_id="s", overrides=[pb.NodeOverride(node_id="5", input="mode", value_json='"\\ud83d"')]
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.stub.UpdateSession(update)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await process.frame(1, FRAME)
        await process.result(1)
