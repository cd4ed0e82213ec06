"""``make bench``: every benchmark, as tables of ratios and as flat JSON.

QUICK=1 in the environment takes fewer rounds and leaves out scaling and the other libraries' conversions: the main
figures in under 50 s, too few rounds to compare two versions by a few per cent. The parts run one after the other;
whatever else the machine does meanwhile is in all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import cext

from . import appliance, goals, kernels, lanes, latency, material, peers, plan, scaling, trip

_ROUNDS, _QUICK_ROUNDS = 60, 8
PARTS = ("kernels", "plan", "lanes", "trip", "latency", "scaling")
#: Of the real programs, which one appliance serves.
_LIVE = frozenset({"lanes", "trip", "latency", "scaling"})


def kernel_table(results: Mapping[str, float]) -> str:
    """The ratios of the kernels in use; everything else is in the JSON."""
    lines = [f"pixel kernels ({cext.BACKEND}), time against the memory limit of the same run; 1.00 is the limit", ""]
    lines.append(f"{'':10}" + "".join(f"{size:>8}" for size in kernels.SIZES))
    for direction in ("forward", "back"):
        ratios = [results[f"kernel_{direction}_{size}_x_limit"] for size in kernels.SIZES]
        lines.append(f"{direction:10}" + "".join(f"{ratio:8.2f}" for ratio in ratios))
    return "\n".join(lines)


def _show(part: str, text: str, began: float) -> None:
    print(f"\n{text}", flush=True)
    sys.stderr.write(f"({part}: {time.monotonic() - began:.1f} s)\n")


async def _live(parts: Sequence[str], results: dict[str, float], *, quick: bool) -> None:
    """The parts that need the programs."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        # The largest first, all beside the programs' start, which takes as long.
        paths = {size: Path(folder, f"{size}.mp4") for size in reversed(material.SIZES)}
        writing = [asyncio.to_thread(material.write, path, size) for size, path in paths.items()]
        written = asyncio.gather(*writing)
        async with appliance.running() as programs:
            await written
            await _measure(programs, paths, parts, results, began, quick=quick)


async def _measure(
    programs: appliance.Appliance,
    clips: dict[str, Path],
    parts: Sequence[str],
    results: dict[str, float],
    began: float,
    *,
    quick: bool,
) -> None:
    if "lanes" in parts:
        results |= await lanes.run(programs, quick=quick)
        _show("lanes", lanes.table(results), began)
    if "trip" in parts:
        began = time.monotonic()
        results |= await trip.run(programs, clips, quick=quick)
        _show("trip", trip.table(results), began)
    if "latency" in parts:
        began = time.monotonic()
        results |= await latency.run(programs, clips, quick=quick)
        _show("latency", latency.table(results), began)
    if "scaling" in parts:
        began = time.monotonic()
        results |= await scaling.run(programs, clips)
        _show("scaling", scaling.table(results), began)


def run(parts: Sequence[str], *, quick: bool) -> dict[str, float]:
    """Every figure of the parts, flat. Raises where a checked output is wrong."""
    results: dict[str, float] = {}
    began = time.monotonic()
    if "kernels" in parts:
        results |= kernels.run(_QUICK_ROUNDS if quick else _ROUNDS)
        _show("kernels", kernel_table(results), began)
        if not quick:
            began = time.monotonic()
            results |= (others := peers.run(peers.ROUNDS, kernels.SIZES))
            _show("others", peers.table(others), began)
    if _LIVE & set(parts):
        asyncio.run(_live(parts, results, quick=quick))
    if "plan" in parts:  # last: it brings ComfyUI into this process
        began = time.monotonic()
        results |= (measured := plan.run(plan.QUICK_ROUNDS if quick else plan.ROUNDS))
        _show("plan", plan.table(measured), began)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there, as {name: number}")
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json names {arguments.json}, but there is no folder {arguments.json.parent}")
    quick = os.environ.get("QUICK", "") not in ("", "0")
    usual = [part for part in PARTS if not (quick and part == "scaling")]
    parts = arguments.only.split(",") if arguments.only else usual
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    results = run(parts, quick=quick)
    print(f"\n{goals.table(results, parts)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
