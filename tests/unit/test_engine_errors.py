"""From exceptions to gRPC statuses with details."""

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from engine.errors import (
    ALLOWED,
    EngineError,
    InvalidRequest,
    NoSuchSession,
    NotReady,
    Violation,
    WorkflowRefused,
    refusal,
    status_of,
)
from engine.graph.overrides import OverrideError
from engine.graph.overrides import Violation as OverrideViolation
from engine.graph.workflow import Severity, WorkflowError, finding
from gateway_shim.engine_errors import error_from
from gateway_shim.errors import EngineGone


def details(error: BaseException) -> tuple[grpc.StatusCode, status_pb2.Status]:
    status = status_of(error)
    ((_, packed),) = status.trailing_metadata
    return status.code, status_pb2.Status.FromString(packed)


def violations(status: status_pb2.Status) -> list[str]:
    found = []
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            found += [violation.field for violation in bad.field_violations]
    return found


def test_every_error_of_ours_has_a_status_and_a_reason_of_its_own() -> None:
    reasons = [kind.reason for kind in EngineError.__subclasses__()]
    assert len(set(reasons)) == len(reasons)
    for kind in EngineError.__subclasses__():
        code, status = details(kind("a sentence"))
        assert code is kind.status
        assert code is not grpc.StatusCode.INTERNAL
        info = error_details_pb2.ErrorInfo()
        status.details[0].Unpack(info)
        assert (info.reason, info.domain, status.message) == (kind.reason, "headrace.engine", "a sentence")


@pytest.mark.parametrize("said", [True, False], ids=["by the engine", "by gRPC"])
def test_what_the_engine_says_stays_and_what_grpc_says_is_explained(said: bool) -> None:
    """The shim's side: "Stream removed (recvmsg: ...)" tells no caller what happened, "ComfyUI is loading" does."""
    status = status_of(NotReady("ComfyUI is loading"))
    trailing = grpc.aio.Metadata(*status.trailing_metadata) if said else grpc.aio.Metadata()
    lost = grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), trailing, status.details)
    error = error_from(lost)
    assert isinstance(error, EngineGone)
    explained = "the engine was lost over this call (ComfyUI is loading)"
    assert error.message == ("ComfyUI is loading" if said else explained)


def test_unexpected_exception_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    code, status = details(KeyError("/home/somebody/secret"))
    assert code is grpc.StatusCode.INTERNAL
    assert b"secret" not in status.SerializeToString()
    assert "secret" in caplog.text


def test_override_errors_name_the_field() -> None:
    error = OverrideError([OverrideViolation("nodes.5.inputs.level", "256 is above 255", "a number from 0 to 255")])
    code, status = details(error)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(status) == ["nodes.5.inputs.level"]
    info = error_details_pb2.ErrorInfo()
    assert status.details[2].Unpack(info)
    assert (info.reason, dict(info.metadata)) == (ALLOWED, {"nodes.5.inputs.level": "a number from 0 to 255"})


@pytest.mark.parametrize(
    ("codes", "kind"),
    [
        (["unknown_node"], WorkflowRefused),
        (["unknown_node", "bad_link"], InvalidRequest),
        (["cycle"], InvalidRequest),
    ],
)
def test_only_what_another_engine_could_run_is_a_failed_precondition(codes: list[str], kind: type) -> None:
    findings = [finding(code, "wrong", node_id="7") for code in codes]
    findings.append(finding("several_outputs", "odd", severity=Severity.WARNING))
    error = refusal(findings)
    assert type(error) is kind
    assert [violation.path for violation in error.violations] == ["nodes.7"] * len(codes)
    assert details(WorkflowError(findings))[0] is kind.status


def test_status_fits_into_headers_however_much_is_wrong() -> None:
    many = [
        Violation(f"nodes.{number}.inputs.{'text' * 1000}", "long " * 1000, "invalid_override", "ö" * 1000)
        for number in range(500)
    ]
    _, status = details(InvalidRequest("all wrong " * 1000, many))
    assert violations(status)
    assert f"and {500 - len(violations(status))} more" in status.message
    assert status.ByteSize() * 4 / 3 < 8192, "peers refuse larger headers, and binary ones travel as base64"


def test_not_found_is_not_internal() -> None:
    assert details(NoSuchSession("x"))[0] is grpc.StatusCode.NOT_FOUND
