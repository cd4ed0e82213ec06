"""Start, stop and status as a registered capability is called (protocol.md 3.3)."""

import asyncio
import io
import json

import pytest

from gateway_shim.routes import context as routes_context
from tests.fakes.worker import BYOC_START, worker


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_start_hands_over_every_field_and_answers_in_pytrickles_shape(prefix: str) -> None:
    async with worker() as shim:
        answer = await shim.post(f"{prefix}/stream/start", BYOC_START, headers={"X-Stream-Id": "cam1-9f3a1c07"})
        assert answer.status == 200
        assert answer.json["status"] == "success"
        assert answer.json["request_id"] == "cam1-9f3a1c07"
        assert answer.json["current_state"]["active_streams"] == 1
        request = shim.streams.active["cam1-9f3a1c07"].request
        assert request.data_url == "https://orch:8935/ai/trickle/cam1-9f3a1c07-data"
        assert (request.width, request.height, request.max_framerate) == (512, 512, 30)


@pytest.mark.parametrize("params", [None, {}, {"some_key_of_tomorrow": 1}])
async def test_start_takes_null_params_unknown_keys_and_any_subset_of_channels(params: object) -> None:
    async with worker() as shim:
        body = {"gateway_request_id": "a", "publish_url": "http://o:1/ai/trickle/a-out", "x": [1], "params": params}
        assert (await shim.post("/stream/start", body)).status == 200
        assert list(shim.streams.active["a"].request.channels) == ["publish_url"]


async def test_start_reads_json_whatever_the_content_type_says() -> None:
    async with worker() as shim:
        answer = await shim.call(
            "POST", "/stream/start", data=json.dumps(BYOC_START), headers={"Content-Type": "text/plain"}
        )
        assert answer.status == 200


async def test_start_takes_its_id_from_the_header_when_the_body_has_none() -> None:
    async with worker() as shim:
        answer = await shim.post(
            "/stream/start", {"events_url": BYOC_START["events_url"]}, headers={"X-Stream-Id": "cam7"}
        )
        assert answer.json["request_id"] == "cam7"


async def test_repeated_start_is_answered_200_and_starts_nothing() -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        session = shim.streams.active["cam1-9f3a1c07"]
        assert (await shim.post("/stream/start", BYOC_START)).status == 200
        assert shim.streams.active["cam1-9f3a1c07"] is session


async def test_start_of_a_running_id_on_other_channels_is_409() -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        answer = await shim.post("/stream/start", BYOC_START | {"publish_url": "https://orch:8935/ai/trickle/z"})
        assert (answer.status, answer.json["code"]) == (409, "stream_conflict")


async def test_start_while_full_is_503_and_leaves_the_running_stream_alone() -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        answer = await shim.post("/stream/start", BYOC_START | {"gateway_request_id": "other"})
        assert answer.status == 503
        assert answer.json["status"] == "error"
        assert answer.json["message"] == answer.json["detail"]["msg"]
        assert list(shim.streams.active) == ["cam1-9f3a1c07"]
        assert (await shim.get("/health")).json == {"status": "OK"}


async def test_start_names_every_wrong_field() -> None:
    async with worker() as shim:
        body = BYOC_START | {
            "subscribe_url": "ftp://x/y",
            "params": {"width": 513, "max_framerate": "fast", "prompts": {"3": {"inputs": []}}},
        }
        answer = await shim.post("/stream/start", body)
        assert answer.status == 422
        assert [error["path"] for error in answer.json["errors"]] == [
            "subscribe_url",
            "nodes.3.class_type",
            "nodes.3.inputs",
            "params.height",
            "params.width",
            "params.max_framerate",
        ]
        assert answer.json["detail"][0]["loc"] == ["body", "subscribe_url"]
        assert not shim.streams.active


async def test_start_without_any_id_is_422() -> None:
    async with worker() as shim:
        answer = await shim.post("/stream/start", {"params": {}})
        assert (answer.status, answer.json["errors"][0]["path"]) == (422, "gateway_request_id")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[]", b"3", b"null", b"[" * 100_000])
async def test_start_with_no_json_object_is_400(data: bytes) -> None:
    async with worker() as shim:
        answer = await shim.call("POST", "/stream/start", data=data)
        assert (answer.status, answer.json["code"]) == (400, "malformed_request")


async def test_body_over_the_limit_is_413_and_ten_mebibytes_pass() -> None:
    async with worker() as shim:
        fits = io.BytesIO(json.dumps(BYOC_START | {"ballast": "x" * 10 * 2**20}).encode())
        assert (await shim.call("POST", "/stream/start", data=fits)).status == 200
    async with worker(body_limit_bytes=4096) as shim:
        answer = await shim.call("POST", "/stream/start", data=b"x" * 5000)
        assert (answer.status, answer.json["code"]) == (413, "body_too_large")
        assert (await shim.get("/health")).status == 200


async def test_start_is_answered_before_the_gateway_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_context, "START_DEADLINE_S", 0.05)
    async with worker() as shim:
        shim.streams.start_gate = asyncio.Event()
        answer = await shim.post("/stream/start", BYOC_START)
        assert (answer.status, answer.json["code"]) == (503, "not_ready")
        assert not shim.streams.active


async def test_start_while_draining_is_503() -> None:
    async with worker() as shim:
        shim.app[routes_context.CONTEXT].draining = True
        assert (await shim.post("/stream/start", BYOC_START)).status == 503


async def test_channels_on_a_foreign_host_are_refused() -> None:
    async with worker(orch_url="https://orch:8935") as shim:
        answer = await shim.post("/stream/start", BYOC_START | {"events_url": "http://169.254.169.254/latest"})
        assert answer.status == 422
        assert [error["path"] for error in answer.json["errors"]] == ["events_url"]
        assert (await shim.post("/stream/start", BYOC_START)).status == 200


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize(
    "options",
    [{}, {"data": b"stream ended"}, {"json": {"why": 1}}, {"data": b"\xff" * 5000}, {"data": b"x" * 900_000}],
)
async def test_stop_takes_any_body_and_is_always_200(prefix: str, options: dict[str, object]) -> None:
    async with worker(body_limit_bytes=4096) as shim:
        await shim.post("/stream/start", BYOC_START)
        for stopped in (True, False, False):
            answer = await shim.call(
                "POST", f"{prefix}/stream/stop", headers={"X-Stream-Id": "cam1-9f3a1c07"}, **options
            )
            assert (answer.status, answer.json["status"], answer.json["stopped"]) == (200, "success", stopped)


async def test_stop_keeps_the_callers_reason() -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        await shim.call("POST", "/stream/stop", data=b"stream ended")
        assert shim.streams.stops == [(None, "stream ended")]


async def test_late_stop_of_another_stream_does_not_end_this_one() -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        answer = await shim.call("POST", "/stream/stop", headers={"X-Stream-Id": "yesterday"})
        assert (answer.status, answer.json["stopped"]) == (200, False)
        assert "cam1-9f3a1c07" in shim.streams.active


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_status_has_pytrickles_keys_and_each_streams_event(prefix: str) -> None:
    async with worker(capacity=2) as shim:
        idle = (await shim.get(f"{prefix}/stream/status")).json
        assert idle | {"additional_info": None} == {
            "status": "IDLE",
            "state": "IDLE",
            "error_message": None,
            "pipeline_ready": True,
            "active_streams": 0,
            "startup_complete": True,
            "pipeline_state": "IDLE",
            "additional_info": None,
            "client_active": False,
            "fps": None,
            "current_params": None,
            "streams": {},
        }
        await shim.post("/stream/start", BYOC_START)
        one = (await shim.get(f"{prefix}/stream/status")).json
        assert (one["status"], one["client_active"], one["fps"], one["current_params"]) == (
            "OK",
            True,
            24.5,
            {"5": {}},
        )
        await shim.post("/stream/start", BYOC_START | {"gateway_request_id": "b"})
        both = (await shim.get(f"{prefix}/stream/status")).json
        assert sorted(both["streams"]) == ["b", "cam1-9f3a1c07"]
        only = (await shim.get(f"{prefix}/stream/status", headers={"X-Stream-Id": "b"})).json
        assert list(only["streams"]) == ["b"]
        assert (await shim.get(f"{prefix}/stream/status?stream_id=c")).status == 404
