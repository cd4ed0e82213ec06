"""Health, version and hardware, exactly as an orchestrator reads them at its start (protocol.md 4.2, 4.3)."""

import re

import pytest

from gateway_shim.engine_client import EngineState
from gateway_shim.routes import context as routes_context
from proto import VERSION
from proto import engine_pb2 as pb
from tests.fakes.worker import BYOC_START, worker

GPU = pb.Device(
    type="cuda",
    name="NVIDIA L4",
    uuid="GPU-1234",
    memory_total_bytes=24 * 2**30,
    memory_free_bytes=23 * 2**30,
    compute_major=8,
    compute_minor=9,
    utilization_compute=41.6,
    utilization_memory=7.2,
)


@pytest.mark.parametrize("path", ["/health", "/health/"])
async def test_health_is_one_of_four_words_and_nothing_else(path: str) -> None:
    async with worker() as shim:
        assert (await shim.get(path)).json == {"status": "IDLE"}
        for state in (EngineState.ABSENT, EngineState.LOADING):
            shim.engine.state = state
            assert (await shim.get(path)).json == {"status": "LOADING"}
        shim.engine.state = EngineState.READY
        await shim.post("/stream/start", BYOC_START)
        assert (await shim.get(path)).json == {"status": "OK"}
        shim.engine.state = EngineState.DEAD  # frames pass through meanwhile
        assert (await shim.get(path)).json == {"status": "OK"}


async def test_health_that_cannot_be_computed_is_500_with_ai_runners_words(caplog: pytest.LogCaptureFixture) -> None:
    async with worker() as shim:
        shim.engine.state = None  # type: ignore[assignment]
        answer = await shim.get("/health")
        assert answer.status == 500
        assert answer.json == {"detail": {"msg": "Failed to retrieve pipeline status."}}


@pytest.mark.parametrize("slash", ["", "/"])
async def test_version_is_what_a_gateway_compares(slash: str) -> None:
    async with worker(model_id="my-model") as shim:
        answer = await shim.get("/version" + slash)
        assert answer.json == {"pipeline": "live-video-to-video", "model_id": "my-model", "version": VERSION}
        assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
        assert (await shim.get("/app-version" + slash)).json == {"version": VERSION}


@pytest.mark.parametrize("slash", ["", "/"])
async def test_hardware_is_empty_without_a_gpu_or_an_engine(slash: str) -> None:
    async with worker() as shim:
        head = {"pipeline": "live-video-to-video", "model_id": "comfystream"}
        for info in (None, pb.ServerInfo(device=pb.Device(type="cpu", name="some CPU"))):
            shim.engine.info = info
            assert (await shim.get("/hardware/info" + slash)).json == head | {"gpu_info": {}}
            assert (await shim.get("/hardware/stats" + slash)).json == head | {"gpu_stats": {}}


async def test_hardware_has_go_livepeers_fields() -> None:
    async with worker() as shim:
        shim.engine.info = pb.ServerInfo(device=GPU)
        common = {"id": "GPU-1234", "name": "NVIDIA L4", "memory_total": 24 * 2**30, "memory_free": 23 * 2**30}
        info = (await shim.get("/hardware/info")).json
        assert info["gpu_info"] == {"0": common | {"major": 8, "minor": 9}}
        stats = (await shim.get("/hardware/stats")).json
        assert stats["gpu_stats"] == {"0": common | {"utilization_compute": 42, "utilization_memory": 7}}


async def test_a_token_is_needed_everywhere_and_compared_whole() -> None:
    told: list[int] = []
    async with worker(auth_token="s3cret") as shim:
        shim.app[routes_context.CONTEXT].on_unauthorized = lambda: told.append(1)
        wrong = [
            {},
            {"Authorization": "s3cret"},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Basic s3cret"},
        ]
        for method, path in [("GET", "/health"), ("POST", "/stream/stop"), ("POST", "/stream/start"), ("GET", "/x")]:
            for headers in wrong:
                answer = await shim.call(method, path, headers=headers)
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
                assert answer.json["detail"]["msg"]
        assert len(told) == 16  # after a 401 the orchestrator has dropped us
        assert (await shim.get("/health", headers={"Authorization": "bearer s3cret"})).status == 200
        assert len(told) == 16


async def test_unknown_paths_and_methods_are_json_and_never_redirected() -> None:
    async with worker() as shim:
        assert (await shim.get("/nothing/here")).status == 404
        for path in ("//health", "/stream/start/", "/health//"):
            assert (await shim.get(path)).status == 404
        answer = await shim.get("/stream/start")
        assert (answer.status, answer.headers["Allow"], answer.json["code"]) == (405, "POST", "method_not_allowed")
        assert answer.json["message"] == "'/stream/start' takes POST, not GET"
        assert "'/nothing/here'" in (await shim.get("/nothing/here")).json["message"]


async def test_a_bug_is_answered_with_an_id_that_leads_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with worker() as shim:
        shim.streams.fails = ZeroDivisionError("secret inner details")
        answer = await shim.post("/stream/start", BYOC_START)
        assert answer.status == 500
        assert "secret" not in answer.json["message"]
        (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert answer.json["message"].split()[-1] in record.getMessage()
        assert (await shim.get("/health")).json == {"status": "IDLE"}
