"""Start as an orchestrator with us in its aiModels.json calls it (protocol.md 4.4): few statuses, one error shape."""

import json
from typing import Any

import pytest

from gateway_shim.errors import EngineGone, NotReady, StreamConflict, StreamsFull, WorkflowRefused
from tests.fakes.worker import LIVE_START, Answer, worker

PATHS = ["/live-video-to-video", "/live/video-to-video"]


def assert_survivable(answer: Answer) -> str:
    """What go-livepeer decodes; any other status or shape makes its handler panic or loses the message."""
    assert answer.status in (400, 401, 422, 500)
    detail: Any = answer.json["detail"]
    if answer.status == 422:
        assert all(set(entry) == {"loc", "msg", "type"} and entry["loc"][0] == "body" for entry in detail)
        return str(detail[0]["msg"])
    assert isinstance(detail["msg"], str)
    return str(detail["msg"])


@pytest.mark.parametrize("path", PATHS)
async def test_start_answers_ai_runners_shape(path: str) -> None:
    async with worker() as shim:
        answer = await shim.post(path, LIVE_START)
        assert answer.status == 200
        assert {key: answer.json[key] for key in ("publish_url", "subscribe_url", "control_url")} == {
            "publish_url": "",
            "subscribe_url": "",
            "control_url": "",
        }
        request = shim.streams.active["51c0de77"].request
        assert request.aliases == ("8e21f0aa", "str_x")
        assert request.data_url is None


async def test_a_name_that_two_streams_have_is_refused_with_both_ids() -> None:
    async with worker() as shim:
        shim.streams.capacity = 2
        for stream_id in ("one", "two"):
            assert (await shim.post(PATHS[0], LIVE_START | {"gateway_request_id": stream_id})).status == 200
        answer = await shim.post("/live/video-to-video/str_x/update", {"5": {"alpha": 2}})
        assert (answer.status, answer.json["code"]) == (409, "stream_conflict")
        assert "one, two" in answer.json["message"]
        answer = await shim.post("/live/video-to-video/nobody/update", {"5": {"alpha": 2}})
        assert answer.status == 404


async def test_start_needs_no_more_than_the_two_urls() -> None:
    async with worker() as shim:
        body = {
            "subscribe_url": "http://o/ai/trickle/a",
            "publish_url": "http://o/ai/trickle/a-out",
            "control_url": "",
            "params": None,
            "stream_id": "",
        }
        for _ in range(2):  # the same call again gets the same id
            assert (await shim.post("/live-video-to-video", body)).status == 200
        (session,) = shim.streams.active.values()
        assert list(session.request.channels) == ["subscribe_url", "publish_url"]


@pytest.mark.parametrize("path", PATHS)
async def test_start_while_full_says_insufficient_capacity_with_500(path: str) -> None:
    async with worker() as shim:
        await shim.post(path, LIVE_START)
        answer = await shim.post(path, LIVE_START | {"gateway_request_id": "other"})
        assert answer.status == 500
        assert "insufficient capacity" in assert_survivable(answer)
        assert "insufficient capacity" in answer.json["message"]


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (NotReady("loading"), 500),
        (EngineGone("gone"), 500),
        (StreamConflict("runs"), 400),
        (StreamsFull("full"), 500),
        (WorkflowRefused("no ComfyUI"), 422),
        (ZeroDivisionError("a bug"), 500),
    ],
)
async def test_every_failure_comes_in_a_status_the_orchestrator_survives(failure: Exception, status: int) -> None:
    async with worker() as shim:
        shim.streams.fails = failure
        answer = await shim.post("/live-video-to-video", LIVE_START)
        assert answer.status == status
        assert assert_survivable(answer)


async def test_bad_bodies_and_tokens_come_in_a_status_the_orchestrator_survives() -> None:
    async with worker(body_limit_bytes=4096, auth_token="s3cret") as shim:
        right = {"Authorization": "Bearer s3cret"}
        refused = await shim.post("/live-video-to-video", LIVE_START)
        assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert_survivable(refused)
        answers = {
            400: [b"", b"{", b"[1]", b"x" * 5000],
            422: [json.dumps(LIVE_START | {"publish_url": 3}).encode(), b'{"params": []}'],
        }
        for status, bodies in answers.items():
            for body in bodies:
                answer = await shim.call("POST", "/live-video-to-video", data=body, headers=right)
                assert answer.status == status
                assert_survivable(answer)
        assert (await shim.post("/live-video-to-video", LIVE_START, headers=right)).status == 200


async def test_a_model_id_that_differs_does_not_keep_the_stream_from_starting() -> None:
    async with worker() as shim:
        assert (await shim.post("/live-video-to-video", LIVE_START | {"model_id": "theirs"})).status == 200
