"""Updates of a running stream, by every name that callers use (protocol.md 5.5, 8)."""

import json

import pytest

from tests.fakes.worker import BYOC_START, LIVE_START, worker

ALIASES = [
    "/stream/params",
    "/api/stream/params",
    "/stream/update",
    "/api/stream/update",
    "/live/video-to-video/update",
    "/live/video-to-video/cam1-9f3a1c07/update",
]


@pytest.mark.parametrize("path", ALIASES)
async def test_update_reaches_the_stream_by_every_name(path: str) -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        answer = await shim.post(path, {"5": {"inputs": {"alpha": 2**63 + 1}}})
        assert answer.status == 200
        assert answer.json == {
            "status": "success",
            "message": "Parameters updated successfully",
            "version": 2,
            "effective_pts": 90_000,
        }
        assert answer.headers["ETag"] == '"2"'
        update = shim.streams.active["cam1-9f3a1c07"].updates[0]
        assert update.overrides == {"5": {"alpha": 2**63 + 1}}  # no float on the way: seeds have 64 bits


@pytest.mark.parametrize("path", ALIASES)
async def test_update_without_a_stream_is_404(path: str) -> None:
    async with worker() as shim:
        answer = await shim.post(path, {"5": {"alpha": 2}})
        assert (answer.status, answer.json["code"]) == (404, "no_such_stream")
        assert answer.json["detail"]["msg"]


@pytest.mark.parametrize("name", ["51c0de77", "8e21f0aa", "str_x"])
async def test_update_knows_a_stream_by_each_of_its_names(name: str) -> None:
    async with worker(capacity=2) as shim:
        await shim.post("/live-video-to-video", LIVE_START)
        await shim.post("/stream/start", BYOC_START)
        assert (await shim.post(f"/live/video-to-video/{name}/update", {"5": {"alpha": 2}})).status == 200
        assert (await shim.post("/stream/params", {"5": {"alpha": 2}}, headers={"X-Stream-Id": name})).status == 200
        assert (await shim.post(f"/stream/params?stream_id={name}", {"5": {"alpha": 2}})).status == 200
        assert (await shim.post("/stream/params", {"stream_id": name, "5": {"alpha": 2}})).status == 200
        assert len(shim.streams.active["51c0de77"].updates) == 4
        assert not shim.streams.active["cam1-9f3a1c07"].updates


async def test_update_of_one_of_several_streams_must_name_it() -> None:
    async with worker(capacity=2) as shim:
        await shim.post("/stream/start", BYOC_START)
        await shim.post("/stream/start", BYOC_START | {"gateway_request_id": "b"})
        assert (await shim.post("/stream/params", {"5": {"alpha": 2}})).status == 404
        assert (
            await shim.post("/stream/params", {"5": {"alpha": 2}}, headers={"X-Stream-Id": "nobody"})
        ).status == 404


async def test_invalid_update_names_the_fields_and_changes_nothing() -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        answer = await shim.post("/stream/params", {"5": {"alpha": 2}, "55": {"alpha": 1}, "max_framerate": 99})
        assert (answer.status, answer.json["code"]) == (422, "invalid_request")
        assert {error["path"] for error in answer.json["errors"]} == {"nodes.55", "max_framerate"}
        assert "'5'" in answer.json["errors"][1]["message"] or "'5'" in answer.json["errors"][0]["message"]
        session = shim.streams.active["cam1-9f3a1c07"]
        assert (session.version, session.updates) == (1, [])
        assert (await shim.get("/health")).json == {"status": "OK"}


@pytest.mark.parametrize("data", [b"", b"{]", b"7", b'"text"', b'{"5": {"alpha": Infinity}}'])
async def test_malformed_update_is_400(data: bytes) -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        answer = await shim.call("POST", "/stream/params", data=data)
        assert (answer.status, answer.json["code"]) == (400, "malformed_request")


async def test_update_over_the_limit_is_413() -> None:
    async with worker(body_limit_bytes=4096) as shim:
        await shim.post("/stream/start", BYOC_START)
        body = json.dumps({"5": {"text": "x" * 5000}})
        assert (await shim.call("POST", "/stream/params", data=body)).status == 413


async def test_dry_run_changes_nothing() -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        answer = await shim.post("/stream/params?dry_run=1", {"5": {"alpha": 2}})
        assert (answer.status, answer.json["version"]) == (200, 1)
        assert (await shim.post("/stream/params?dry_run=true", {"7": {"alpha": 2}})).status == 422
        assert (await shim.post("/stream/params?dry_run=perhaps", {"5": {"alpha": 2}})).status == 422
        assert not shim.streams.active["cam1-9f3a1c07"].updates


async def test_update_on_top_of_an_older_version_is_412() -> None:
    async with worker() as shim:
        await shim.post("/stream/start", BYOC_START)
        first = await shim.post("/stream/params", {"5": {"alpha": 2}}, headers={"If-Match": '"1"'})
        assert first.status == 200
        stale = await shim.post("/stream/params", {"5": {"alpha": 3}}, headers={"If-Match": '"1"'})
        assert (stale.status, stale.json["code"]) == (412, "version_conflict")
        etag = first.headers["ETag"]
        assert (await shim.post("/stream/params", {"5": {"alpha": 3}}, headers={"If-Match": etag})).status == 200
        assert (await shim.post("/stream/params", {"5": {"alpha": 3}}, headers={"If-Match": "*"})).status == 200
        assert (await shim.post("/stream/params", {"5": {"alpha": 3}}, headers={"If-Match": "x"})).status == 400
