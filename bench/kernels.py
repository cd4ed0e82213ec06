"""The pixel kernels against the memory limit of the same run.

One thread, all buffers cold: every call has its own input and output out of more than 100 MB. Candidates run once a
round in a shuffled order, so that a busy neighbour hits all alike and nobody always follows the same other. Figures
are medians; compare ratios of one run, never milliseconds of two.

The limit reads and writes the bytes of the float32 conversion without arithmetic, the best of its variants. What
every conversion gives is compared with the definition in 64-bit floats before anything is timed.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
from numpy.typing import NDArray

import cext
from cext import _pixels, _pixels_py

SIZES = {"512": (512, 512), "720p": (1280, 720), "1080p": (1920, 1080)}
POOL_BYTES = 128 << 20  # four times the last-level cache of the machine that the goals were set on
WARM_UP = 2

#: Largest error, in 0..1 forward by type of the image, and in levels back of the value before rounding: a half of
#: rounding, and what a half-precision float in 0..1 is off by before it is multiplied by 219.
FORWARD_ERROR = {"float32": 3e-7, "float16": 3e-4}
BACK_ERROR = {"float32": 0.501, "float16": 0.501}

Call = Callable[[int], None]


@dataclass(frozen=True)
class Pool:
    """As many pictures and images of one size as it takes to leave nothing in a cache."""

    pictures: list[cext.Planes]
    nv12: list[cext.Nv12Planes]
    images: list[NDArray[np.float32]]
    halves: list[NDArray[np.float16]]
    flat: list[NDArray[np.uint8]]  # the bytes of the pictures, aligned, for the limit

    def __len__(self) -> int:
        return len(self.images)


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Memory at a multiple of 64 bytes, as torch gives it."""
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes]


def pool_of(width: int, height: int) -> Pool:
    rng = np.random.default_rng(1)
    count = max(4, POOL_BYTES // (12 * width * height))
    flat, images, halves = [], [], []
    for _ in range(count):
        buffer = aligned(cext.picture_bytes(width, height))
        buffer[...] = rng.integers(16, 236, buffer.size, np.uint8)
        flat.append(buffer)
        image = aligned(12 * width * height).view(np.float32).reshape(height, width, 3)
        image[...] = rng.random(image.shape, np.float32) * 1.06 - 0.03  # overshoots, so that the clamp matters
        images.append(image)
        halves.append(aligned(6 * width * height).view(np.float16).reshape(height, width, 3))
        halves[-1][...] = 0.5
    return Pool(
        [cext.planes_from_buffer(buffer, width, height) for buffer in flat],
        [cext.planes_from_buffer(buffer, width, height, "nv12") for buffer in flat],
        images,
        halves,
        flat,
    )


def with_backend(name: str, call: Call) -> Call:
    def run(index: int) -> None:
        _pixels.select(name)
        call(index)

    return run


def stored(picture: cext.Planes, image: NDArray[np.float32]) -> None:
    """Normal stores at any size: what streaming ones spare, and what memory of another alignment costs."""
    before = _pixels.stream_from(1 << 40)
    cext.i420_to_image(picture, image)
    _pixels.stream_from(before)


def limit_forward(pool: Pool, way: str, index: int) -> None:
    _pixels.limit_forward(pool.flat[index], pool.images[index].reshape(-1), way)


def candidates(pool: Pool) -> dict[str, Call]:
    """Limits and kernels by name; each takes the index of the buffers to use."""
    limits: dict[str, Call] = {
        **{f"limit_forward_{way}": partial(limit_forward, pool, way) for way in ("stream", "store", "ahead")},
        "limit_back_ahead": lambda i: _pixels.limit_back(pool.images[i].reshape(-1), pool.flat[i], True),
        "limit_back_plain": lambda i: _pixels.limit_back(pool.images[i].reshape(-1), pool.flat[i], False),
    }
    conversions: dict[str, Call] = {
        "forward": lambda i: cext.i420_to_image(pool.pictures[i], pool.images[i]),
        "back": lambda i: cext.image_to_i420(pool.images[i], pool.pictures[i]),
        "forward_nv12": lambda i: cext.nv12_to_image(pool.nv12[i], pool.images[i]),
        "forward_stored": lambda i: stored(pool.pictures[i], pool.images[i]),
        "forward_f16": lambda i: cext.i420_to_image(pool.pictures[i], pool.halves[i]),
        "back_f16": lambda i: cext.image_to_i420(pool.halves[i], pool.pictures[i]),
    }
    simd: list[str] = [name for name in cext.backends() if name in ("avx2", "avx512")]
    return limits | {
        f"{kind}_{backend}": with_backend(backend, call)
        for backend in (simd or ["c"])
        for kind, call in conversions.items()
    }


def check(pool: Pool) -> None:
    """Each conversion of each back end on the first buffers. Raises AssertionError where one is wrong; the images are
    as they were then."""
    before = [pool.images[0].copy(), pool.halves[0].copy()]
    wanted = {
        "i420": _pixels_py.exact_image(pool.pictures[0].arrays, cext.DEFAULT_COLOUR),
        "nv12": _pixels_py.exact_image(pool.nv12[0].arrays, cext.DEFAULT_COLOUR),
    }
    for name, call in candidates(pool).items():
        kind, _, backend = name.rpartition("_")
        if kind.startswith("limit"):
            continue
        image = pool.halves[0] if kind.endswith("f16") else pool.images[0]
        image[...], saved = before[image is pool.halves[0]], pool.flat[0].copy()
        if kind.startswith("forward"):
            call(0)
            error = float(np.abs(image - wanted["nv12" if "nv12" in kind else "i420"]).max())
            limit = FORWARD_ERROR[image.dtype.name]
        else:
            exact = _pixels_py.exact_planes(image, 3, cext.DEFAULT_COLOUR)
            call(0)
            planes = zip(pool.pictures[0].arrays, exact, strict=True)
            error = max(float(np.abs(plane - levels).max()) for plane, levels in planes)
            limit = BACK_ERROR[image.dtype.name]
        pool.flat[0][...] = saved
        assert error <= limit, f"{kind} with {backend} is off by {error:.3g}, more than {limit:g}"
    pool.images[0][...], pool.halves[0][...] = before


def measure(calls: dict[str, Call], buffers: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every call in every round, of all threads."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turn = 0
    order = random.Random(1)
    for number in range(rounds + WARM_UP):
        for name in order.sample(names, len(names)):
            index = turn % buffers
            turn += 1
            start = time.process_time()
            calls[name](index)
            elapsed = time.process_time() - start
            if number >= WARM_UP:
                seconds[name].append(elapsed)
    return seconds


def run(rounds: int = 60) -> dict[str, float]:
    """``kernel_{forward,back}_{size}_x_limit`` of the backend in use, the same for each backend by name, and every
    median as ``..._ms``. Takes a few seconds."""
    before = cext.BACKEND
    results: dict[str, float] = {}
    try:
        for size, (width, height) in SIZES.items():
            pool = pool_of(width, height)
            if size != "1080p":  # the same code as at 720p, where images do not fit the caches, and dear
                check(pool)
            seconds = measure(candidates(pool), len(pool), rounds)
            medians = {name: median(times) for name, times in seconds.items()}
            limits = {
                direction: min(value for name, value in medians.items() if name.startswith(f"limit_{direction}"))
                for direction in ("forward", "back")
            }
            for name, value in medians.items():
                results[f"kernel_{name}_{size}_ms"] = 1000 * value
                direction = name.split("_")[0]
                if direction != "limit":
                    results[f"kernel_{name}_{size}_x_limit"] = value / limits[direction]
            for direction in limits:
                results[f"kernel_{direction}_{size}_x_limit"] = (
                    medians.get(f"{direction}_{before}", 0) / limits[direction]
                )
    finally:
        cext.use_backend(before)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    results = run(parser.parse_args().rounds)
    names = sorted({key.removeprefix("kernel_").rsplit("_", 2)[0] for key in results if key.endswith("_ms")})
    print(f"{'':24}" + "".join(f"{size + ' ms':>12}{'x limit':>10}" for size in SIZES))
    for name in names:
        row = f"{name:24}"
        for size in SIZES:
            ratio = results.get(f"kernel_{name}_{size}_x_limit")
            row += f"{results[f'kernel_{name}_{size}_ms']:12.3f}" + (f"{ratio:10.2f}" if ratio else f"{'':10}")
        print(row)


if __name__ == "__main__":
    main()
