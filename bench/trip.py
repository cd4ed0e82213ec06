"""The whole trip of a frame, HTTP in to HTTP out through both programs, against its codec in the same run.

The graph makes a view of the whole picture: both conversions, the lane and the plan are in the trip, work on pixels
is not. Codec: CPU time of the thread around decode and encode inside the shim, so that the ratio holds on a noisy
machine; also measured in a process of its own. HTTP: the same bytes in the same pieces through our Subscriber and
Publisher and nothing else. Everything is a median over windows of equally many frames.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from gateway_shim.localnet.source import publish_file
from gateway_shim.media.ts import PACKET_BYTES
from gateway_shim.trickle.publisher import Publisher
from gateway_shim.trickle.subscriber import Subscriber

from . import material
from .appliance import (
    PASS_THROUGH,
    ROOT,
    Appliance,
    Reading,
    Watched,
    WrongOutput,
    _Throttle,
    check,
    cpu_s,
    crop,
    running,
)

#: Windows of a run, and frames of one: many visits of the engine, so that none of them straddles much of a window.
#: Forty small pictures pass in a tenth of a second: five windows of them once gave 0.29 where nine gave 0.21 to 0.25.
WINDOWS = 9
QUICK_WINDOWS = {"512": 11, "720p": 7, "1080p": 5}
#: Of HTTP by itself, which differs little from one window to the next, and its pace, which need not be the trip's:
#: each piece still comes when the one before it is long gone, so that every frame pays for its own wake-ups.
QUICK_HTTP_WINDOWS = 3
QUICK_HTTP_INTERVAL_S = 0.015
WINDOW = 40
WARM_UP = 40
#: Frames after the last window: the end of a stream is no part of its steady state.
TAIL = 6
GOALS = {"512": 0.28, "720p": 0.20, "1080p": 0.18}
SEGMENT_FRAMES = 60


def per_frame(readings: Sequence[Reading]) -> list[dict[str, float]]:
    """Milliseconds a frame in each window: stages, both programs, and what lies between two frames."""
    windows = []
    for first, last in pairwise(readings):
        frames = last.frames - first.frames
        row = {name: (last.stages_ns[name] - first.stages_ns[name]) / 1e6 / frames for name in first.stages_ns}
        row["shim"] = 1000 * (last.shim_s - first.shim_s) / frames
        row["engine"] = 1000 * (last.engine_s - first.engine_s) / frames
        row["interval"] = 1000 * (last.at - first.at) / frames
        row["codec"] = row["decode"] + row["encode"]
        windows.append(row)
    return windows


def middle(windows: Sequence[dict[str, float]], name: str) -> float:
    return median(row[name] for row in windows)


def figures(windows: Sequence[dict[str, float]], http_ms: float, prefix: str, size: str) -> dict[str, float]:
    """The ratio, and the milliseconds that it is made of."""
    ratio = median((row["shim"] + row["engine"] - row["codec"] - http_ms) / row["codec"] for row in windows)
    return {
        f"{prefix}_{size}_x_codec": ratio,
        f"{prefix}_{size}_shim_ms": middle(windows, "shim"),
        f"{prefix}_{size}_engine_ms": middle(windows, "engine"),
        f"{prefix}_{size}_codec_ms": middle(windows, "codec"),
        f"{prefix}_{size}_fps": 1000 / middle(windows, "interval"),
    }


def stages(windows: Sequence[dict[str, float]], http_ms: float, lane_ms: float | None, size: str) -> dict[str, float]:
    """CPU milliseconds a frame by stage. ``python``: what no watch was around, which is the programs' own Python,
    their event loops and, where ``lane_ms`` is not known, the lane."""
    measured = {
        "ts": ("ts",),
        "decode": ("decode",),
        "copy": ("copy",),
        "convert": ("forward", "back"),
        "graph": ("graph",),
        "encode": ("encode",),
        "mux": ("mux",),
    }
    found = {name: median(sum(row[part] for part in parts) for row in windows) for name, parts in measured.items()}
    found["http"] = http_ms
    if lane_ms is not None:
        found["lane"] = lane_ms
    total = median(row["shim"] + row["engine"] for row in windows)
    found["python"] = total - sum(found.values())
    found["total"] = total
    return {f"cpu_{name}_{size}_ms": value for name, value in found.items()}


def pieces(data: bytes) -> list[int]:
    """Bytes of each write of an output: a picture with the tables before it, if there are any."""
    starts = []
    after_tables = False
    for at in range(0, len(data), PACKET_BYTES):
        pid = (data[at + 1] & 0x1F) << 8 | data[at + 2]
        begins = bool(data[at + 1] & 0x40)
        if begins and pid == 0:
            starts.append(at)
            after_tables = True
        elif begins and pid == 0x100:
            if not after_tables:
                starts.append(at)
            after_tables = False
    return [last - first for first, last in pairwise([*starts, len(data)])]


@contextlib.asynccontextmanager
async def _alone(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "bench.alone", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def codec_alone(clip: Path, loops: int = 5) -> float:
    """CPU milliseconds a frame of decoding and encoding the clip in a process of its own."""
    async with _alone("codec", str(clip), "--loops", str(loops)) as process:
        output, _ = await process.communicate()
    figures: dict[str, float] = json.loads(output)
    return sum(figures.values())


async def http_alone(appliance: Appliance, clip: Path, trip: Watched, interval_s: float, marks: range) -> float:
    """CPU milliseconds a frame of the HTTP of ``trip``, at the pace that it had. Raises WrongOutput."""
    plan = appliance.folder / "plan.json"
    chunks = pieces(trip.path.read_bytes())
    frames = len(trip.written)
    if len(chunks) != frames:
        raise WrongOutput(f"the output of {frames} frames has {len(chunks)} pieces")
    plan.write_text(json.dumps({"units": trip.written, "chunks": chunks, "segment": SEGMENT_FRAMES}))
    urls = [appliance.broker.create(name, "video/MP2T") for name in ("http", "http-out")]
    readings: list[tuple[int, float]] = []
    frames = marks[-1] + TAIL
    due, wanted, received = sum(chunks[: marks[0]]), marks[0], 0
    try:
        async with (
            _alone("http", *urls, str(plan)) as process,
            Publisher(appliance.http, urls[0], content_type="video/MP2T") as publisher,
        ):
            await appliance.broker.wait_for_reader("http", 0)
            throttle = _Throttle(publisher, interval_s)
            publishing = asyncio.create_task(
                publish_file(throttle, clip, duration_s=(frames - 0.5) / material.RATE, realtime=False)  # type: ignore[arg-type]
            )
            async with asyncio.timeout(15 + frames * interval_s), Subscriber(appliance.http, urls[1]) as viewer:
                while wanted <= marks[-1]:
                    segment = await anext(viewer)
                    async for data in segment:
                        received += len(data)
                        while received >= due and wanted <= marks[-1]:
                            readings.append((wanted, cpu_s(process.pid)))
                            wanted += WINDOW
                            due = sum(chunks[:wanted])
                        if wanted > marks[-1]:
                            break
            await publishing
    finally:
        for name in ("http", "http-out"):
            await appliance.broker.delete(name)
    return median(1000 * (last[1] - first[1]) / (last[0] - first[0]) for first, last in pairwise(readings))


async def measure(
    appliance: Appliance,
    clip: Path,
    size: str,
    windows: int,
    *,
    live: bool = False,
    passing: bool = False,
) -> tuple[Watched, list[dict[str, float]]]:
    """One trip, checked."""
    last = WARM_UP + windows * WINDOW
    marks = range(WARM_UP, last + 1, WINDOW)
    workflow = PASS_THROUGH if passing else crop(*material.SIZES[size])
    interval_s = 1 / material.RATE if live else None
    watched = await appliance.play(clip, workflow, last + TAIL, marks=marks, interval_s=interval_s)
    check(watched, last + TAIL, clip)
    return watched, per_frame(watched.readings)


async def run(
    appliance: Appliance,
    clips: dict[str, Path],
    *,
    quick: bool = False,
    lane_ms: dict[str, float] | None = None,
    sizes: Sequence[str] = tuple(material.SIZES),
) -> dict[str, float]:
    """``trip_overhead_{size}_x_codec`` and what it is made of; ``trip_live_*`` paced at 30 fps;
    ``trip_passthrough_*`` without conversions and plan; ``trip_http_{size}_ms``; ``cpu_{stage}_{size}_ms``.

    Raises WrongOutput. Without ``quick`` about two minutes.
    """
    results: dict[str, float] = {}
    async with appliance.shim():
        for size in sizes:
            windows = QUICK_WINDOWS[size] if quick else WINDOWS
            marks = range(WARM_UP, WARM_UP + windows * WINDOW + 1, WINDOW)
            clip = clips[size]
            watched, rows = await measure(appliance, clip, size, windows)
            interval_s = middle(rows, "interval") / 1000
            if quick:
                pace_s = min(interval_s, QUICK_HTTP_INTERVAL_S)
                http_ms = await http_alone(appliance, clip, watched, pace_s, marks[: QUICK_HTTP_WINDOWS + 1])
            else:
                http_ms = await http_alone(appliance, clip, watched, interval_s, marks)
            results |= figures(rows, http_ms, "trip_overhead", size)
            results |= stages(rows, http_ms, (lane_ms or {}).get(size), size)
            results[f"trip_http_{size}_ms"] = http_ms
            if quick:
                continue
            alone_ms = await codec_alone(clip)
            results[f"trip_codec_alone_{size}_ms"] = alone_ms
            total_ms = median(row["shim"] + row["engine"] for row in rows)
            results[f"trip_overhead_{size}_x_codec_alone"] = (total_ms - alone_ms - http_ms) / alone_ms
            _, rows = await measure(appliance, clip, size, windows, passing=True)
            results |= figures(rows, http_ms, "trip_passthrough", size)
            watched, rows = await measure(appliance, clip, size, windows, live=True)
            http_ms = await http_alone(appliance, clip, watched, 1 / material.RATE, marks)
            results[f"trip_live_http_{size}_ms"] = http_ms
            results |= figures(rows, http_ms, "trip_live", size)
    return results


def table(results: dict[str, float]) -> str:
    """Ratios of each kind of trip, and where the time of a frame goes."""
    lines = ["whole trip through both programs, CPU of everything but codec and HTTP against the codec's", ""]
    sizes = [size for size in material.SIZES if f"trip_overhead_{size}_x_codec" in results]
    lines.append(f"{'':26}" + "".join(f"{size:>9}" for size in sizes))
    lines.append(f"{'goal':26}" + "".join(f"{GOALS[size]:9.2f}" for size in sizes))
    for name, text in {
        "trip_overhead": "as fast as it goes",
        "trip_live": "at 30 fps",
        "trip_passthrough": "pass-through",
    }.items():
        values = [results.get(f"{name}_{size}_x_codec") for size in sizes]
        if any(value is not None for value in values):
            lines.append(f"{text:26}" + "".join(f"{'':>9}" if value is None else f"{value:9.2f}" for value in values))
    lines += ["", "CPU ms a frame"]
    names = [key.removeprefix("cpu_").rsplit("_", 2)[0] for key in results if key.startswith("cpu_")]
    for name in dict.fromkeys(names):
        values = [results.get(f"cpu_{name}_{size}_ms") for size in sizes]
        lines.append(f"{name:26}" + "".join(f"{'':>9}" if value is None else f"{value:9.2f}" for value in values))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.trip", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sizes", default=",".join(material.SIZES), help="separated by commas")
    arguments = parser.parse_args(argv)
    sizes = arguments.sizes.split(",")

    async def go() -> dict[str, float]:
        async with running() as appliance:
            clips = {size: material.write(appliance.folder / f"{size}.mp4", size) for size in sizes}
            return await run(appliance, clips, quick=arguments.quick, sizes=sizes)

    results = asyncio.run(go())
    print(table(results))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
