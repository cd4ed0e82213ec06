"""The state of one stream as its ``status`` event names it, computed from facts in one place.

Thresholds are those that gateways know from ai-runner's process guardian (protocol.md 4.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

STALE_INPUT_S = 2.0
LOW_INPUT_FPS = 15.0
STALE_OUTPUT_S = 2.0
LOW_OUTPUT_FPS = 10.0
LOW_OUTPUT_SHARE = 0.8
RECENT_ERROR_S = 15.0
RECENT_RESTART_S = 60.0
INPUT_ERROR_S = 90.0
SETTLING_S = 3.0

#: Of the input's rate: a graph that does this share of it is not called slow, since both are measured.
FAST_ENOUGH_SHARE = 0.95


class StreamState(StrEnum):
    LOADING = "LOADING"
    OFFLINE = "OFFLINE"
    ONLINE = "ONLINE"
    DEGRADED_INPUT = "DEGRADED_INPUT"
    DEGRADED_INFERENCE = "DEGRADED_INFERENCE"
    ERROR = "ERROR"


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """All ages in seconds; None where the thing has not happened."""

    running: bool
    engine_open: bool
    ever_processed: bool
    age_s: float
    input_age_s: float | None
    input_fps: float
    output_age_s: float | None
    inference_fps: float
    error_age_s: float | None
    restart_age_s: float | None
    workflow_refused: bool


def stream_state(facts: StreamFacts) -> StreamState:
    """One state from the facts; the first rule that holds."""
    if not facts.running:
        return StreamState.OFFLINE
    if facts.input_age_s is None:
        return StreamState.LOADING if facts.age_s < INPUT_ERROR_S else StreamState.ERROR
    if facts.input_age_s > INPUT_ERROR_S:
        return StreamState.ERROR
    if facts.input_age_s > STALE_INPUT_S:
        return StreamState.DEGRADED_INPUT
    if facts.workflow_refused:
        return StreamState.DEGRADED_INFERENCE
    if not facts.ever_processed:
        return StreamState.LOADING if facts.restart_age_s is None else StreamState.DEGRADED_INFERENCE
    recently = (facts.error_age_s is not None and facts.error_age_s < RECENT_ERROR_S) or (
        facts.restart_age_s is not None and facts.restart_age_s < RECENT_RESTART_S
    )
    settled = facts.age_s > SETTLING_S
    slow = facts.inference_fps < min(LOW_OUTPUT_FPS, LOW_OUTPUT_SHARE * facts.input_fps)
    stale = facts.output_age_s is None or facts.output_age_s > STALE_OUTPUT_S
    if recently or not facts.engine_open or (settled and (slow or stale)):
        return StreamState.DEGRADED_INFERENCE
    if settled and facts.input_fps < LOW_INPUT_FPS:
        return StreamState.DEGRADED_INPUT
    return StreamState.ONLINE


def slow_hint(input_fps: float, sustainable_fps: float | None, budget_s: float) -> str | None:
    """What to tell the operator of a graph that is slower than its input or its budget; None otherwise."""
    if sustainable_fps is None:
        return None
    if sustainable_fps * budget_s < 1:
        return (
            f"a frame takes the graph {1000 / sustainable_fps:.0f} ms, longer than the latency budget of "
            f"{1000 * budget_s:.0f} ms: none is in time; raise latency_budget_ms"
        )
    if sustainable_fps >= FAST_ENOUGH_SHARE * input_fps:
        return None
    return (
        f"the graph does {sustainable_fps:.1f} of {input_fps:.1f} frames a second, the last picture stands in for "
        f"the others; with max_framerate {max(int(sustainable_fps), 1)} each would be one of its own"
    )
