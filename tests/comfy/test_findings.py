"""Every broken workflow of the corpus gives exactly its findings, all at once, from a real engine and a real ComfyUI.

``tests/data/workflows/broken.json``: each finding is severity, code, path, and words of its message or remedy.
``comfystream.json``: the shapes of ComfyStream's own workflows, in our words; the classes that core has not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.config import read
from proto import engine_pb2 as pb
from proto import engine_pb2_grpc

pytestmark = pytest.mark.process
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "workflows"
BROKEN = json.loads((DATA / "broken.json").read_text())
COMFYSTREAM = json.loads((DATA / "comfystream.json").read_text())
EXAMPLES = sorted((ROOT / "examples" / "workflows").glob("*.json"))
SEVERITIES = {pb.Finding.SEVERITY_ERROR: "error", pb.Finding.SEVERITY_WARNING: "warning"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of an engine that has loaded ComfyUI."""
    comfyui = read().comfyui_dir
    if comfyui is None:
        reason = "there is no ComfyUI: run `make comfyui` or set COMFYUI_DIR"
        pytest.fail(reason) if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1" else pytest.skip(reason)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        address = f"unix:{directory}/engine.sock"
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", "--address", address],
            cwd=ROOT,
            env=clean | {"COMFYUI_DIR": str(comfyui)},
            stderr=subprocess.DEVNULL,
        )
        try:
            with grpc.insecure_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                request = health_pb2.HealthCheckRequest(service="comfyui")
                watch = health.Watch(request, wait_for_ready=True, timeout=90)
                for answer in watch:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        break
                watch.cancel()
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


@pytest.fixture
def engine(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield engine_pb2_grpc.EngineStub(channel)


def check(engine: Any, workflow: Any) -> pb.CheckWorkflowResponse:
    text = workflow if isinstance(workflow, str) else json.dumps(workflow)
    answer: pb.CheckWorkflowResponse = engine.CheckWorkflow(pb.CheckWorkflowRequest(workflow_json=text), timeout=60)
    return answer


def test_the_corpus_has_thirty_workflows_and_every_kind_of_finding():
    assert len(BROKEN) == len({case["name"] for case in BROKEN}) >= 30
    assert len({code for case in BROKEN for _, code, *_ in case["findings"]}) >= 29


def said(answer: pb.CheckWorkflowResponse) -> list[tuple[str, str, str]]:
    return sorted((SEVERITIES[item.severity], item.code, item.path) for item in answer.findings)


def assert_exactly(answer: pb.CheckWorkflowResponse, findings: list[list[str]]) -> None:
    assert said(answer) == sorted((severity, code, path) for severity, code, path, _ in findings)
    for _, code, path, words in findings:
        (item,) = [item for item in answer.findings if (item.code, item.path) == (code, path)]
        assert words in f"{item.message}; {item.remedy}"
    for item in answer.findings:
        assert item.message
        assert item.remedy
        if item.node_id:
            assert item.class_type or item.code in ("not_a_node", "missing_class_type")


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case["name"])
def test_broken_workflow_gives_exactly_its_findings(engine, case):
    answer = check(engine, case["workflow"])
    assert not answer.runnable
    assert_exactly(answer, case["findings"])


@pytest.mark.parametrize("case", COMFYSTREAM, ids=lambda case: case["name"])
def test_what_comfystreams_workflows_lack_here_is_named(engine, case):
    assert_exactly(check(engine, case["workflow"]), case["findings"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_no_finding(engine, path):
    answer = check(engine, path.read_text())
    assert said(answer) == []
    assert answer.runnable
