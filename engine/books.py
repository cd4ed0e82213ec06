"""The books of a session: what became of its frames, and its last fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proto import engine_pb2 as pb
from proto.results import FrameResult


@dataclass(slots=True)
class Books:
    """Frames since the session was opened."""

    received: int = 0
    processed: int = 0
    failed: int = 0
    dropped_late: int = 0
    dropped_other: int = 0
    last_fault: pb.Fault | None = None

    def dropped(self, frame_id: int, pts: int, reason: pb.Dropped.Reason) -> FrameResult:
        """Count the frame and give its result."""
        if reason == pb.Dropped.REASON_LATE:
            self.dropped_late += 1
        else:
            self.dropped_other += 1
        return FrameResult(frame_id, pts, dropped=pb.Dropped(reason=reason))

    def fault(self, fault: pb.Fault) -> pb.Fault:
        self.last_fault = fault
        return fault

    def state(self, **others: Any) -> pb.SessionState:
        """With the ``others`` that are not in the books."""
        return pb.SessionState(
            frames_received=self.received,
            frames_processed=self.processed,
            frames_failed=self.failed,
            frames_dropped_late=self.dropped_late,
            frames_dropped_other=self.dropped_other,
            last_fault=self.last_fault,
            **others,
        )
