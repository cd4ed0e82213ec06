"""Our conversions against the ways that others take: swscale through PyAV, torch, and OpenCV where it is installed.

All on one thread, into memory that is there already, by turns in one run as in ``kernels``; the inputs are cold. The
outputs are compared with ours before anything is timed: what does not convert is no rival.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

import cext

from . import kernels

try:
    import cv2
except ImportError:  # no dependency of the programs; `make bench` installs it
    cv2 = None

ROUNDS = 15

#: Largest difference from our result, in 0..1 forward and in levels back, on smooth pictures. swscale rounds in fixed
#: point, OpenCV takes one pixel of four for chroma.
FORWARD_ERROR, BACK_ERROR = 0.02, 6


def smooth(width: int, height: int, number: int) -> NDArray[np.uint8]:
    """An I420 picture whose colours change slowly, so that siting and rounding are all that can differ."""
    rows, columns = np.mgrid[0:height, 0:width]
    luma = 126 + 50 * np.sin((columns + 3 * number) / 97) * np.cos(rows / 83)
    planes = [luma.astype(np.uint8).ravel()]
    for shift in (1.0, 2.0):
        part = 128 + 20 * np.sin(columns[::2, ::2] / 131 + shift) * np.cos(rows[::2, ::2] / 113)
        planes.append(part.astype(np.uint8).ravel())
    return np.concatenate(planes)


class Ways:
    """Every way, forward and back, on a pool of pictures of one size."""

    def __init__(self, width: int, height: int) -> None:
        count = max(4, kernels.POOL_BYTES // (12 * width * height))
        self._width, self._height = width, height
        self._flat = [kernels.aligned(cext.picture_bytes(width, height)) for _ in range(count)]
        for number, buffer in enumerate(self._flat):
            buffer[...] = smooth(width, height, number)
        self._planes = [cext.planes_from_buffer(buffer, width, height) for buffer in self._flat]
        # Heights that are no multiple of 4 have no frame without a copy (see gateway_shim.media.planes).
        shape = (height * 3 // 2, width)
        self._sheets = [buffer.reshape(shape) for buffer in self._flat]
        self._frames = [av.VideoFrame.from_numpy_buffer(sheet, "yuv420p") for sheet in self._sheets]
        self._images = []
        for _ in range(count):
            image = kernels.aligned(12 * width * height).view(np.float32).reshape(height, width, 3)
            image[...] = 0
            self._images.append(image)
        self._out = np.zeros(cext.picture_bytes(width, height), np.uint8)
        self._bytes = np.empty((height, width, 3), np.uint8)
        self._scaled = np.empty((height, width, 3), np.float32)
        self._reformatters = {"rgb24": VideoReformatter(), "yuv420p": VideoReformatter()}

    def __len__(self) -> int:
        return len(self._flat)

    def forward(self) -> dict[str, Callable[[int], NDArray[np.float32]]]:
        ways = {"ours": self._ours, "swscale": self._swscale, "torch": self._torch}
        return ways if cv2 is None else ways | {"opencv": self._opencv}

    def back(self) -> dict[str, Callable[[int], NDArray[np.uint8]]]:
        ways = {"ours": self._ours_back, "swscale": self._swscale_back, "torch": self._torch_back}
        return ways if cv2 is None else ways | {"opencv": self._opencv_back}

    def _ours(self, index: int) -> NDArray[np.float32]:
        cext.i420_to_image(self._planes[index], self._images[index])
        return self._images[index]

    def _ours_back(self, index: int) -> NDArray[np.uint8]:
        planes = cext.planes_from_buffer(self._out, self._width, self._height)
        cext.image_to_i420(self._images[index], planes)
        return self._out

    def _swscale(self, index: int) -> NDArray[np.float32]:
        rgb = self._reformatters["rgb24"].reformat(self._frames[index], format="rgb24", threads=1)
        np.multiply(rgb.to_ndarray(), np.float32(1 / 255), out=self._images[index])
        return self._images[index]

    def _swscale_back(self, index: int) -> NDArray[np.uint8]:
        np.multiply(self._images[index], np.float32(255), out=self._scaled)
        np.clip(self._scaled, 0, 255, out=self._scaled)
        np.rint(self._scaled, out=self._scaled)
        np.copyto(self._bytes, self._scaled, casting="unsafe")
        frame = av.VideoFrame.from_ndarray(self._bytes, format="rgb24")
        return self._reformatters["yuv420p"].reformat(frame, format="yuv420p", threads=1).to_ndarray().ravel()

    def _torch(self, index: int) -> NDArray[np.float32]:
        width, height = self._width, self._height
        flat = torch.from_numpy(self._flat[index])
        luma = (flat[: width * height].view(height, width).float() - 16) / 219
        u, v = (flat[width * height :].view(2, height // 2, width // 2).float() - 128) / 224
        wide = torch.stack([1.402 * v, -0.344136 * u - 0.714136 * v, 1.772 * u], -1)
        wide = wide.repeat_interleave(2, 0).repeat_interleave(2, 1)
        image = torch.from_numpy(self._images[index])
        torch.add(luma[..., None], wide, out=image).clamp_(0, 1)
        return self._images[index]

    def _torch_back(self, index: int) -> NDArray[np.uint8]:
        width, height = self._width, self._height
        image = torch.from_numpy(self._images[index]).clamp(0, 1)
        luma = image @ torch.tensor([0.299, 0.587, 0.114])
        small = image.view(height // 2, 2, width // 2, 2, 3).mean((1, 3))
        grey = small @ torch.tensor([0.299, 0.587, 0.114])
        u, v = (small[..., 2] - grey) / 1.772, (small[..., 0] - grey) / 1.402
        out = torch.from_numpy(self._out)
        out[: width * height] = (luma * 219 + 16).round().to(torch.uint8).ravel()
        out[width * height :] = (torch.stack([u, v]) * 224 + 128).round().to(torch.uint8).ravel()
        return self._out

    def _opencv(self, index: int) -> NDArray[np.float32]:
        cv2.cvtColor(self._sheets[index], cv2.COLOR_YUV2RGB_I420, dst=self._bytes)
        np.multiply(self._bytes, np.float32(1 / 255), out=self._images[index])
        return self._images[index]

    def _opencv_back(self, index: int) -> NDArray[np.uint8]:
        cv2.convertScaleAbs(self._images[index], dst=self._bytes, alpha=255)
        sheet: Any = cv2.cvtColor(self._bytes, cv2.COLOR_RGB2YUV_I420)
        return np.asarray(sheet).ravel()


def check(ways: Ways) -> None:
    """Raises AssertionError where a way gives another picture than ours."""
    ours = ways.forward()["ours"](0).copy()
    for name, way in ways.forward().items():
        error = float(np.abs(way(0) - ours).max())
        assert error <= FORWARD_ERROR, f"{name} differs from ours by {error:.3f} forward"
    ways.forward()["ours"](0)
    back = ways.back()["ours"](0).astype(np.int16).copy()
    for name, call in ways.back().items():
        levels = int(np.abs(call(0).astype(np.int16) - back).max())
        assert levels <= BACK_ERROR, f"{name} differs from ours by {levels} levels back"


def run(rounds: int = ROUNDS, sizes: Mapping[str, tuple[int, int]] = kernels.SIZES) -> dict[str, float]:
    """``kernel_peer_{way}_{direction}_{size}_ms`` and the same as ``_x_ours``: how many times our time it takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if cv2 is not None:
        cv2.setNumThreads(1)
    results: dict[str, float] = {}
    try:
        for size, (width, height) in sizes.items():
            ways = Ways(width, height)
            check(ways)
            calls: dict[str, Callable[[int], Any]] = {f"{name}_forward": way for name, way in ways.forward().items()}
            calls |= {f"{name}_back": way for name, way in ways.back().items()}
            medians = {
                name: median(times)
                for name, times in kernels.measure(calls, len(ways), rounds).items()  # type: ignore[arg-type]
            }
            for name, seconds in medians.items():
                results[f"kernel_peer_{name}_{size}_ms"] = 1000 * seconds
                results[f"kernel_peer_{name}_{size}_x_ours"] = seconds / medians[f"ours_{name.rpartition('_')[2]}"]
    finally:
        torch.set_num_threads(threads)
    return results


def table(results: Mapping[str, float]) -> str:
    """How many times our time the others take."""
    sizes = [size for size in kernels.SIZES if f"kernel_peer_ours_forward_{size}_ms" in results]
    lines = ["the same conversion by others, in multiples of our time", ""]
    lines.append(f"{'':18}" + "".join(f"{size:>8}" for size in sizes))
    for direction in ("forward", "back"):
        for way in ("swscale", "torch", "opencv"):
            keys = [f"kernel_peer_{way}_{direction}_{size}_x_ours" for size in sizes]
            if keys and all(key in results for key in keys):
                lines.append(f"{way + ' ' + direction:18}" + "".join(f"{results[key]:8.1f}" for key in keys))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run()))
