"""One update at a time: what goes together, what goes alone, and what becomes of those that wait too long."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from gateway_shim.errors import InvalidRequest, NoSuchStream, NotReady, VersionConflict
from gateway_shim.params import parse_update
from gateway_shim.stream import parameters as module
from gateway_shim.stream.parameters import Parameters, UpdateResult
from proto import engine_pb2 as pb

PROMPT = {
    "1": {"class_type": "LoadTensor", "inputs": {}},
    "5": {"class_type": "Level", "inputs": {"image": ["1", 0], "level": 1}},
    "9": {"class_type": "SaveTensor", "inputs": {"images": ["5", 0]}},
}


class FakeEngine:
    """Refuses levels above 255, as the engine's check of every value does; answers while ``gate`` is open."""

    session_id = "s"

    def __init__(self) -> None:
        self.requests: list[pb.UpdateSessionRequest] = []
        self.version = 1
        self.prompt: dict[str, Any] = json.loads(json.dumps(PROMPT))
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()

    async def update(self, request: pb.UpdateSessionRequest, timeout_s: float) -> pb.UpdateSessionResponse:
        self.requests.append(request)
        self.asked.set()
        await self.gate.wait()
        values = [json.loads(override.value_json) for override in request.overrides]
        if any(value > 255 for value in values):
            raise InvalidRequest("too high")
        self.version += not request.dry_run
        return pb.UpdateSessionResponse(version=self.version, effective_pts=90)

    async def describe(self, session_id: str) -> pb.SessionDescription:
        return pb.SessionDescription(version=self.version, workflow_json=json.dumps(self.prompt))


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def parameters(engine: FakeEngine) -> AsyncIterator[Parameters]:
    async def session() -> Any:
        return engine, engine

    parameters = Parameters([], json.loads(json.dumps(PROMPT)), session)
    running = asyncio.create_task(parameters.run())
    yield parameters
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


def ask(parameters: Parameters, body: Any, **options: Any) -> asyncio.Task[UpdateResult]:
    def read(prompt: Mapping[str, Any]) -> Any:
        return parse_update(body, prompt)

    async def call() -> UpdateResult:
        return (await parameters.update(read, **options))[1]

    return asyncio.create_task(call())


def level(number: int) -> dict[str, Any]:
    return {"5": {"level": number}}


async def test_what_waits_goes_together_and_all_hear_of_one_version(
    parameters: Parameters, engine: FakeEngine
) -> None:
    engine.gate.clear()
    first = ask(parameters, level(10))
    await engine.asked.wait()
    others = [ask(parameters, level(number)) for number in (20, 30, 40)]
    await asyncio.sleep(0)
    engine.gate.set()
    assert (await first).version == 2
    assert [(await other).version for other in others] == [3, 3, 3]
    assert [override.value_json for override in engine.requests[1].overrides] == ["20", "30", "40"], "each is checked"
    assert parameters.prompt["5"]["inputs"]["level"] == 40


async def test_bad_one_among_them_is_refused_alone(parameters: Parameters, engine: FakeEngine) -> None:
    tasks = [ask(parameters, body) for body in (level(10), level(999), {"6": {}}, {"55": {"x": 1}}, level(20))]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == [
        "UpdateResult",
        "InvalidRequest",
        "InvalidRequest",
        "InvalidRequest",
        "UpdateResult",
    ]
    assert parameters.prompt["5"]["inputs"]["level"] == 20
    assert len(engine.requests) == 4, "three together, then one by one"


async def test_workflow_dry_run_and_expected_version_go_alone_and_in_order(
    parameters: Parameters, engine: FakeEngine
) -> None:
    other = json.loads(json.dumps(PROMPT)) | {"7": {"class_type": "Level", "inputs": {"image": ["1", 0], "level": 0}}}
    tasks = [
        ask(parameters, level(10)),
        ask(parameters, {"prompts": other}),
        ask(parameters, {"7": {"level": 5}}),  # a node that only the workflow before it has
        ask(parameters, level(30), dry_run=True),
        ask(parameters, level(40), expected_version=4),
        ask(parameters, level(50), expected_version=4),
    ]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answer.version for answer in answers[:5]] == [2, 3, 4, 4, 5]  # type: ignore[union-attr]
    assert isinstance(answers[5], VersionConflict)
    assert parameters.prompt["7"]["inputs"]["level"] == 5
    assert parameters.prompt["5"]["inputs"]["level"] == 40


async def test_update_that_waits_too_long_is_given_back_and_never_applied(
    parameters: Parameters, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN_TIMEOUT_S", 0.05)
    engine.gate.clear()
    first = ask(parameters, level(10))
    await engine.asked.wait()
    with pytest.raises(NotReady, match="another update"):
        await ask(parameters, level(20))
    engine.gate.set()
    assert (await first).version == 2
    assert parameters.prompt["5"]["inputs"]["level"] == 10
    assert len(engine.requests) == 1


async def test_caller_that_goes_away_takes_its_waiting_update_along(
    parameters: Parameters, engine: FakeEngine
) -> None:
    engine.gate.clear()
    first = ask(parameters, level(10))
    await engine.asked.wait()
    second = ask(parameters, level(20))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    engine.gate.set()
    await first
    assert len(engine.requests) == 1


async def test_silent_engine_is_given_up_and_one_that_works_is_not(
    parameters: Parameters, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.2)
    engine.gate.clear()
    working = ask(parameters, level(10))
    for _ in range(6):  # three times the silence
        await asyncio.sleep(0.1)
        parameters.heard()
    assert not working.done()
    engine.prompt["5"]["inputs"]["level"] = 10
    with pytest.raises(NotReady, match="said nothing"):
        await working
    engine.version = 7
    engine.gate.set()
    assert (await ask(parameters, level(30))).version == 8


async def test_reversal_is_read_back(parameters: Parameters, engine: FakeEngine) -> None:
    await ask(parameters, level(10))
    engine.version, engine.prompt["5"]["inputs"]["level"] = 3, 1
    parameters.reverted()
    for _ in range(5):
        await asyncio.sleep(0)
    assert (parameters.version, parameters.prompt["5"]["inputs"]["level"]) == (3, 1)


async def test_end_of_the_stream_answers_everybody(engine: FakeEngine) -> None:
    async def session() -> Any:
        return engine, engine

    parameters = Parameters([], json.loads(json.dumps(PROMPT)), session)
    running = asyncio.create_task(parameters.run())
    engine.gate.clear()
    tasks = [ask(parameters, level(10))]
    await engine.asked.wait()
    tasks.append(ask(parameters, level(20)))
    await asyncio.sleep(0)
    running.cancel()
    answers = await asyncio.gather(*tasks, ask(parameters, level(30)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [NoSuchStream] * 3
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_version_goes_on_over_a_new_session(parameters: Parameters, engine: FakeEngine) -> None:
    for number in (10, 20):
        await ask(parameters, level(number))
    parameters.opened(1)
    assert parameters.version == 3
    engine.version = 1
    assert (await ask(parameters, level(30), expected_version=3)).version == 4
    assert engine.requests[-1].expected_version == 1


async def test_frame_that_comes_while_an_early_update_is_checked_does_not_lose_it(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is opened with what was before; an update that only changed what it would open with is lost."""
    waiting = [True]

    async def check(prompt: Mapping[str, Any], **_: Any) -> list[pb.Finding]:
        waiting.clear()
        return []

    async def session() -> Any:
        return engine, engine

    monkeypatch.setattr(engine, "check", check, raising=False)
    monkeypatch.setattr(module, "pick", lambda engines: engine)
    parameters = Parameters([], json.loads(json.dumps(PROMPT)), session, waits_for_input=lambda: bool(waiting))
    running = asyncio.create_task(parameters.run())
    assert (await ask(parameters, level(30))).version == 2
    assert len(engine.requests) == 1
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
