"""What the project wants of each figure, and the table at the end of ``make bench`` that says which goals are held.

The figures are ratios within one run, or of a machine with two cores; a goal that is missed is a finding, not a
failure of the bench.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import cext

HELD, MISSED, UNKNOWN = "held", "MISSED", "not measured"


@dataclass(frozen=True, slots=True)
class Goal:
    """``part`` of the bench gives ``key``, which should be at most ``most``, or at least ``least``."""

    part: str
    text: str
    key: str
    most: float = float("inf")
    least: float = float("-inf")

    def verdict(self, results: Mapping[str, float]) -> str:
        if self.key not in results:
            return UNKNOWN
        return HELD if self.least <= results[self.key] <= self.most else MISSED


_FORWARD: Final = {"avx2": 1.3, "avx512": 1.1}
_BACK: Final = {"512": 1.5, "720p": 1.5, "1080p": 1.9}
_TRIP: Final = {"512": 0.28, "720p": 0.20, "1080p": 0.18}


def _goals() -> Iterator[Goal]:
    for backend, most in _FORWARD.items():
        if backend in cext.backends():
            for size, back in _BACK.items():
                text = f"{size}, {backend}, times the memory limit"
                yield Goal("kernels", f"forward {text}", f"kernel_forward_{backend}_{size}_x_limit", most)
                yield Goal("kernels", f"back {text}", f"kernel_back_{backend}_{size}_x_limit", back)
    yield Goal("lanes", "bytes lane, CPU seconds a gigabyte", "lane_bytes_s_per_gb", 1.3)
    for size in ("720p", "1080p"):
        yield Goal("lanes", f"shared memory {size}, times memcpy", f"lane_shm_{size}_x_memcpy", 2.0)
    for size, most in _TRIP.items():
        yield Goal("trip", f"whole trip {size}, of the codec", f"trip_overhead_{size}_x_codec", most)
    yield Goal("latency", "inside, 720p pass-through, p50 ms", "latency_inside_720p_p50_ms", 25)
    yield Goal("latency", "inside, 720p pass-through, p99 ms", "latency_inside_720p_p99_ms", 60)
    yield Goal("latency", "last byte of a unit to its decoder, ms", "decode_lag_ms", 5)
    yield Goal("latency", "first picture after its keyframe, ms", "first_picture_ms", 150)
    yield Goal("scaling", "four streams of 512 in real time", "scaling_512_4_real_time", least=1)
    yield Goal("scaling", "one more 720p stream, MB in the shim", "memory_stream_720p_mb", 80)
    yield Goal("scaling", "1080p30, share of pictures through the engine", "steady_1080p_processed_share", least=1)
    yield Goal("scaling", "1080p30, ms late at the end", "steady_1080p_late_ms", 400)
    yield Goal("scaling", "1080p30, MB that both programs grew by", "steady_1080p_growth_mb", 5)
    yield Goal("plan", "twenty idle nodes, of ComfyUI's executor", "plan_chain20_x_executor", 0.1)
    yield Goal("plan", "worst graph of SD1.5's shape, of the executor", "plan_sd15_x_executor", 0.2)
    yield Goal("plan", "p99 of a frame, times the median", "plan_p99_x_median", 3)


GOALS: Final = tuple(_goals())
_BY_KEY: Final = {goal.key: goal for goal in GOALS}


def most(key: str) -> float:
    return _BY_KEY[key].most


def table(results: Mapping[str, float], parts: Collection[str]) -> str:
    """Every goal of these parts. Where a machine is too slow for a figure, its part gives none."""
    goals = [goal for goal in GOALS if goal.part in parts]
    lines = [f"{'goals':52}{'measured':>10}{'goal':>12}", ""]
    for goal in goals:
        measured = f"{results[goal.key]:.3f}" if goal.key in results else "-"
        wanted = f"<= {goal.most:g}" if goal.most < float("inf") else f">= {goal.least:g}"
        lines.append(f"{goal.text:52}{measured:>10}{wanted:>12}  {goal.verdict(results)}")
    held = sum(goal.verdict(results) == HELD for goal in goals)
    return "\n".join([*lines, "", f"{held} of {len(goals)} goals held"])
