"""What we say about ourselves: computed in one place from facts, then put into the words of each peer.

Pure. A failed update or a broken node is a fact about one stream and never changes what is said here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

#: How long an engine that had been ready may be gone before we call it an error: what ai-runner allows a pipeline to
#: load (process_guardian.py, 180 s). An orchestrator that hears ERROR at its start exits, so it is not said lightly.
ENGINE_GONE_IS_ERROR_S = 180.0


class Health(StrEnum):
    """The four words that go-livepeer knows (ai/worker/container.go)."""

    LOADING = "LOADING"
    IDLE = "IDLE"  # ready, no stream
    OK = "OK"  # streaming
    ERROR = "ERROR"


@dataclass(frozen=True)
class Facts:
    """What is so at one moment."""

    engine: str  # state of the engine that is best off, see ``best_state``
    engine_dead_s: float  # how long it has been DEAD; 0 otherwise
    streams: int  # active
    capacity: int
    engines: tuple[Mapping[str, Any], ...] = ()  # each one's ``EngineClient.as_json``
    codecs: str = ""  # what streams begin with, and why not a GPU


def best_state(states: Iterable[str]) -> str:
    """One state for several engines: one that is ready is enough. ABSENT is "not seen yet"."""
    seen = set(states)
    return next((state for state in ("READY", "LOADING", "BROKEN", "DEAD") if state in seen), "ABSENT")


def health(facts: Facts) -> Health:
    """An engine that was never ready is loading, however long it takes. Streams outlive it: frames pass through."""
    if facts.engine == "BROKEN" or (facts.engine == "DEAD" and facts.engine_dead_s >= ENGINE_GONE_IS_ERROR_S):
        return Health.ERROR
    if facts.streams:
        return Health.OK
    return Health.IDLE if facts.engine == "READY" else Health.LOADING


def reason(facts: Facts) -> str:
    """One sentence for people, empty when all is well."""
    return {
        "ABSENT": "no engine has answered yet",
        "LOADING": next((engine["reason"] for engine in facts.engines if engine["reason"]), "the engine is loading"),
        "BROKEN": "the engine's ComfyUI did not load: see log/engine-0.log in the run directory; "
        "COMFYUI_DIR names the one to load, `none` runs without",
        "DEAD": f"the engine has been gone for {facts.engine_dead_s:.0f} s{_last_end(facts)}",
    }.get(facts.engine, "")


def _last_end(facts: Facts) -> str:
    ends = [engine["last_end"] for engine in facts.engines if engine["last_end"]]
    return f": {max(ends, key=lambda end: end['at_ms'])['reason']}" if ends else ""


def state_body(facts: Facts) -> dict[str, Any]:
    """pytrickle's state object (protocol.md 5.1)."""
    word = health(facts)
    return {
        "status": word.value,
        "state": word.value,
        "error_message": reason(facts) if word is Health.ERROR else None,
        "pipeline_ready": facts.engine == "READY",
        "active_streams": facts.streams,
        "startup_complete": facts.engine in ("READY", "BROKEN", "DEAD"),
        "pipeline_state": word.value,
        "additional_info": {
            "engine": facts.engine,
            "reason": reason(facts),
            "capacity": facts.capacity,
            "engines": list(facts.engines),
            "codecs": facts.codecs,
        },
    }


def status_body(
    facts: Facts, streams: Mapping[str, Mapping[str, Any]], *, tasks: int, threads: int
) -> dict[str, Any]:
    """``GET /stream/status``: the state object, what pytrickle adds to it, and each stream's own status event.

    streams: stream id -> status event (protocol.md 4.7). tasks, threads: of the process; what a stream began ends
    with it, so that two idle moments show the same numbers. ``fps`` and ``current_params`` are those of the only
    stream, or null: peers that read them know of one stream.
    """
    only = next(iter(streams.values())) if len(streams) == 1 else {}
    inference = only.get("inference_status") or {}
    state = state_body(facts)
    state["additional_info"] |= {"tasks": tasks, "threads": threads}
    return state | {
        "client_active": bool(streams),
        "fps": inference.get("fps"),
        "current_params": inference.get("last_params"),
        "streams": {stream_id: dict(event) for stream_id, event in streams.items()},
    }


def hardware_body(pipeline: str, model_id: str, devices: Iterable[Any], *, usage: bool) -> dict[str, Any]:
    """``/hardware/info``, or ``/hardware/stats`` with ``usage`` (protocol.md 4.3).

    Without a GPU the inner object is {}.

    devices: ``proto`` Device messages; memory in bytes, utilization in percent.
    """
    gpus = {}
    # Several engines may share a GPU, which is still one.
    once = {device.uuid or id(device): device for device in devices if device.type not in ("", "cpu")}
    for index, device in enumerate(once.values()):
        gpu: dict[str, Any] = {
            "id": device.uuid,
            "name": device.name,
            "memory_total": device.memory_total_bytes,
            "memory_free": device.memory_free_bytes,
        }
        if usage:
            # Whole numbers: go-livepeer's generated client declares integers (ai/worker/runner.gen.go).
            gpu["utilization_compute"] = round(device.utilization_compute)
            gpu["utilization_memory"] = round(device.utilization_memory)
        else:
            gpu["major"] = device.compute_major
            gpu["minor"] = device.compute_minor
        gpus[str(index)] = gpu
    return {"pipeline": pipeline, "model_id": model_id, ("gpu_stats" if usage else "gpu_info"): gpus}
