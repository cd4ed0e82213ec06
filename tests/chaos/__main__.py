"""``make soak`` and ``make chaos``; docs/chaos.md says what the words and figures mean."""

from __future__ import annotations

import argparse
import asyncio
import json
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import account, plan
from .appliance import has_comfyui
from .run import run

#: Camera, broker and viewer are one process, and the viewer decodes on a thread: Python's own 5 ms until a thread
#: gives way would be lateness that is not the shim's.
_SWITCH_S = 0.0005


def main() -> int:
    sys.setswitchinterval(_SWITCH_S)
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--seconds", type=float, help="20, or 12 for each kill")
    parser.add_argument("--minutes", type=float, help="a soak of that length")
    parser.add_argument("--kills", type=int, help="kill the engine that often and do nothing else")
    parser.add_argument("--runs", type=int, default=1, help="that many seeds, from --seed on")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--graph", choices=("auto", "pass", "invert", "slow"), default="auto")
    parser.add_argument("--faults", default="", help=f"only these, by comma: {', '.join(plan.FAULTS)}")
    parser.add_argument("--plan", type=Path, help="a plan.json of an earlier run")
    parser.add_argument("--output", type=Path, default=Path("chaos-out"))
    parser.add_argument("--quiet", action="store_true", help="the last line only")
    options = parser.parse_args()
    options.seconds = options.seconds or 12.0 * (options.kills or 0) or 20.0
    faults = [name for name in options.faults.split(",") if name]
    if unknown := set(faults) - set(plan.FAULTS):
        parser.error(f"there is no fault {', '.join(unknown)}; there are {', '.join(plan.FAULTS)}")
    if options.runs > 1:
        return _many(options)
    try:
        chosen = plan.load(options.plan) if options.plan else _plan(options, faults)
    except (OSError, ValueError) as exc:
        parser.error(str(exc))
    if chosen.graph != "pass" and not has_comfyui():
        parser.error(f"the graph {chosen.graph!r} needs a ComfyUI: run make comfyui, or set COMFYUI_DIR")
    return _one(chosen, options)


def _plan(options: argparse.Namespace, faults: list[str]) -> plan.Plan:
    graph = options.graph
    if graph == "auto":
        graph = "invert" if has_comfyui() else "pass"
    if options.minutes is not None:
        return plan.soak(options.seed, options.minutes, graph)
    if options.kills is not None:
        return plan.kills(options.seed, options.kills, options.seconds, graph)
    return plan.chaos(options.seed, options.seconds, graph, faults)


def _one(chosen: plan.Plan, options: argparse.Namespace) -> int:
    folder = options.output / f"seed-{chosen.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(chosen.as_json(), encoding="utf-8")

    def say(text: str) -> None:
        if not options.quiet:
            print(text, flush=True)

    say(chosen.as_json())
    found = asyncio.run(run(chosen, folder, say))
    facts = account.line(found)
    wrong = account.reasons(found)
    say(account.ledger(found))
    for number, (_, back, boot) in enumerate(account.back_after(found), 1):
        say(f"kill {number}: processed pictures after {_s(back)}, the engine booted in {_s(boot)}")
    for number, stream in enumerate(found.streams, 1) if wrong or not options.quiet else ():
        for begin, end, excused in stream.judged.losses[:20]:
            print(f"stream {number}: sound of {begin} to {end} s is lost{', by a fault' if excused else ''}")
        if stream.judged.gap_ms:
            print(f"stream {number}: longest gap {stream.judged.gap_ms:.0f} ms at {stream.judged.gap_at_s:.2f} s")
    for reason in wrong:
        print(f"WRONG: {reason}")
    if wrong:
        kept = [(stream.source.account, stream.viewer.view, stream.excused) for stream in found.streams]
        (folder / "streams.pickle").write_bytes(pickle.dumps(kept))  # for figures.judge, again and slowly
        print(f"the plan and the logs are in {folder}; replay with: make chaos PLAN={folder / 'plan.json'}")
        (folder / "wrong.txt").write_text("\n".join(wrong) + "\n", encoding="utf-8")
    else:
        shutil.rmtree(folder / "log", ignore_errors=True)
    print(json.dumps(facts), flush=True)
    return 1 if wrong else 0


def _s(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"


def _many(options: argparse.Namespace) -> int:
    """Each seed in a process of its own, so that nothing of one run is in the next."""
    graph = "pass" if options.graph == "auto" else options.graph
    common = ["--seconds", str(options.seconds), "--graph", graph, "--faults", options.faults, "--quiet"]
    if options.kills is not None:
        common += ["--kills", str(options.kills)]

    def one(seed: int) -> tuple[int, int, str]:
        command = [sys.executable, "-m", "tests.chaos", "--seed", str(seed), "--output", str(options.output), *common]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return seed, done.returncode, done.stdout + (done.stderr if done.returncode else "")

    failed, lines = [], []
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed, code, text in pool.map(one, range(options.seed, options.seed + options.runs)):
            *words, last = text.strip().splitlines() or [""]
            try:
                lines.append(json.loads(last))
            except ValueError:
                words.append(last)
            print(f"seed {seed}: {'ok' if code == 0 else 'WRONG'}", flush=True)
            if code:
                failed.append(seed)
                print("\n".join(f"  {word}" for word in words[-12:]), flush=True)
    print(json.dumps(_together(lines) | {"runs": options.runs, "failed_seeds": failed}), flush=True)
    return 1 if failed else 0


def _together(lines: list[dict[str, object]]) -> dict[str, object]:
    """The worst of each figure, the sum of what is counted."""
    summed = ("faults", "streams", "kills", "frames_in", "frames_out", "audio_samples_lost", "leaked", "ledger_polls")
    worst = ("max_output_gap_ms", "av_offset_p99_ms", "latency_p99_ms", "source_late_ms")
    found: dict[str, object] = {name: sum(int(str(each[name])) for each in lines) for name in summed}
    for name in worst:
        found[name] = max((float(str(each[name])) for each in lines if each[name] is not None), default=None)
    found["ledger_exact"] = all(each["ledger_exact"] for each in lines)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
