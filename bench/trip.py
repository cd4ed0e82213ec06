"""The whole trip of a frame, HTTP in to HTTP out through both programs, against its codec in the same run.

The graph makes a view of the whole picture: both conversions, the lane and the plan are in the trip, work on pixels
is not. Codec: CPU time of the thread around decode and encode inside the shim, so that the ratio holds on a noisy
machine; also measured in a process of its own. HTTP: the same bytes at the same moments, in the pieces that the
sockets took, through our Subscriber and Publisher and nothing else. Everything is a median over windows of equally
many frames.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

from gateway_shim.localnet.source import publish_file
from gateway_shim.media.ts import PACKET_BYTES
from gateway_shim.trickle.publisher import Publisher
from gateway_shim.trickle.subscriber import Subscriber

from . import material
from .appliance import (
    AHEAD,
    PASS_THROUGH,
    ROOT,
    Appliance,
    Reading,
    Throttle,
    Watched,
    WrongOutput,
    check,
    cpu_s,
    crop,
    running,
)
from .goals import most

#: Windows of a run, and frames of one: many visits of the engine, so that none of them straddles much of a window.
#: Forty small pictures pass in a tenth of a second: five windows of them once gave 0.29 where nine gave 0.21 to 0.25.
WINDOWS = 9
QUICK_WINDOWS = {"512": 11, "720p": 7, "1080p": 5}
#: HTTP by itself need not be slower than this on average: each piece still comes when the one before is long gone.
QUICK_HTTP_INTERVAL_MS = 15.0
WINDOW = 40
WARM_UP = 40
#: Windows at the end in which every stage is timed, behind one in which that begins.
STAGE_WINDOWS = 3
#: Frames after the last window: the end of a stream, where nothing is left to decode, is no part of its steady state.
TAIL = AHEAD + 6


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


def stages(windows: Sequence[dict[str, float]], http_ms: float, size: str) -> dict[str, float]:
    """CPU milliseconds a frame by stage, of windows in which all are timed.

    ``python``: what no watch was around, which is the programs' own Python, their event loops, the lane but for the
    copy into its slot, and the watches themselves, 0.01 to 0.02 ms.
    """
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
    total = median(row["shim"] + row["engine"] for row in windows)
    found["python"] = total - sum(found.values())
    found["total"] = total
    return {f"cpu_{name}_{size}_ms": value for name, value in found.items()}


def pictures(data: bytes) -> list[int]:
    """Bytes of each picture of an output, with the tables before it, if there are any."""
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


def pieces(taken: Sequence[tuple[int, int]], sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Of each piece that a socket took: its segment, its bytes, and how many pictures, of these sizes, are in it and
    before it, one that is cut included."""
    ends, found, sent = list(accumulate(sizes)), [], 0
    for segment, size in taken:
        sent += size
        found.append((segment, size, min(bisect_left(ends, sent) + 1, len(ends))))
    return found


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


async def http_alone(appliance: Appliance, trip: Watched, clip: Path, pace: float, marks: range) -> float:
    """CPU milliseconds a frame of the HTTP of ``trip``: the same bytes at the same moments, out in the pieces that
    the sockets took. pace: of its moments, 1 for those that it had. Raises WrongOutput."""
    script = appliance.folder / "script.json"
    sizes = pictures(trip.path.read_bytes())
    if len(sizes) != len(trip.written):
        raise WrongOutput(f"the output of {len(trip.written)} frames has {len(sizes)} pictures")
    frames = marks[-1] + TAIL
    written = [piece for piece in pieces(trip.taken, sizes) if piece[2] <= frames]
    script.write_text(json.dumps({"units": trip.written[:frames], "pieces": written}))
    urls = [appliance.broker.create(name, "video/MP2T") for name in ("http", "http-out")]
    readings: list[tuple[int, float]] = []
    due, wanted, received = sum(sizes[: marks[0]]), marks[0], 0
    moments = [pace * (at - trip.sent_at[0]) for at in trip.sent_at[:frames]]
    try:
        async with (
            _alone("http", *urls, str(script)) as process,
            Publisher(appliance.http, urls[0], content_type="video/MP2T") as publisher,
        ):
            await appliance.broker.wait_for_reader("http", 0)
            throttle = Throttle(publisher, moments)
            publishing = asyncio.create_task(
                publish_file(throttle, clip, duration_s=(frames - 0.5) / material.RATE, realtime=False)  # type: ignore[arg-type]
            )
            async with asyncio.timeout(15 + moments[-1]), Subscriber(appliance.http, urls[1]) as viewer:
                while wanted <= marks[-1]:
                    segment = await anext(viewer)
                    async for data in segment:
                        received += len(data)
                        while received >= due and wanted <= marks[-1]:
                            readings.append((wanted, cpu_s(process.pid)))
                            wanted += WINDOW
                            due = sum(sizes[:wanted])
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
    """One trip, checked: ``windows`` with a watch around the codec alone, a useless one, and STAGE_WINDOWS."""
    codec_only = WARM_UP + windows * WINDOW
    last = codec_only + (1 + STAGE_WINDOWS) * WINDOW
    marks = range(WARM_UP, last + 1, WINDOW)
    workflow = PASS_THROUGH if passing else crop(*material.SIZES[size])
    interval_s = 1 / material.RATE if live else None
    watched = await appliance.play(
        clip, workflow, last + TAIL, marks=marks, interval_s=interval_s, codec_only=codec_only
    )
    check(watched, last + TAIL, clip)
    return watched, per_frame(watched.readings)


async def run(
    appliance: Appliance,
    clips: dict[str, Path],
    *,
    quick: bool = False,
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
            rows, watched_rows = rows[:windows], rows[windows + 1 :]
            pace = min(1.0, QUICK_HTTP_INTERVAL_MS / middle(rows, "interval")) if quick else 1.0
            http_ms = await http_alone(appliance, watched, clip, pace, marks)
            results |= figures(rows, http_ms, "trip_overhead", size)
            results |= stages(watched_rows, http_ms, size)
            results[f"trip_http_{size}_ms"] = http_ms
            if quick:
                continue
            alone_ms = await codec_alone(clip)
            results[f"trip_codec_alone_{size}_ms"] = alone_ms
            total_ms = median(row["shim"] + row["engine"] for row in rows)
            results[f"trip_overhead_{size}_x_codec_alone"] = (total_ms - alone_ms - http_ms) / alone_ms
            _, rows = await measure(appliance, clip, size, windows, passing=True)
            results |= figures(rows[:windows], http_ms, "trip_passthrough", size)
            watched, rows = await measure(appliance, clip, size, windows, live=True)
            http_ms = await http_alone(appliance, watched, clip, 1.0, marks)
            results[f"trip_live_http_{size}_ms"] = http_ms
            results |= figures(rows[:windows], http_ms, "trip_live", size)
    return results


def table(results: dict[str, float]) -> str:
    """Ratios of each kind of trip, and where the time of a frame goes."""
    lines = ["whole trip through both programs, CPU of everything but codec and HTTP against the codec's", ""]
    sizes = [size for size in material.SIZES if f"trip_overhead_{size}_x_codec" in results]
    lines.append(f"{'':26}" + "".join(f"{size:>9}" for size in sizes))
    lines.append(f"{'goal':26}" + "".join(f"{most(f'trip_overhead_{size}_x_codec'):9.2f}" for size in sizes))
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
