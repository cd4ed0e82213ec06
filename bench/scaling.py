"""Many streams, and sizes from 360p to 2160p: what a frame costs, what a stream weighs, and what goes in real time.

All streams of a run go through one shim and one engine with the graph of the trip, at 30 frames a second each. In
real time means: nothing lost, everything processed, and the last picture out soon after its bytes were in.
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
from .appliance import PASS_THROUGH, Appliance, Watched, WrongOutput, check, cpu_s, crop, memory_bytes, running

STREAMS = {"512": (1, 2, 4, 8), "720p": (1, 2, 4)}
SECONDS = 3
#: Height and width by name, with the bits per second of an ingest of that size.
LADDER = {
    "360p": (640, 360, 1_000_000),
    "480p": (854, 480, 1_500_000),
    "720p": (1280, 720, 3_000_000),
    "1080p": (1920, 1080, 6_000_000),
    "1440p": (2560, 1440, 10_000_000),
    "2160p": (3840, 2160, 18_000_000),
}
#: A stream whose last frames are later than this is not in real time: it is filling a queue.
LATE_MS = 400
LONG_S = 20


def lateness_ms(watched: Watched) -> float:
    """Median of the last second, source to viewer."""
    sent = dict(list(watched.published.video.items())[-material.RATE :])
    return median(measure.latencies_ms(sent, watched.arrivals.video))


async def together(
    appliance: Appliance, clip: Path, workflow: Mapping[str, Any], streams: int, frames: int
) -> tuple[list[Watched], dict[str, float]]:
    """``streams`` at once, paced. What they used: CPU seconds for each second of media."""
    before = cpu_s(appliance.shim_pid) + cpu_s(appliance.engine_pid)
    play = [
        appliance.play(clip, workflow, frames, marks=range(0), interval_s=1 / material.RATE) for _ in range(streams)
    ]
    watched = await asyncio.gather(*play)
    after = cpu_s(appliance.shim_pid) + cpu_s(appliance.engine_pid)
    return watched, {"cpu": (after - before) / (frames / material.RATE)}


async def another(appliance: Appliance, clip: Path, size: str) -> dict[str, float]:
    """``memory_stream_{size}_mb``: what the shim grows by when a stream begins beside one that runs, both paced and
    with the budget that streams have by default. Nothing where they are not in real time: queues fill then, as they
    do where two begin at once. Raises WrongOutput."""
    workflow = crop(*material.SIZES[size])

    def play(seconds: float) -> asyncio.Task[Watched]:
        frames, interval_s = round(seconds * material.RATE), 1 / material.RATE
        return asyncio.create_task(
            appliance.play(clip, workflow, frames, marks=range(0), interval_s=interval_s), name="stream"
        )

    async with appliance.shim(budget_ms=400):
        first = play(3 * SECONDS)
        await asyncio.sleep(SECONDS)
        before = memory_bytes(appliance.shim_pid)
        second = play(1.5 * SECONDS)
        await asyncio.sleep(SECONDS)
        after = memory_bytes(appliance.shim_pid)
        watched = await asyncio.gather(first, second)
    for one, frames in zip(watched, (3 * SECONDS * material.RATE, round(1.5 * SECONDS * material.RATE)), strict=True):
        check(one, frames, clip, processed=False)
        one.path.unlink()
    if max(map(lateness_ms, watched)) > LATE_MS:
        return {}
    return {f"memory_stream_{size}_mb": (after - before) / 1e6}


async def many(appliance: Appliance, clip: Path, size: str) -> dict[str, float]:
    """Keys ``scaling_{size}_{streams}_*``. Raises WrongOutput where frames are wrong; that more streams than the
    machine can take are late is a figure."""
    results: dict[str, float] = {}
    workflow = crop(*material.SIZES[size])
    frames = SECONDS * material.RATE
    async with appliance.shim(budget_ms=3000):
        for streams in STREAMS[size]:
            prefix = f"scaling_{size}_{streams}"
            watched, used = await together(appliance, clip, workflow, streams, frames)
            for one in watched:
                check(one, frames, clip, processed=False)
                one.path.unlink()
            late = max(lateness_ms(one) for one in watched)
            processed = min(one.frames.get("processed", 0) for one in watched)
            results[f"{prefix}_cores"] = used["cpu"]
            results[f"{prefix}_late_ms"] = late
            results[f"{prefix}_real_time"] = float(late < LATE_MS and processed == frames)
    return results


#: Frames under way on the ladder: there is memory for half a second of 2160p in a stream, and none may be late.
LADDER_AHEAD = 6


async def ladder(appliance: Appliance) -> dict[str, float]:
    """CPU milliseconds a frame for each size, ``scaling_{size}_frame_ms``."""
    results: dict[str, float] = {}
    async with appliance.shim():
        for name, (width, height, bit_rate) in LADDER.items():
            clip = material.write_size(appliance.folder / f"ladder-{name}.mp4", width, height, bit_rate)
            frames = material.FRAMES
            marks = range(10, frames - 4, 15)
            watched = await appliance.play(clip, crop(width, height), frames, marks=marks, ahead=LADDER_AHEAD)
            check(watched, frames, clip)
            first, last = watched.readings[0], watched.readings[-1]
            used = last.shim_s + last.engine_s - first.shim_s - first.engine_s
            results[f"scaling_{name}_frame_ms"] = 1000 * used / (last.frames - first.frames)
    return results


async def steady(appliance: Appliance, clip: Path, seconds: float = LONG_S) -> dict[str, float]:
    """1080p30 pass-through: ``steady_1080p_*``; memory of both programs, its second half against its first, from the
    second second on. Raises WrongOutput."""
    frames = round(seconds * material.RATE)
    memory: list[int] = []

    async def look() -> None:
        await asyncio.sleep(2)
        while True:
            memory.append(memory_bytes(appliance.shim_pid) + memory_bytes(appliance.engine_pid))
            await asyncio.sleep(0.5)

    async with appliance.shim(budget_ms=400):
        looking = asyncio.create_task(look())
        try:
            watched = await appliance.play(clip, PASS_THROUGH, frames, marks=range(0), interval_s=1 / material.RATE)
        finally:
            looking.cancel()
    check(watched, frames, clip, processed=False)
    if len(memory) < 4:
        raise WrongOutput("the stream was too short to say anything of its memory")
    half = len(memory) // 2
    return {
        "steady_1080p_late_ms": lateness_ms(watched),
        "steady_1080p_processed_share": watched.frames.get("processed", 0) / frames,
        "steady_1080p_repeated": watched.frames.get("repeated", 0),
        "steady_1080p_growth_mb": (median(memory[half:]) - median(memory[:half])) / 1e6,
        "steady_1080p_memory_mb": memory[-1] / 1e6,
    }


async def run(appliance: Appliance, clips: Mapping[str, Path]) -> dict[str, float]:
    results: dict[str, float] = {}
    for size in STREAMS:
        results |= await many(appliance, clips[size], size)
        results |= await another(appliance, clips[size], size)
    results |= await ladder(appliance)
    return results | await steady(appliance, clips["1080p"])


def table(results: Mapping[str, float]) -> str:
    lines = ["streams at 30 fps each, through one shim and one engine", ""]
    lines.append(f"{'':14}{'cores':>8}{'late ms':>9}  in real time")
    for size, counts in STREAMS.items():
        for streams in counts:
            prefix = f"scaling_{size}_{streams}"
            if f"{prefix}_cores" in results:
                said = "yes" if results[f"{prefix}_real_time"] else "no"
                figures = f"{results[f'{prefix}_cores']:8.2f}{results[f'{prefix}_late_ms']:9.0f}"
                lines.append(f"{streams} x {size:10}{figures}  {said}")
    lines += ["", "size and CPU ms a frame"]
    names = [name for name in LADDER if f"scaling_{name}_frame_ms" in results]
    lines.append("  ".join(f"{name} {results[f'scaling_{name}_frame_ms']:.1f}" for name in names))
    if "memory_stream_720p_mb" in results:
        megabytes = results["memory_stream_720p_mb"]
        lines.append(f"memory of one more 720p stream {megabytes:.0f} MB")
    if "steady_1080p_late_ms" in results:
        lines.append(
            f"1080p30 pass-through for {LONG_S} s: {results['steady_1080p_late_ms']:.0f} ms late, "
            f"{100 * results['steady_1080p_processed_share']:.1f} % through the engine, "
            f"{results['steady_1080p_repeated']:.0f} pictures shown twice, "
            f"memory {results['steady_1080p_growth_mb']:+.1f} MB"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.parse_args(argv)

    async def go() -> dict[str, float]:
        async with running() as appliance:
            clips = {size: material.write(appliance.folder / f"{size}.mp4", size) for size in material.SIZES}
            return await run(appliance, clips)

    results = asyncio.run(go())
    print(table(results))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
