"""What a run comes to: one flat line of figures, and in words every bound that was broken."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from . import figures
from .run import Found
from .stream import Stream

#: Bounds of issue "The stream outlives everything".
GAP_MS = 200.0
AV_OFFSET_MS = 40.0
BACK_AFTER_BOOT_S = 2.0
HANG_S = 10.0
#: A process that grows by more is not flat: 30 MB in an hour. Below it a run of minutes shows the allocator alone.
SLOPE_KB_PER_MIN = 512.0
SLOPE_FROM_S = 300.0
#: How much later than it is so we may see that an engine serves.
_LOOK_S = 0.1
_LEDGER = ("received", "processed", "failed", "passed_through", "dropped", "in_flight", "repeated", "published")


def back_after(found: Found) -> list[tuple[float, float | None, float | None]]:
    """For each kill: when, seconds until the first processed picture was seen, and the new engine's own boot time."""
    if found.seen is None:
        return []
    result = []
    for killed_at in found.kills:
        # One that was killed before it served is passed over: the time counts until a picture is there.
        boot = next((each for each in found.seen.boots if each.began_at > killed_at and each.serving_at), None)
        seen = None if boot is None else _first_processed(found.streams, boot.serving_at - _LOOK_S)
        result.append((killed_at, None if seen is None else seen - killed_at, None if boot is None else boot.seconds))
    return result


def _first_processed(streams: Iterable[Stream], after: float) -> float | None:
    """Monotonic time at which the first picture was seen that an engine has made which serves since ``after``. Where
    the graph's work cannot be seen, the shim's own count has to do."""
    moments: list[float] = []
    for stream in streams:
        arrived = stream.viewer.view.arrived
        visible = [arrived[pts] for pts in stream.judged.processed_pts if pts in arrived]
        if not visible:
            before = max((count for at, count in stream.processed_at if at <= after), default=0)
            visible = [at for at, count in stream.processed_at if at > after and count > before]
        moments += [at for at in visible if at > after]
    return min(moments, default=None)


def line(found: Found) -> dict[str, Any]:
    """The flat figures."""
    judged = [stream.judged for stream in found.streams]
    boots = [each.seconds for each in found.seen.boots if each.seconds] if found.seen else []
    memory = found.seen.memory if found.seen else None
    shims = set(found.seen.shim_pids) if found.seen else set()
    back = [None if seen is None else round(seen, 2) for _, seen, _ in back_after(found)]
    return {
        "seed": found.plan.seed,
        "seconds": found.plan.seconds,
        "graph": found.plan.graph,
        "faults": len(found.plan.events),
        "streams": len(found.streams),
        "kills": len(found.kills),
        "frames_in": sum(len(stream.source.account.frames) for stream in found.streams),
        "frames_out": sum(len(stream.viewer.view.order) for stream in found.streams),
        "max_output_gap_ms": round(max((each.gap_ms for each in judged), default=0.0), 1),
        "audio_samples_lost": sum(each.samples_lost for each in judged),
        "audio_samples_excused": sum(each.samples_excused for each in judged),
        "ledger_exact": not any(stream.inexact for stream in found.streams),
        "ledger_polls": sum(stream.polls for stream in found.streams),
        "av_offset_p99_ms": figures.p99([abs(ms) for each in judged for ms in each.offsets_ms]),
        "latency_p99_ms": figures.p99([ms for each in judged for ms in each.latencies_ms]),
        "leaked": sum(found.leaked.values()) + len(found.leftovers),
        "processed_back_s": back,
        "engine_boot_s": max(boots, default=None),
        "hang_repaired_s": max(found.hang_repaired_s, default=None),
        "memory_slope_kb_per_min_shim": memory.slope_kb_per_min(shims) if memory else None,
        "memory_slope_kb_per_min_engine": memory.slope_kb_per_min(set(memory.samples) - shims) if memory else None,
        "source_late_ms": round(max((s.source.account.late_s for s in found.streams), default=0.0) * 1000),
    }


def ledger(found: Found) -> str:
    """The frames of all streams, added up."""
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for stream in found.streams:
        total.update({name: stream.ledger.get(name, 0) for name in _LEDGER})
        for outcome, each in (stream.ledger.get("reasons") or {}).items():
            reasons.update({f"{outcome} {reason}": count for reason, count in each.items()})
    rows = [f"  {name:<16}{total[name]:>8}" for name in _LEDGER]
    rows += [f"    {name:<24}{count:>8}" for name, count in sorted(reasons.items())]
    return "\n".join(["ledger of frames", *rows])


def reasons(found: Found) -> list[str]:
    """Every bound that was broken, in words."""
    facts = line(found)
    seen = found.seen
    wrong = list(found.wrong)
    if seen is None:
        return [*wrong, "the programs did not come up"]
    if (lives := len(seen.shim_pids)) != 1 + found.shim_kills:
        wrong.append(f"the shim was killed {found.shim_kills} times and lived {lives} times: it crashed")
    if (lives := len(seen.boots)) != 1 + len(found.kills):
        wrong.append(f"the engine was taken away {len(found.kills)} times and lived {lives} times")
    if found.exit_code not in (0, None):
        wrong.append(f"supervisord ended with {found.exit_code}")
    if found.leaked:
        wrong.append(f"left over in a process: {json.dumps(found.leaked)}")
    if found.leftovers:
        wrong.append(f"left over after the end: {'; '.join(found.leftovers)}")
    for stream in found.streams:
        wrong += _of_stream(stream, lossless=not any(event.lossy for event in found.plan.events))
    if facts["max_output_gap_ms"] > GAP_MS:
        wrong.append(f"a gap of {facts['max_output_gap_ms']:.0f} ms in output pts, {GAP_MS:.0f} are allowed")
    if facts["audio_samples_lost"]:
        wrong.append(f"{facts['audio_samples_lost']} samples of sound were lost")
    if (offset := facts["av_offset_p99_ms"]) is not None and offset >= AV_OFFSET_MS:
        wrong.append(f"sound and picture are {offset} ms apart (p99), {AV_OFFSET_MS:.0f} are allowed")
    wrong += _of_processes(found, facts)
    return wrong


def _of_stream(stream: Stream, *, lossless: bool) -> list[str]:
    judged, view, sent = stream.judged, stream.viewer.view, stream.source.account
    wrong = [f"an account of frames does not add up: {text}" for text in stream.inexact[:2]]
    if judged.backwards:
        wrong.append(f"{judged.backwards} pictures had a pts that was not above the one before")
    if judged.misplaced:
        some = ", ".join(f"at {at} s by {ticks} ticks" for at, ticks in judged.misplaced[:3])
        wrong.append(f"{len(judged.misplaced)} pictures came with another pts than their own: {some}")
    if view.keyless_segments:
        wrong.append(f"{view.keyless_segments} output segments did not begin with a keyframe")
    if lossless and stream.ledger:
        if stream.ledger["received"] != len(sent.frames):
            wrong.append(f"{len(sent.frames)} frames were sent, the shim counts {stream.ledger['received']}")
        if stream.ledger["published"] != len(view.order):
            wrong.append(f"{len(view.order)} frames were seen, the shim counts {stream.ledger['published']}")
        if view.errors or judged.unreadable:
            wrong.append(f"the viewer met {view.errors} errors and {judged.unreadable} unreadable pictures")
    return wrong


def _of_processes(found: Found, facts: dict[str, Any]) -> list[str]:
    wrong = []
    plan = found.plan
    if plan.only_kills:
        rows = back_after(found)
        for number, (killed_at, back, boot) in enumerate(rows, 1):
            # On a slow machine the next kill may come before this engine had its time.
            next_at = rows[number][0] if number < len(rows) else math.inf
            if boot is not None and next_at < killed_at + boot + BACK_AFTER_BOOT_S:
                continue
            if back is None or boot is None:
                wrong.append(f"after kill {number} no processed picture came back")
            elif back > boot + BACK_AFTER_BOOT_S:
                wrong.append(
                    f"after kill {number} processed pictures were back in {back:.1f} s; the engine boots in {boot}"
                )
    late = sum(seconds > HANG_S for seconds in found.hang_repaired_s)
    if late:
        wrong.append(f"a hung engine was not restarted within {HANG_S:.0f} s, {late} times")
    if plan.graph == "slow" and (latency := facts["latency_p99_ms"]) is not None:
        # A camera that falls behind is jitter, and jitter is allowed for (stream/pacing.py).
        limit = found.budget_ms + 1000 / plan.recipe.fps + facts["source_late_ms"]
        if latency > limit:
            wrong.append(
                f"the output is {latency:.0f} ms late (p99); budget, a frame and the camera's own lateness are "
                f"{limit:.0f} ms"
            )
    if plan.seconds >= SLOPE_FROM_S:
        for name in ("shim", "engine"):
            slope = facts[f"memory_slope_kb_per_min_{name}"]
            if slope is not None and slope > SLOPE_KB_PER_MIN:
                wrong.append(f"the {name} grows by {slope:.0f} kB a minute")
    return wrong
