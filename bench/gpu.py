"""What a GPU changes: ``make gpu-check``. Without one it says so and is content.

Conversion: an IMAGE made by the CPU in page-locked memory and uploaded, against 8-bit planes uploaded and converted
there; and back. Every picture is compared with the kernels' oracle. Diffusion: ComfyUI's own loaders and sampler with
a UNet of SD1.5's shape (860 million parameters) and taesd, all weights random, one step, fed and read through the
engine's graph layer; sessions taking turns give the streams that one GPU holds. Codecs: NVENC against x264 and NVDEC
against the CPU on the same pictures, where they work.

``--device cpu --small`` runs the same code anywhere, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import cext
from cext import _pixels_py
from engine.backend import Aside, FrameIn, Graph
from engine.comfy_backend import ComfyBackend
from engine.config import Settings, read
from engine.graph.device_pixels import Placement
from engine.graph.tensors import Converter
from engine.wire import VideoFormat

SIZES = {"512": (512, 512), "720p": (1280, 720), "1080p": (1920, 1080)}
SMALL = {"small": (64, 48)}
ROUNDS, SMALL_ROUNDS = 50, 2
FRAMES, SMALL_FRAMES = 60, 2
STREAM_FPS = 30

RESULTS = Path(__file__).parent / "results"
NO_GPU = "This machine has no GPU that torch can use, so there is nothing to measure here."


class WrongOutput(Exception):
    """A measured conversion or graph gave something else than it must."""


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call to the end of its work; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            settled(device)
            began = time.perf_counter()
            call()
            settled(device)
            if number >= 2:  # the first ones allocate
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(times) for name, times in taken.items()}


# ---- conversion


def conversion(device: torch.device, sizes: dict[str, tuple[int, int]], rounds: int) -> dict[str, float]:
    """``gpu_{up,down}_{cpu,device}_{size}_ms``, and ``gpu_{up,down}_{size}_x_cpu``: device over CPU."""
    results: dict[str, float] = {}
    by_cpu = Converter(placement=Placement(page_locked=device.type == "cuda"))
    there = Converter(placement=Placement(device))
    rng = np.random.default_rng(1)
    for name, (width, height) in sizes.items():
        picture = rng.integers(0, 256, cext.picture_bytes(width, height), np.uint8).tobytes()

        def up_cpu(picture: bytes = picture, width: int = width, height: int = height) -> torch.Tensor:
            return by_cpu.to_images([picture], width, height).to(device, non_blocking=True)

        def up_device(picture: bytes = picture, width: int = width, height: int = height) -> torch.Tensor:
            return there.to_images([picture], width, height)

        images = up_device()
        exact = _pixels_py.exact_image(cext.planes_from_buffer(picture, width, height).arrays, cext.Colour())
        for way in (up_cpu, up_device):
            if (error := np.abs(way()[0].cpu().numpy() - exact).max()) > 3e-7:
                raise WrongOutput(f"{way.__name__} at {name} is off by {error:.1e}")

        def down_cpu(images: torch.Tensor = images) -> Any:
            return by_cpu.to_planes(images)

        def down_device(images: torch.Tensor = images) -> Any:
            return there.to_planes(images)

        [one], [other] = down_cpu(), down_device()
        levels = [np.frombuffer(item.planes, np.uint8).astype(int) for item in (one, other)]
        if np.abs(levels[0] - levels[1]).max() > 1:
            raise WrongOutput(f"the device and the CPU differ by more than a level at {name}")
        calls = {"up_cpu": up_cpu, "up_device": up_device, "down_cpu": down_cpu, "down_device": down_device}
        times = timed(calls, device, rounds)
        results |= {f"gpu_{way}_{name}_ms": value for way, value in times.items()}
        for way in ("up", "down"):
            results[f"gpu_{way}_{name}_x_cpu"] = times[f"{way}_device"] / times[f"{way}_cpu"]
    return results


# ---- diffusion


class RandomWords:
    """A conditioning without a text encoder."""

    CATEGORY = "bench"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seed": ("INT", {"default": 0})}}

    def run(self, seed: int) -> tuple[Any]:
        generator = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, 77, 768, generator=generator), {}]],)


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


DIFFUSION: dict[str, Any] = {
    "live": _node("LoadTensor"),
    "unet": _node("UNETLoader", unet_name="random_unet.safetensors", weight_dtype="default"),
    "vae": _node("VAELoader", vae_name="taesd"),
    "good": _node("RandomWords", seed=1),
    "bad": _node("RandomWords", seed=2),
    "encode": _node("VAEEncode", pixels=["live", 0], vae=["vae", 0]),
    "sampler": _node(
        "KSampler",
        model=["unet", 0],
        positive=["good", 0],
        negative=["bad", 0],
        latent_image=["encode", 0],
        seed=3,
        steps=1,
        cfg=1.0,
        sampler_name="lcm",
        scheduler="simple",
        denoise=0.6,
    ),
    "decode": _node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
    "save": _node("SaveTensor", images=["decode", 0]),
}


def filled(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random values of a size that keeps activations finite; ComfyUI makes modules without values."""
    generator = torch.Generator().manual_seed(7)
    for name in sorted(state):
        shape = state[name].shape
        if len(shape) > 1:
            state[name] = (torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))).to(dtype)
        else:
            value = torch.randn(shape, generator=generator) * 0.02 + (1.0 if "weight" in name else 0.0)
            state[name] = value.to(dtype)
    return state


def write_models(folder: Path, *, small: bool) -> None:
    """A UNet that ComfyUI recognises as SD1.5's family and a taesd, and where its loaders look for them."""
    import folder_paths
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.taesd import taesd
    from safetensors.torch import save_file

    levels = 1 if small else 4
    blocks = 1 if small else 2
    depth = [1] if small else [1, 1, 1, 1, 1, 1, 0, 0]
    depth_out = [1, 1] if small else [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[blocks] * levels,
        channel_mult=(1, 2, 4, 4)[:levels],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=depth,
        transformer_depth_output=depth_out,
        transformer_depth_middle=1,
        context_dim=768,
        legacy=False,
    )
    save_file(filled(unet.state_dict(), torch.float16), folder / "random_unet.safetensors")
    save_file(filled(taesd.Encoder().state_dict(), torch.float32), folder / "taesd_encoder.safetensors")
    save_file(filled(taesd.Decoder().state_dict(), torch.float32), folder / "taesd_decoder.safetensors")
    for kind in ("diffusion_models", "vae_approx"):
        folder_paths.folder_names_and_paths[kind] = ([str(folder)], {".safetensors"})


def built(backend: ComfyBackend, prompt: Any, video: VideoFormat) -> Graph:
    """A warm graph; what may run aside runs here."""
    steps = backend.build(prompt, video, lambda _: None)
    try:
        while True:
            step = next(steps)
            if isinstance(step, Aside):
                step.call()
    except StopIteration as end:
        graph: Graph = end.value
        return graph


@contextmanager
def backend_with(settings: Settings, folder: Path, *, small: bool) -> Iterator[ComfyBackend]:
    backend = ComfyBackend(settings)
    backend.load()
    host = backend._loaded
    before = dict(host.definitions)
    refused = host.add_nodes({"RandomWords": RandomWords})
    if refused:
        raise WrongOutput(f"ComfyUI does not take the node {refused[0]}")
    write_models(folder, small=small)
    try:
        yield backend
    finally:
        host.classes.pop("RandomWords", None)
        host.definitions = before


def frames_per_s(graphs: Sequence[Graph], video: VideoFormat, device: torch.device, frames: int) -> float:
    """Of all graphs together, taking turns. Every frame must give a picture, and another than the one before."""
    rng = np.random.default_rng(2)
    pictures = [rng.integers(0, 256, video.frame_bytes, np.uint8).tobytes() for _ in range(4)]
    last: dict[int, bytes] = {}
    settled(device)
    began = time.perf_counter()
    for number in range(frames):
        for index, graph in enumerate(graphs):
            [shown] = graph.run(DIFFUSION, [FrameIn(number, 3000 * number, pictures[number % 4])]).pictures
            if shown is None or bytes(shown.planes) == last.get(index):
                raise WrongOutput("the diffusion graph gave no picture, or the last one once more")
            last[index] = bytes(shown.planes)
    settled(device)
    return frames * len(graphs) / (time.perf_counter() - began)


def alone_per_s(backend: ComfyBackend, runner: str, video: VideoFormat, device: torch.device, frames: int) -> float:
    """Frames a second of one graph on that runner. Raises WrongOutput where another one holds it."""
    graph = built(backend, DIFFUSION, video)
    try:
        if graph.runner != runner:
            raise WrongOutput(f"the diffusion graph runs on {graph.runner}, not on {runner}: {graph.runner_reason}")
        return frames_per_s([graph], video, device, frames)
    finally:
        graph.close()


def diffusion(settings: Settings, folder: Path, *, small: bool) -> dict[str, float]:
    """``gpu_diffusion_{way}_fps`` of the plan, for pixels converted by the CPU and on the device, and of ComfyUI's
    executor; and ``gpu_streams_30fps``, as many streams as the graphs alone would allow."""
    results: dict[str, float] = {}
    width, height = (64, 64) if small else (512, 512)
    video = VideoFormat(width, height)
    frames = SMALL_FRAMES if small else FRAMES
    with backend_with(settings, folder, small=small) as backend:
        device = backend._loaded.torch_device
        ways = {"cpu": Placement(page_locked=device.type == "cuda"), "device": Placement(device)}
        for way, place in ways.items():
            backend._placement = place
            results[f"gpu_diffusion_{way}_fps"] = alone_per_s(backend, "plan", video, device, frames)
        backend._placement = max(ways.items(), key=lambda item: results[f"gpu_diffusion_{item[0]}_fps"])[1]
        backend._settings = replace(settings, runner="executor")
        results["gpu_diffusion_executor_fps"] = alone_per_s(backend, "executor", video, device, frames)
        backend._settings = settings
        graphs: list[Graph] = []
        for count in (1, 2) if small else (1, 2, 4, 8):
            while len(graphs) < count:
                graphs.append(built(backend, DIFFUSION, video))
            rate = frames_per_s(graphs, video, device, max(2, frames // count))
            results[f"gpu_diffusion_sessions_{count}_fps"] = rate
            results["gpu_streams_30fps"] = max(results.get("gpu_streams_30fps", 0.0), rate / STREAM_FPS)
        for graph in graphs:
            graph.close()
    return results


# ---- codecs


def codecs(frames: int) -> dict[str, float]:
    """Whether NVENC and NVDEC work (1 or 0), and milliseconds for a picture of 1080p in each codec that does, on the
    wall, until it is in memory as the engine takes it. Raises WrongOutput where another codec did the work."""
    from gateway_shim.media.decode import Decoder, DecoderSettings, Picture
    from gateway_shim.media.encode import Encoder
    from gateway_shim.media.hardware import NVENC, X264, DecoderDevice, EncoderName, probe
    from gateway_shim.media.planes import frame_of
    from gateway_shim.media.settings import EncoderSettings
    from gateway_shim.media.ts import TsReader

    found = probe("auto")
    results = {"gpu_nvenc": float(found.encoder == NVENC), "gpu_nvdec": float(found.decoder == "cuda")}
    width, height = SIZES["1080p"]
    y, x = np.indices((height * 3 // 2, width))
    planes = [((x + y + 3 * number) // 8 % 120 + 60).astype(np.uint8).ravel() for number in range(4)]
    names: tuple[EncoderName, ...] = (X264, NVENC) if found.encoder == NVENC else (X264,)
    settings = EncoderSettings(width, height, audio=False, preset="superfast")
    written = b""
    for name in names:
        encoder = Encoder(replace(settings, codec=name))
        began = time.perf_counter()
        chunks = []
        for number in range(frames):
            chunks += encoder.video(frame_of(planes[number % 4].data, width, height), 3000 * number)
        used = encoder.h264
        chunks += encoder.flush()
        results[f"gpu_encode_{name}_1080p_ms"] = 1e3 * (time.perf_counter() - began) / frames
        if used is None or used.name != name or len(chunks) != frames:
            raise WrongOutput(f"{name} gave {len(chunks)} of {frames} pictures {used and used.fallback}")
        written = written or b"".join(chunk.data for chunk in chunks)
    devices: tuple[DecoderDevice, ...] = ("cpu", "cuda") if found.decoder == "cuda" else ("cpu",)
    for device in devices:
        reader, decoder = TsReader(), Decoder(DecoderSettings(device=device))
        units = [*reader.feed(written), *reader.end_segment()]
        began = time.perf_counter()
        pictures = [each for each in [*decoder.feed(units), *decoder.flush()] if isinstance(each, Picture)]
        results[f"gpu_decode_{device}_1080p_ms"] = 1e3 * (time.perf_counter() - began) / frames
        if decoder.fallback or len(pictures) != frames:
            raise WrongOutput(f"{device} gave {len(pictures)} of {frames} pictures {decoder.fallback}")
    return results


def run(settings: Settings, *, small: bool = False) -> dict[str, float]:
    """Everything. Raises WrongOutput. Needs a ComfyUI for the diffusion graph and leaves it out without."""
    device = torch.device("cpu") if settings.device == "cpu" else torch.device("cuda", 0)
    rounds, sizes = (SMALL_ROUNDS, SMALL) if small else (ROUNDS, SIZES)
    results = conversion(device, sizes, rounds)
    if settings.comfyui_dir is not None:
        with tempfile.TemporaryDirectory() as folder:
            results |= diffusion(settings, Path(folder), small=small)
    else:
        print("no ComfyUI (make comfyui, or COMFYUI_DIR): the diffusion graph is left out")
    return results | codecs(SMALL_FRAMES if small else FRAMES)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny pictures and models: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures, as {name: number}")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return
    results = run(replace(read([]), device=arguments.device), small=arguments.small)
    file = arguments.json
    if arguments.device == "cuda":
        name = torch.cuda.get_device_name(0)
        print(name)
        file = file or RESULTS / f"gpu-{'-'.join(name.lower().split())}.json"
    for name, value in results.items():
        print(f"{name:44}{value:10.3f}")
    if file:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"written to {file}")


if __name__ == "__main__":
    main()
