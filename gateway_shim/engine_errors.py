"""What a failed call to the engine is in the shim's own words.

"This request failed" and "the engine is gone" are different exceptions: the first is the caller's business, the
second is repaired by opening the session again.
"""

from __future__ import annotations

from dataclasses import replace

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from .errors import (
    EngineGone,
    HeadraceError,
    InvalidRequest,
    NoSuchStream,
    NotReady,
    VersionConflict,
    Violation,
    WorkflowRefused,
)

#: Reason of the ErrorInfo whose metadata says what each wrong field takes (UpdateSession in engine.proto).
ALLOWED = "ALLOWED"

#: gRPC status to what the caller did wrong; everything else means that the engine is gone.
_REFUSALS: dict[grpc.StatusCode, type[HeadraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NoSuchStream,
    grpc.StatusCode.ABORTED: VersionConflict,
    grpc.StatusCode.FAILED_PRECONDITION: WorkflowRefused,
    grpc.StatusCode.UNIMPLEMENTED: WorkflowRefused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: NotReady,
    grpc.StatusCode.ALREADY_EXISTS: NotReady,
}


def error_from(exc: grpc.aio.AioRpcError) -> HeadraceError:
    """Our exception for a failed call, with the violations that its details name."""
    violations: list[Violation] = []
    said = False  # by the engine, not by gRPC
    status = rpc_status.from_call(exc)
    for detail in status.details if status is not None else ():
        bad_request = error_details_pb2.BadRequest()
        if detail.Is(bad_request.DESCRIPTOR) and detail.Unpack(bad_request):
            violations += [
                Violation(_path(field.field), field.description, reason=field.reason.lower())
                for field in bad_request.field_violations
            ]
        info = error_details_pb2.ErrorInfo()
        said = said or detail.Is(info.DESCRIPTOR)
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.reason == ALLOWED:
            allowed = {_path(path): text for path, text in info.metadata.items()}
            violations = [replace(each, allowed=allowed.get(each.path, "")) for each in violations]
    details = exc.details()
    if not said and _REFUSALS.get(exc.code()) is None:
        details = f"the engine was lost over this call ({details or exc.code().name})"
    return error_of(exc.code(), details, tuple(violations))


def error_of(code: grpc.StatusCode, details: str | None, violations: tuple[Violation, ...] = ()) -> HeadraceError:
    """Our exception for the status of a call that ended."""
    kind = _REFUSALS.get(code, EngineGone)
    return kind(details or f"the engine answered {code.name}", violations)


def _path(field: str) -> str:
    """The contract's name for a field in the words of the HTTP API."""
    return "prompts" if field == "workflow_json" else field
