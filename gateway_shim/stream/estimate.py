"""What the engine needs for a frame of one stream, learned from its answers: when to send, and how many it can do."""

from __future__ import annotations

from proto.results import FrameResult

#: Share of a new measurement in the running estimates of the engine's round trip and of its spread, and how many
#: spreads are allowed for: TCP's way to a time-out that is rarely wrong (RFC 6298, with a quicker memory).
ESTIMATE_SHARE = 0.2
SPREADS = 2.0

#: For so long a measured interval between two pictures of a busy engine says more than the times of its parts.
BUSY_MEMORY_S = 5.0


class Estimate:
    """Of one engine session after the other. Moments are seconds of one clock."""

    def __init__(self) -> None:
        self.graph_ms = 0.0
        self._run_s = 0.0  # graph and conversion
        self._interval_s = 0.0  # between two pictures, of an engine that had another frame of ours all the time
        self._measured_at: float | None = None  # when there was such an interval
        self.reset()

    def reset(self) -> None:
        """Another session, perhaps of another engine: what is under way is lost, and round trips are learned anew."""
        self._round_trip_s = self._spread_s = 0.0
        self._sent_at: dict[int, float] = {}  # by frame_id, of frames that the engine has
        self._busy_since: float | None = None  # last picture, if the engine had another frame when it came

    def sent(self, frame_id: int, now: float) -> None:
        self._sent_at[frame_id] = now

    def answered(self, result: FrameResult, now: float) -> None:
        """Every answer counts, the late ones above all: they say that frames must be sent earlier."""
        sent_at = self._sent_at.pop(result.frame_id, None)
        if sent_at is None:
            return
        took_s = now - sent_at
        if self._round_trip_s == 0.0:
            self._round_trip_s, self._spread_s = took_s, took_s / 2
        self._spread_s += ESTIMATE_SHARE * (abs(took_s - self._round_trip_s) - self._spread_s)
        self._round_trip_s += ESTIMATE_SHARE * (took_s - self._round_trip_s)
        if result.picture is not None:
            self._learn_run(result, now)

    def _learn_run(self, result: FrameResult, now: float) -> None:
        run_s = (result.graph_us + result.convert_us) / 1e6
        self.graph_ms += ESTIMATE_SHARE * (result.graph_us / 1000 - self.graph_ms)
        self._run_s += (ESTIMATE_SHARE if self._run_s else 1.0) * (run_s - self._run_s)
        if self._busy_since is not None:
            interval_s = now - self._busy_since
            fresh = self._measured_at is not None and now - self._measured_at < BUSY_MEMORY_S
            self._interval_s += (ESTIMATE_SHARE if fresh else 1.0) * (interval_s - self._interval_s)
            self._measured_at = now
        self._busy_since = now if self._sent_at else None

    @property
    def needed_s(self) -> float:
        """A frame that is sent later than this before it is due comes back too late."""
        return self._round_trip_s + SPREADS * self._spread_s

    def room_for_another(self, budget_s: float, now: float) -> bool:
        """Whether a fresh frame sent now would be back within its budget, behind those that the engine has.

        Credits alone let a slow graph have a queue in which every frame grows old: three frames of 140 ms are back
        after 420, and with a budget of 400 ms not one would ever be shown.
        """
        return not self._sent_at or (len(self._sent_at) + 1) * self._seconds(now) <= budget_s

    def waiting_s(self, now: float, heard_at: float) -> float:
        """How long the engine has had frames and said nothing, if it was last heard at ``heard_at``."""
        oldest = min(self._sent_at.values(), default=now)
        return max(now - max(oldest, heard_at), 0.0)

    def sustainable_fps(self, now: float) -> float | None:
        """Frames per second that this stream can have of the engine; None before the first picture.

        While the engine is busy all the time: how often a picture came, with everything that it does besides, other
        streams above all. Otherwise what a run of the graph and the conversion leave room for.
        """
        seconds = self._seconds(now)
        return 1 / seconds if seconds > 0 else None

    def _seconds(self, now: float) -> float:
        """Of the engine's time for one frame; 0 when nothing is known."""
        measured = self._measured_at is not None and now - self._measured_at < BUSY_MEMORY_S
        return max(self._interval_s, self._run_s) if measured else self._run_s
