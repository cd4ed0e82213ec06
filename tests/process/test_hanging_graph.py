"""A graph that does not return, in the real appliance: the watchdog ends its engine, and the stream goes on with the
last parameters that made a picture."""

import asyncio
import json
import sys
import time
from pathlib import Path

import pytest

from gateway_shim.localnet.broker import Broker
from gateway_shim.localnet.numbered import write_clip
from gateway_shim.localnet.programs import Programs
from gateway_shim.localnet.source import publish_file
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import Publisher
from tests.fakes.engine_backend import workflow
from tests.process.test_supervisor import DEADLINE_S, health, launch

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r") / "d"


def with_stub_engine(directory: Path) -> str:
    """An interpreter for supervisord.conf that runs the stand-in where the engine is asked for."""
    path = directory / "python"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *"-m engine") shift 3; set -- -P -m tests.fakes.engine_process "$@";; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


async def test_graph_that_does_not_return_is_ended_and_the_picture_comes_back(run_dir: Path, tmp_path: Path) -> None:
    plan = launch(run_dir, PYTHONPATH=str(ROOT), HEADRACE_ENGINE_RUN_LIMIT_S="1.0")
    plan.environment["HEADRACE_PYTHON"] = with_stub_engine(tmp_path)
    port = plan.environment["HEADRACE_LISTEN_PORT"]
    url = f"http://127.0.0.1:{port}"
    clip = write_clip(tmp_path / "a.ts", frames=60)
    async with Programs(plan), Broker() as broker, open_http() as http:
        await health(port, "IDLE")
        urls = {
            name: broker.create(f"cam{suffix}", "video/MP2T")
            for name, suffix in (("subscribe_url", ""), ("publish_url", "-out"))
        }
        body = {"gateway_request_id": "cam", **urls, "params": {"prompts": json.loads(workflow(level=200))}}

        async def post(path: str, body: object) -> int:
            async with http.post(url + path, json=body) as response:
                return response.status

        async def status() -> dict:
            async with http.get(f"{url}/stream/status") as response:
                return await response.json()

        async def until(wanted) -> dict:
            async with asyncio.timeout(DEADLINE_S):
                while not wanted(found := await status()):  # noqa: ASYNC110 another process's state
                    await asyncio.sleep(0.1)
            return found

        def stream(found: dict) -> dict:
            return found["streams"]["cam"]

        assert await post("/stream/start", body) == 200
        async with Publisher(http, urls["subscribe_url"], content_type="video/mp2t") as publisher:
            source = asyncio.create_task(publish_file(publisher, clip, loops=None, realtime=True))
            try:
                await until(lambda found: stream(found)["frames"]["processed"] > 30)
                assert await post("/stream/params", {"5": {"mode": "hang_later"}}) == 200
                hung_at = time.monotonic()
                found = await until(lambda found: found["additional_info"]["engines"][0]["restarts"] == 1)
                took_s = time.monotonic() - hung_at
                (engine,) = found["additional_info"]["engines"]
                assert "a run of its graph took" in engine["last_end"]["reason"]
                assert took_s < 11, took_s
                # The next sessions hang as well, until the stream goes back to what had worked for longer.
                log = run_dir / "log" / "shim.log"
                before = stream(await until(lambda found: "update_reverted" in log.read_text()))["frames"]
                found = await until(lambda found: stream(found)["frames"]["processed"] > before["processed"] + 30)
                assert "watchdog" in stream(found)["inference_status"]["last_restart_reason"]
            finally:
                source.cancel()
                await asyncio.gather(source, return_exceptions=True)
