"""How long a frame stays inside the appliance, and how long the first one does, at 30 frames a second.

The clock is read inside the shim: ``came`` when the bytes that complete an access unit were read from the socket's
buffer, ``left`` when its picture's bytes are handed to the socket. Outside means from the source's write to the
viewer's read, with the broker between them twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gateway_shim.localnet import measure

from . import material
from .appliance import PASS_THROUGH, Appliance, Watched, WrongOutput, check, crop, running

FRAMES, QUICK_FRAMES = 300, 120
#: Frames before the first that counts: the session opens and the pools fill meanwhile.
WARM_UP = 15
STARTS, QUICK_STARTS = 9, 5


def read(path: Path) -> dict[str, dict[int, tuple[float, ...]]]:
    """What ``timed.Moments`` wrote: times by pts, for each kind."""
    moments: dict[str, dict[int, tuple[float, ...]]] = {"came": {}, "decoded": {}, "left": {}}
    for line in path.read_text().splitlines():
        kind, pts, *times = line.split()
        moments[kind][int(pts)] = tuple(float(at) for at in times)
    return moments


def quantiles(values_ms: Sequence[float], name: str) -> dict[str, float]:
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    found = {f"{name}_{key}_ms": measure.percentile(values_ms, share) for key, share in shares.items()}
    return {key: value for key, value in found.items() if value is not None}


def inside(moments: Mapping[str, Mapping[int, tuple[float, ...]]], frames: int, name: str) -> dict[str, float]:
    """Raises WrongOutput where a frame has no complete account."""
    known = [pts for pts in sorted(moments["came"]) if pts in moments["left"] and pts in moments["decoded"]]
    if len(known) != frames:
        raise WrongOutput(f"the clock saw {len(known)} of {frames} frames come, decode and leave")
    known = known[WARM_UP:]
    took = [1000 * (moments["left"][pts][0] - moments["came"][pts][0]) for pts in known]
    results = quantiles(took, f"latency_{name}")
    lags = [1000 * (moments["decoded"][pts][0] - moments["came"][pts][0]) for pts in known]
    results[f"decode_lag_{name}_ms"] = median(lags)
    results[f"decode_lag_{name}_p99_ms"] = measure.percentile(lags, 0.99) or 0.0
    return results


async def live(
    appliance: Appliance, clip: Path, workflow: dict[str, Any], frames: int, moments: Path
) -> tuple[Watched, dict[str, dict[int, tuple[float, ...]]]]:
    """A paced stream through a shim with a clock, with the latency budget that it has by default."""
    async with appliance.shim(moments=moments, budget_ms=400):
        watched = await appliance.play(clip, workflow, frames, marks=range(0), interval_s=1 / material.RATE)
    check(watched, frames, clip)
    return watched, read(moments)


async def first_pictures(appliance: Appliance, clip: Path, workflow: dict[str, Any], starts: int) -> list[float]:
    """Milliseconds from the first keyframe's last byte to its picture's first, of streams one after another."""
    took = []
    path = appliance.folder / "first.moments"
    async with appliance.shim(moments=path, budget_ms=2000):
        for _ in range(starts):
            before = len(path.read_text().splitlines())
            watched = await appliance.play(clip, workflow, 3, marks=range(0), interval_s=1 / material.RATE)
            if watched.frames.get("processed") != 3:
                raise WrongOutput(f"of the first 3 frames not all were processed: {watched.frames}")
            part = appliance.folder / "one.moments"
            part.write_text("\n".join(path.read_text().splitlines()[before:]))
            moments = read(part)
            first = min(moments["came"])
            took.append(1000 * (moments["left"][first][0] - moments["came"][first][0]))
    return took


async def run(appliance: Appliance, clips: Mapping[str, Path], *, quick: bool = False) -> dict[str, float]:
    """``latency_inside_720p_*``, ``latency_outside_720p_*``, ``decode_lag_ms``, ``first_picture_ms``; the same with a
    graph that converts both ways as ``latency_graph_720p_*`` and ``first_picture_graph_ms``. Raises WrongOutput."""
    frames = QUICK_FRAMES if quick else FRAMES
    clip = clips["720p"]
    path = appliance.folder / "live.moments"
    watched, moments = await live(appliance, clip, PASS_THROUGH, frames, path)
    results = inside(moments, frames, "inside_720p")
    results["decode_lag_ms"] = results.pop("decode_lag_inside_720p_ms")
    results["decode_lag_p99_ms"] = results.pop("decode_lag_inside_720p_p99_ms")
    sent = dict(list(watched.published.video.items())[WARM_UP:])
    outside = measure.latencies_ms(sent, watched.arrivals.video)
    results |= quantiles(outside, "latency_outside_720p")
    starts = QUICK_STARTS if quick else STARTS
    results["first_picture_ms"] = median(await first_pictures(appliance, clip, PASS_THROUGH, starts))
    if not quick:
        graph = crop(*material.SIZES["720p"])
        _, moments = await live(appliance, clip, graph, frames, path)
        results |= inside(moments, frames, "graph_720p")
        results["first_picture_graph_ms"] = median(await first_pictures(appliance, clip, graph, starts))
    return results


def table(results: Mapping[str, float]) -> str:
    lines = ["latency in ms, 720p at 30 fps", "", f"{'':26}{'p50':>8}{'p95':>8}{'p99':>8}"]
    for name, text in {
        "inside_720p": "inside, pass-through",
        "graph_720p": "inside, with a graph",
        "outside_720p": "source to viewer",
    }.items():
        if f"latency_{name}_p50_ms" in results:
            parts = [results[f"latency_{name}_{part}_ms"] for part in ("p50", "p95", "p99")]
            lines.append(f"{text:26}" + "".join(f"{value:8.1f}" for value in parts))
    lines.append(f"last byte of a unit to its decoder {results['decode_lag_ms']:.2f}")
    lines.append(f"first picture {results['first_picture_ms']:.0f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)

    async def go() -> dict[str, float]:
        async with running() as appliance:
            clips = {"720p": material.write(appliance.folder / "720p.mp4", "720p")}
            return await run(appliance, clips, quick=arguments.quick)

    results = asyncio.run(go())
    print(table(results))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
