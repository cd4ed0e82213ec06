"""Everything that can be wrong with a request, and the one table from there to HTTP.

An error says what was wrong, where, what is allowed and what to do. Nothing running is lost by raising one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that is wrong. ``path`` reads like ``nodes.5.inputs.strength`` or ``width``.

    ``reason``: stable, snake case, where the engine gave one; for us, not for callers.
    """

    path: str
    message: str
    allowed: str = ""
    reason: str = ""

    def as_json(self) -> dict[str, str]:
        entry = {"path": self.path, "message": self.message}
        return entry | {"allowed": self.allowed} if self.allowed else entry


class HeadraceError(Exception):
    """Base of what we raise on purpose. ``code`` is stable, snake case; ``http_status`` is the BYOC answer."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, violations: tuple[Violation, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.violations = violations

    def as_json(self) -> dict[str, Any]:
        """The body for this error's own status; see ``error_body``."""
        return error_body(self.http_status, self.code, self.message, self.violations)


def error_body(status: int, code: str, message: str, violations: tuple[Violation, ...] = ()) -> dict[str, Any]:
    """Both peers' shapes at once (protocol.md 8, row 8): ``status``/``message``, and ``detail``.

    ``detail`` depends on the status: go-livepeer decodes 422 as a list of ``{loc, msg, type}`` and every other one as
    ``{msg}``; the wrong shape turns the message into a decoding error (protocol.md 4.4).
    """
    body: dict[str, Any] = {"status": "error", "code": code, "message": message, "detail": {"msg": message}}
    if status == 422:
        found = violations or (Violation("", message),)
        body["detail"] = [
            {
                "loc": ["body", *filter(None, violation.path.split("."))],
                "msg": f"{violation.message} (allowed: {violation.allowed})"
                if violation.allowed
                else violation.message,
                "type": code,
            }
            for violation in found
        ]
    if violations:
        body["errors"] = [violation.as_json() for violation in violations]
    return body


class MalformedRequest(HeadraceError):
    """The body cannot be read at all: not JSON, not an object."""

    code = "malformed_request"
    http_status = 400


class InvalidRequest(HeadraceError):
    """The body reads well but a field has a wrong name, type or range; ``violations`` has one entry each."""

    code = "invalid_request"
    http_status = 422


class SizeIsFixed(HeadraceError):
    """The size of a running stream cannot change: players and the gateway keep the first one."""

    code = "size_is_fixed"
    http_status = 400


class BodyTooSlow(HeadraceError):
    """The body did not come within the time that a body has."""

    code = "body_too_slow"
    http_status = 408


class BodyTooLarge(HeadraceError):
    code = "body_too_large"
    http_status = 413


class Unauthorized(HeadraceError):
    code = "unauthorized"
    http_status = 401


class CrossSite(HeadraceError):
    """A page of another origin made the browser call us."""

    code = "cross_site"
    http_status = 403


class NoSuchStream(HeadraceError):
    code = "no_such_stream"
    http_status = 404


class StreamConflict(HeadraceError):
    """A stream with this id runs already with other channels."""

    code = "stream_conflict"
    http_status = 409


class VersionConflict(HeadraceError):
    """The parameters have moved on since the version that the caller named."""

    code = "version_conflict"
    http_status = 412


class StreamsFull(HeadraceError):
    """Every stream of our capacity is in use. The words are those that make a gateway try elsewhere without blame."""

    code = "insufficient_capacity"
    http_status = 503


class NotReady(HeadraceError):
    """The engine is loading, or away; the same request may succeed later."""

    code = "not_ready"
    http_status = 503


class WorkflowRefused(HeadraceError):
    """This engine cannot run the workflow: nodes are missing or refused, or there is no ComfyUI."""

    code = "workflow_refused"
    http_status = 422


class EngineGone(HeadraceError):
    """The engine's process died or stopped answering. The stream itself goes on."""

    code = "engine_gone"
    http_status = 503
