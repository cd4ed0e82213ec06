"""What it costs to bring pictures to the engine and back: our client, the real engine process, a session that echoes.

Four pictures there and back, then the next four. CPU of both processes, against memcpy of the same bytes there and
back in the same run. The bytes lane also counts in CPU seconds per gigabyte, each byte once per direction; a message
of it holds one picture, as the shim sends them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

import proto.polling  # noqa: F401  first: gRPC reads it when it is imported
from gateway_shim.engine_client import EngineClient
from gateway_shim.engine_session import EngineSession
from gateway_shim.media.planes import frame_of, rows_of
from proto import engine_pb2 as pb
from proto import memory
from proto.frames import Frame
from proto.results import Results

from . import material
from .appliance import Appliance, WrongOutput, cpu_s, running

BATCH = 4
ROUNDS, QUICK_ROUNDS = 9, 5
#: Batches of a round: enough that the clock of a process, and what it does by the way, do not matter.
BATCHES, QUICK_BATCHES = 12, 8
#: Pictures in turn, so that none is in a cache from the last time.
POOL = 16
SIZES = ("720p", "1080p")


def pictures(width: int, height: int) -> list[bytes]:
    rng = np.random.default_rng(1)
    first = rng.integers(16, 236, width * height * 3 // 2, np.uint8)
    return [np.roll(first, 977 * number).tobytes() for number in range(POOL)]


class Copies:
    """The same pictures there and back by memcpy, each into memory of its own."""

    def __init__(self, planes: Sequence[bytes]) -> None:
        self._sources = [np.frombuffer(data, np.uint8) for data in planes]
        self._there = [np.empty_like(source) for source in self._sources]
        self._back = [np.empty_like(source) for source in self._sources]
        self.round_ms()  # touches the pages

    def round_ms(self, batches: int = POOL // BATCH) -> float:
        """CPU milliseconds a picture, of as many as a round of a lane has."""
        began = cpu_s(os.getpid())
        for _ in range(batches * BATCH // POOL):
            for source, there, back in zip(self._sources, self._there, self._back, strict=True):
                np.copyto(there, source)
                np.copyto(back, there)
        return 1000 * (cpu_s(os.getpid()) - began) / (batches * BATCH)


class SessionLane:
    """Four pictures after one another through a session, in messages of as many as its lane takes well."""

    def __init__(self, session: EngineSession, planes: Sequence[bytes], width: int, height: int) -> None:
        self._session = session
        self._planes = planes
        self._frames = [frame_of(each, width, height) for each in planes]
        self._responses = session.responses()
        self._sent = 0

    async def batch(self, *, compare: bool) -> None:
        """Four pictures there and back. Raises WrongOutput; compare: their bytes too, which takes time."""
        session, first = self._session, self._sent
        while session.credits < BATCH:
            await anext(self._responses)
        numbers = list(range(first, first + BATCH))
        while numbers:
            now, numbers = numbers[: session.batch], numbers[session.batch :]
            await session.send([session.load(Frame(each, each), rows_of(self._frames[each % POOL])) for each in now])
        self._sent += BATCH
        answered = first
        while answered < self._sent:
            response = await anext(self._responses)
            for result in response.results if isinstance(response, Results) else ():
                planes = result.picture.planes if result.picture is not None else b""
                if result.frame_id != answered or not planes:
                    raise WrongOutput(f"frame {answered} was answered with {result.frame_id}, {len(planes)} bytes")
                if compare and planes != self._planes[answered % POOL]:
                    raise WrongOutput(f"the answer to frame {answered} is not the picture that was sent")
                answered += 1


async def lane_ms(
    appliance: Appliance, client: EngineClient, size: str, rounds: int, batches: int
) -> tuple[float, float]:
    """CPU milliseconds a picture, of the lane in both processes and of memcpy: medians of rounds by turns."""
    width, height = material.SIZES[size]
    planes = pictures(width, height)
    copies = Copies(planes)
    video = pb.VideoFormat(width=width, height=height)
    took, copied = [], []
    async with client.open(pb.OpenSession(session_id=f"lane-{size}", video=video, max_batch=BATCH)) as session:
        lane: Any = SessionLane(session, planes, width, height)
        for number in range(rounds + 1):
            began = cpu_s(os.getpid()) + cpu_s(appliance.engine_pid)
            for _ in range(batches):
                await lane.batch(compare=number == 0)
            if number:
                used = cpu_s(os.getpid()) + cpu_s(appliance.engine_pid) - began
                took.append(1000 * used / (batches * BATCH))
                copied.append(copies.round_ms(batches))
    return median(took), median(copied)


async def run(appliance: Appliance, *, quick: bool = False, sizes: Sequence[str] = SIZES) -> dict[str, float]:
    """``lane_bytes_s_per_gb`` (of 1080p) and each lane's ``_ms`` a picture with its ratio to memcpy."""
    memory.keep_large_blocks()  # as the shim does
    rounds, batches = (QUICK_ROUNDS, QUICK_BATCHES) if quick else (ROUNDS, BATCHES)
    results: dict[str, float] = {}
    async with (
        EngineClient(appliance.address, share_memory=False) as client,
        EngineClient(appliance.address) as sharing,
    ):
        await client.ready()
        await sharing.ready()
        for size in sizes:
            width, height = material.SIZES[size]
            carried, copied = await lane_ms(appliance, client, size, rounds, batches)
            results[f"lane_bytes_{size}_ms"] = carried
            results[f"lane_bytes_{size}_x_memcpy"] = carried / copied
            shared, copied = await lane_ms(appliance, sharing, size, rounds, batches)
            results[f"lane_memcpy_{size}_ms"] = copied
            results[f"lane_shm_{size}_ms"] = shared
            results[f"lane_shm_{size}_x_memcpy"] = shared / copied
            gigabytes = 2 * width * height * 1.5 / 1e9
            results[f"lane_bytes_{size}_s_per_gb"] = carried / 1000 / gigabytes
        results["lane_bytes_s_per_gb"] = results[f"lane_bytes_{sizes[-1]}_s_per_gb"]
    return results


def table(results: Mapping[str, float]) -> str:
    lines = ["lanes, batches of four there and back, CPU of both processes", ""]
    lines.append(f"{'':20}{'ms':>9}{'x memcpy':>10}{'s/GB':>8}")
    for size in SIZES:
        for lane in ("bytes", "shm"):
            if f"lane_{lane}_{size}_ms" in results:
                ratio = results[f"lane_{lane}_{size}_x_memcpy"]
                per_gb = results.get(f"lane_{lane}_{size}_s_per_gb")
                tail = f"{per_gb:8.2f}" if per_gb is not None else ""
                lines.append(f"{lane + ' ' + size:20}{results[f'lane_{lane}_{size}_ms']:9.2f}{ratio:10.1f}{tail}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lanes", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)

    async def go() -> dict[str, float]:
        async with running() as appliance:
            return await run(appliance, quick=arguments.quick)

    results = asyncio.run(go())
    print(table(results))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
