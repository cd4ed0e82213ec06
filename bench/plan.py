"""What a frame costs beside its nodes: the plan against ComfyUI's own executor, on graphs of nodes that do nothing.

Both run the same graphs, by turns in one run, and every picture that comes out is compared with the one that went in.
The sd15 shapes are those of ComfyStream's workflows: as many nodes, as many of them live, linked the same way.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from engine.config import read
from engine.executor import settle_heap
from engine.graph.comfy import ComfyHost
from engine.graph.runner import Runner, TickInput

from .goals import most

ROUNDS, QUICK_ROUNDS = 60, 10
JITTER_FRAMES = 3000
#: Back to back on a shared machine a neighbour may take a core for milliseconds: the best of these is the program's.
JITTER_RUNS = 3

Prompt = dict[str, dict[str, Any]]


class AnyType(str):
    """Links to every type."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANY = AnyType("*")


class Idle:
    """Hands its first input on, or nothing."""

    CATEGORY = "bench"
    RETURN_TYPES = (ANY, ANY)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        links = {f"in{number}": (ANY,) for number in range(5)}
        return {"required": {"name": ("STRING", {"default": ""})}, "optional": links}

    def run(self, name: str, in0: Any = None, **others: Any) -> tuple[Any, Any]:
        return in0, name


#: Nodes by name, with what they take; the picture comes first. ``live`` and ``save`` are the ends.
_STATIC = "clip good:clip bad:clip trt cnet cnet_c:cnet vae vae_c:vae latent"
_SAMPLED = "sampler:apply,trt,good,latent decode:sampler,vae_c"
SD15 = {
    "tensorrt": f"{_STATIC} depth:live apply:depth,good,bad,cnet_c,vae_c {_SAMPLED} save:decode",
    "depthmask": f"{_STATIC} depth:live apply:depth,good,bad,cnet_c,vae_c {_SAMPLED} mask:depth limit:mask"
    " composite:decode,live,limit save:composite",
    "multi_cnet": f"{_STATIC} extra:clip bank:trt cnet2 cnet2_c:cnet2 depth:live face:live"
    " apply1:depth,good,bad,cnet_c,vae_c apply:face,apply1,bad,cnet2_c,vae_c concat:apply,extra"
    " sampler:concat,bank,apply,latent decode:sampler,vae_c save:decode second:face",
    "regional_lora": f"{_STATIC} layer:clip hook hooked1:layer,hook hooked2:layer,hook good2:hooked1 bad2:hooked2"
    " picture not:picture pair1:good,bad,picture pair2:good2,bad2,not combined:pair1,pair2 depth:live"
    f" apply:depth,combined,good,cnet_c,vae_c {_SAMPLED} save:decode",
}
SIZES = {"tensorrt": (15, 6), "depthmask": (18, 9), "multi_cnet": (23, 10), "regional_lora": (26, 6)}
CHAIN = " ".join(["n1:live", *(f"n{number}:n{number - 1}" for number in range(2, 19)), "save:n18"])


def prompt_of(shape: str) -> Prompt:
    prompt: Prompt = {"live": {"class_type": "LoadTensor", "inputs": {}}}
    for item in shape.split():
        name, _, sources = item.partition(":")
        links = [[source, 0] for source in sources.split(",") if source]
        if name in ("save", "second"):
            prompt[name] = {"class_type": "SaveTensor", "inputs": {"images": links[0]}}
        else:
            inputs = {"name": name, **{f"in{number}": link for number, link in enumerate(links)}}
            prompt[name] = {"class_type": "BenchIdle", "inputs": inputs}
    return prompt


def live_nodes(prompt: Prompt) -> int:
    live = {"live"}
    while True:
        more = {
            name
            for name, node in prompt.items()
            if any(isinstance(value, list) and value[0] in live for value in node["inputs"].values())
        }
        if more <= live:
            return len(live)
        live |= more


def frame(runner: Runner, number: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one frame. Raises AssertionError if the picture is not the one that went in."""
    picture = torch.full((1, 8, 8, 3), (number % 251) / 251)
    tick = TickInput(picture, number)
    began = clock()
    images = runner.tick(tick).images
    elapsed = clock() - began
    assert images is not None
    assert images.data_ptr() == picture.data_ptr(), "a graph of idle nodes changed the picture"
    return elapsed


def ratio(host: ComfyHost, prompt: Prompt, rounds: int) -> tuple[float, float]:
    """Median CPU seconds of the plan and of ComfyUI's executor, frames by turns."""
    runners = {"plan": host.new_runner("plan"), "stock": host.new_runner("stock")}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    order = random.Random(1)
    for runner in runners.values():
        runner.load(prompt)
        frame(runner, 0)
    settle_heap()
    for number in range(rounds):
        for name in order.sample(list(runners), len(runners)):
            seconds[name].append(frame(runners[name], number, time.process_time))
    for runner in runners.values():
        runner.close()
    return median(seconds["plan"]), median(seconds["stock"])


def jitter(host: ComfyHost, prompt: Prompt, frames: int) -> tuple[float, float]:
    """Median and 99th percentile of a run of frames, by the clock on the wall: what a viewer would see."""
    runner = host.new_runner("plan")
    runner.load(prompt)
    for number in range(20):
        frame(runner, number)
    settle_heap()
    seconds = sorted(frame(runner, number) for number in range(frames))
    runner.close()
    return median(seconds), seconds[frames * 99 // 100]


def run(rounds: int = ROUNDS, frames: int = JITTER_FRAMES) -> dict[str, float]:
    """``plan_chain20_x_executor``, ``plan_sd15_x_executor`` (the worst of the four shapes), ``plan_p99_x_median``
    over 3,000 frames of the chain, and the milliseconds behind them.

    Takes some ten seconds. Raises RuntimeError where there is no ComfyUI.
    """
    directory = read([]).comfyui_dir
    if directory is None:
        raise RuntimeError("there is no ComfyUI: run `make comfyui` or set COMFYUI_DIR")
    torch.set_num_threads(1)
    host = ComfyHost.load(directory, custom_nodes=False)
    host.add_nodes({"BenchIdle": Idle})
    results: dict[str, float] = {}
    shapes = {"chain20": prompt_of(CHAIN)} | {f"sd15_{name}": prompt_of(shape) for name, shape in SD15.items()}
    for name, (nodes, live) in SIZES.items():
        prompt = shapes[f"sd15_{name}"]
        assert (len(prompt), live_nodes(prompt)) == (nodes, live), f"{name}: {len(prompt)}, {live_nodes(prompt)}"
    for name, prompt in shapes.items():
        plan, stock = ratio(host, prompt, rounds)
        results[f"plan_{name}_ms"], results[f"plan_{name}_executor_ms"] = 1000 * plan, 1000 * stock
        results[f"plan_{name}_x_executor"] = plan / stock
    results["plan_sd15_x_executor"] = max(results[f"plan_sd15_{name}_x_executor"] for name in SD15)
    runs = [jitter(host, shapes["chain20"], frames) for _ in range(JITTER_RUNS)]
    results["plan_p99_x_median"] = min(p99 / middle for middle, p99 in runs)
    results["plan_p99_ms"] = 1000 * min(p99 for _, p99 in runs)
    gc.unfreeze()
    return results


def table(results: dict[str, float]) -> str:
    """Every shape, against the executor and the goals of the project."""
    lines = ["plan, overhead of a frame against ComfyUI's executor in the same run", ""]
    lines.append(f"{'':20}{'nodes':>6}{'plan ms':>10}{'executor ms':>13}{'ratio':>8}{'goal':>7}")
    for name, nodes in {"chain20": 20, **{f"sd15_{name}": size[0] for name, size in SIZES.items()}}.items():
        goal = most("plan_chain20_x_executor" if name == "chain20" else "plan_sd15_x_executor")
        figures = [results[f"plan_{name}{end}"] for end in ("_ms", "_executor_ms", "_x_executor")]
        lines.append(f"{name:20}{nodes:6}{figures[0]:10.3f}{figures[1]:13.3f}{figures[2]:8.3f}{goal:7.2f}")
    spread = results["plan_p99_x_median"]
    lines.append(f"{JITTER_FRAMES} frames of chain20: p99 is {spread:.2f} times the median")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    print(table(run(parser.parse_args(argv).rounds)))


if __name__ == "__main__":
    main()
