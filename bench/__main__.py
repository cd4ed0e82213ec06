"""``make bench``: every benchmark, as a table of ratios and as flat JSON.

QUICK=1 in the environment takes fewer rounds: enough to see that it runs, too few to compare two versions.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import cext

from . import kernels, plan

_ROUNDS, _QUICK_ROUNDS = 60, 8


def table(results: dict[str, float]) -> str:
    """The ratios of the kernels in use; everything else is in the JSON."""
    lines = [f"pixel kernels ({cext.BACKEND}), time against the memory limit of the same run; 1.00 is the limit", ""]
    lines.append(f"{'':10}" + "".join(f"{size:>8}" for size in kernels.SIZES))
    for direction in ("forward", "back"):
        ratios = [results[f"kernel_{direction}_{size}_x_limit"] for size in kernels.SIZES]
        lines.append(f"{direction:10}" + "".join(f"{ratio:8.2f}" for ratio in ratios))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there, as {name: number}")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json names {arguments.json}, but there is no folder {arguments.json.parent}")
    quick = os.environ.get("QUICK", "") not in ("", "0")
    results = kernels.run(_QUICK_ROUNDS if quick else _ROUNDS)
    print(table(results))
    results |= (measured := plan.run(plan.QUICK_ROUNDS if quick else plan.ROUNDS))
    print("", plan.table(measured), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
