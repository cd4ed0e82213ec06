"""Everything that can be wrong with a call, and the one table from there to gRPC.

A refused call ends with a status and ``google.rpc`` details: ``ErrorInfo`` carries the stable reason,
``BadRequest`` one ``FieldViolation`` per wrong field. Nothing running is lost by raising one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from proto.fields import Malformed

from .graph.overrides import OverrideError
from .graph.workflow import Finding, Severity, WorkflowError
from .utf8 import utf8

logger = logging.getLogger(__name__)

#: ``ErrorInfo.domain``: whose reasons these are.
DOMAIN: Final = "headrace.engine"

#: A status travels in HTTP/2 headers, of which peers accept 8 KiB by default, written in base64 (4/3). Violations
#: beyond that are counted in the message instead; a status that does not fit reaches the client as a bare INTERNAL.
MAX_STATUS_BYTES: Final = 5_000
MAX_TEXT_CHARS: Final = 240
MAX_PATH_CHARS: Final = 120

#: Reason of the second ErrorInfo, whose metadata says for each wrong field what it takes.
ALLOWED: Final = "ALLOWED"


#: Codes of findings that another engine might not have.
LACKING: Final = frozenset({"unknown_node", "no_comfyui", "audio_not_served", "refused_node", "unknown_choice"})


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that is wrong. ``path`` reads like ``nodes.5.inputs.strength`` or ``video.width``.

    ``allowed`` says what the field takes, in words; empty where nothing can be said.
    """

    path: str
    message: str
    reason: str = ""
    allowed: str = ""


class EngineError(Exception):
    """Base of what the engine raises on purpose. ``reason`` is stable, snake case."""

    reason: ClassVar[str] = "internal"
    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, violations: Iterable[Violation] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.violations = tuple(violations)


class InvalidRequest(EngineError):
    """A field has a wrong name, type or range; ``violations`` has one entry each."""

    reason = "invalid_request"
    status = grpc.StatusCode.INVALID_ARGUMENT


class WorkflowRefused(EngineError):
    """This engine cannot run the workflow: nodes are missing or refused, or there is no ComfyUI."""

    reason = "workflow_refused"
    status = grpc.StatusCode.FAILED_PRECONDITION


class UpdateReverted(EngineError):
    """The graph failed on its first frames after an update, and runs with its last good parameters again."""

    reason = "update_reverted"
    status = grpc.StatusCode.FAILED_PRECONDITION


class WireMismatch(EngineError):
    """The client speaks another version of the contract."""

    reason = "wire_version"
    status = grpc.StatusCode.FAILED_PRECONDITION


class NoSuchSession(EngineError):
    reason = "no_such_session"
    status = grpc.StatusCode.NOT_FOUND


class SessionExists(EngineError):
    reason = "session_exists"
    status = grpc.StatusCode.ALREADY_EXISTS


class VersionConflict(EngineError):
    """The parameters have moved on since the version that the caller named."""

    reason = "version_conflict"
    status = grpc.StatusCode.ABORTED


class SessionsFull(EngineError):
    reason = "sessions_full"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class NotReady(EngineError):
    """ComfyUI is loading; the same call may succeed later."""

    reason = "loading"
    status = grpc.StatusCode.UNAVAILABLE


class Stopping(EngineError):
    """The engine ends; another one may be up in a moment."""

    reason = "stopping"
    status = grpc.StatusCode.UNAVAILABLE


def refusal(findings: Sequence[Finding]) -> EngineError:
    """FAILED_PRECONDITION when the workflow is sound but this engine lacks something, else INVALID_ARGUMENT."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    violations = [_of_finding(item) for item in errors]
    text = str(WorkflowError(findings))
    if errors and all(item.code in LACKING for item in errors):
        return WorkflowRefused(text, violations)
    return InvalidRequest(text, violations)


def _of_finding(item: Finding) -> Violation:
    # The path names the node already. A range comes as the remedy "it takes ..." (graph/validation.py).
    path, (_, takes, allowed) = item.path or "workflow_json", item.remedy.partition("it takes ")
    if takes and allowed:
        return Violation(path, item.message, item.code, allowed)
    return Violation(path, f"{item.message}; {item.remedy}" if item.remedy else item.message, item.code)


def refuse(findings: Sequence[Finding]) -> None:
    """Raises ``refusal`` if a finding is an error."""
    if any(finding.severity is Severity.ERROR for finding in findings):
        raise refusal(findings)


def status_of(error: BaseException) -> Any:
    """The ``grpc.Status`` for any exception, with details.

    What was not raised on purpose is INTERNAL and says nothing of itself to the client: its text may hold paths or
    values of somebody else's stream. The log has the traceback.
    """
    error = _translated(error)
    if isinstance(error, EngineError):
        return rpc_status.to_status(_details(error))
    logger.error("a call failed unexpectedly", exc_info=error)
    internal = EngineError("the engine failed internally; its log has the details")
    return rpc_status.to_status(_details(internal))


def _translated(error: BaseException) -> BaseException:
    """What the graph layer raises, as an error of the contract; anything else stays what it is."""
    if isinstance(error, Malformed):
        return InvalidRequest(str(error))
    if isinstance(error, WorkflowError):
        return refusal(error.findings)
    if isinstance(error, OverrideError):
        return InvalidRequest(
            str(error),
            [Violation(item.path, item.message, "invalid_override", item.allowed) for item in error.violations],
        )
    return error


def _details(error: EngineError) -> status_pb2.Status:
    status = status_pb2.Status(code=getattr(code_pb2, error.status.name), message=_short(error.message))
    _pack(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    room = MAX_STATUS_BYTES - status.ByteSize()
    fields, allowed = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo(reason=ALLOWED, domain=DOMAIN)
    for violation in error.violations:
        path = _short(violation.path, MAX_PATH_CHARS)
        field = error_details_pb2.BadRequest.FieldViolation(
            field=path, description=_short(violation.message), reason=violation.reason.upper()
        )
        limits = _short(violation.allowed)
        room -= field.ByteSize() + (len(path) + len(limits.encode()) if limits else 0) + 16
        if room < 0:
            status.message += f" (and {len(error.violations) - len(fields.field_violations)} more wrong fields)"
            break
        fields.field_violations.append(field)
        if limits:
            allowed.metadata[path] = limits
    if fields.field_violations:
        _pack(status, fields)
    if allowed.metadata:
        _pack(status, allowed)
    return status


def _pack(status: status_pb2.Status, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _short(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    return utf8(text if len(text) <= limit else text[: limit - 1] + "…")
