"""What a run of the demo found, on one screen and as JSON. Says what went wrong before what went well is believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .measure import FrameTally, longest_gap, percentile, tally
from .probe import Arrivals
from .source import Published

#: Lip sync that nobody notices: ITU-R BT.1359-1 puts the threshold of detection at 45 ms early, 125 ms late.
AV_LIMIT_MS = 40.0
#: A source this far behind was starved of processor time; scheduling alone costs a few milliseconds.
_LATE_LIMIT_S = 0.25


@dataclass(frozen=True)
class Change:
    """The parameter change in the middle."""

    body: Mapping[str, Any]
    sent_s: float  # after the first frame was published
    accepted_ms: float  # from request to answer
    visible_ms: float | None  # from request to the arrival of the first frame made with it
    version: int
    effective_pts: int | None


@dataclass(frozen=True)
class Report:
    clip: str
    workflow: str
    size: str
    seconds: float
    frames: FrameTally
    longest_gap: int
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    latency_max_ms: float | None
    av_offset_ms: float | None
    av_method: str
    segments: int
    keyless_segments: int
    gaps: int
    source_late_s: float
    change: Change | None
    worker: Mapping[str, Any] = field(default_factory=dict)  # the stream's own account, ``frames`` of its status
    misnumbered: int | None = None  # frames whose picture is not the one sent with that pts; numbered clips only

    @property
    def shortfalls(self) -> list[str]:
        """What a viewer would have noticed, one sentence each."""
        found = []
        frames = self.frames
        if not frames.received:
            return ["Nothing came out at all."]
        if frames.lost:
            found.append(f"{frames.lost} of {frames.sent} frames were lost, at most {self.longest_gap} in a row.")
        if frames.duplicated:
            found.append(f"{frames.duplicated} frames arrived twice.")
        if frames.out_of_order:
            found.append(f"{frames.out_of_order} frames arrived after a later one.")
        if frames.unknown:
            found.append(f"{frames.unknown} frames arrived with a pts that was never sent.")
        if self.misnumbered:
            found.append(f"{self.misnumbered} frames show another picture than the one sent with their pts.")
        for outcome, words in (("passed_through", "went out unprocessed"), ("failed", "failed in the graph")):
            if count := self.worker.get(outcome, 0):
                reasons = self.worker.get("reasons", {}).get(outcome, {})
                why = ", ".join(f"{reason}: {number}" for reason, number in reasons.items())
                found.append(f"{count} frames {words}{f' ({why})' if why else ''}.")
        if repeated := self.worker.get("repeated", 0):
            found.append(f"{repeated} frames are a repetition of the one before, for one that was late.")
        if self.keyless_segments:
            found.append(f"{self.keyless_segments} segments do not begin with a keyframe.")
        if self.av_offset_ms is not None and abs(self.av_offset_ms) > AV_LIMIT_MS:
            found.append(f"Sound and picture are {abs(self.av_offset_ms):.0f} ms apart.")
        if self.source_late_s > _LATE_LIMIT_S:
            found.append(
                f"The machine was too slow: the source itself fell {self.source_late_s:.1f} s behind real time."
            )
        if self.change is not None and self.change.visible_ms is None:
            found.append("The parameter change was accepted, but no frame made with it arrived.")
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"shortfalls": self.shortfalls}

    def as_text(self) -> str:
        """At most a screen of 80 by 24, but for a long list of shortfalls."""
        frames = self.frames
        lines = [
            f"headrace demo: {self.clip}, {self.size}, {self.seconds:.1f} s, through {self.workflow}",
            "",
            f"  frames    {frames.sent} in, {frames.received} out; {frames.lost} lost, {frames.duplicated} twice, "
            f"{frames.out_of_order} out of order",
            f"  latency   p50 {_ms(self.latency_p50_ms)}, p95 {_ms(self.latency_p95_ms)}, "
            f"max {_ms(self.latency_max_ms)} (published to received)",
            f"  sound     {_offset(self.av_offset_ms)} ({self.av_method})",
            f"  segments  {self.segments} out, {self.gaps} gaps",
        ]
        if self.worker:
            settled = ("processed", "passed_through", "failed", "dropped", "repeated")
            counts = [f"{count} {name.replace('_', ' ')}" for name in settled if (count := self.worker.get(name))]
            graph_ms = self.worker.get("graph_ms")
            each = f"; the graph took {graph_ms:.0f} ms a frame" if graph_ms else ""
            lines.insert(3, f"  worker    {', '.join(counts) or 'nothing'}{each}")
        if self.change is not None:
            change = self.change
            seen = "never visible" if change.visible_ms is None else f"visible after {_ms(change.visible_ms)}"
            lines.append(
                f"  update    at {change.sent_s:.1f} s: accepted after {_ms(change.accepted_ms)}, {seen}\n"
                f"            {_short(change.body)}"
            )
        lines.append("")
        lines += [f"  {sentence}" for sentence in self.shortfalls] or ["  Every frame arrived, once and in order."]
        return "\n".join(lines) + "\n"


def figures(published: Published, arrivals: Arrivals, latencies: Sequence[float]) -> dict[str, Any]:
    """The fields of a Report that follow from what was sent and what came."""
    sent, received = list(published.video), arrivals.pts
    return {
        "seconds": published.media_s,
        "frames": tally(sent, received),
        "longest_gap": longest_gap(sent, received),
        "latency_p50_ms": percentile(latencies, 0.5),
        "latency_p95_ms": percentile(latencies, 0.95),
        "latency_max_ms": max(latencies, default=None),
        "segments": arrivals.segments,
        "keyless_segments": arrivals.keyless_segments,
        "gaps": arrivals.gaps,
        "source_late_s": published.late_s,
    }


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} ms"


def _offset(value: float | None) -> str:
    if value is None:
        return "offset unknown"
    if abs(value) < 0.5:
        return "in sync with the picture"
    return f"{abs(value):.0f} ms {'late' if value > 0 else 'early'}"


def _short(body: Mapping[str, Any], most: int = 66) -> str:
    import json

    text = json.dumps(body, separators=(", ", ": "))
    return text if len(text) <= most else text[: most - 3] + "..."
