"""Pixel conversion on the device of the graph: 8-bit planes travel over the bus, an eighth of what an IMAGE has.

The rules are those of ``cext``: nearest chroma in, the mean of 2x2 out, NaN is black, levels rounded to nearest even.
torch on any device, so that tests compare it with the kernels' oracle on the CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

import cext

logger = logging.getLogger(__name__)

#: ``auto`` is a measurement where there is a CUDA device, and the CPU everywhere else.
Choice = Literal["auto", "cpu", "device"]

Buffer = bytes | bytearray | memoryview

#: Of the measurement. At 720p a kernel takes about 0.3 ms and an upload of a whole IMAGE 0.5 ms or more.
_ROUNDS: Final = 7
_SIZE: Final = (1280, 720)


class DevicePixels:
    """One pixel format and colour on one device. Calls come from one thread at a time, on its current stream."""

    def __init__(
        self, device: torch.device, pixel_format: cext.PixelFormat = "i420", colour: cext.Colour | None = None
    ) -> None:
        self.device = device
        self.pixel_format = pixel_format
        self.colour = colour or cext.Colour()
        self._up = _Staging(device)
        self._down = _Staging(device)

    def to_images(self, pictures: Sequence[Buffer], width: int, height: int) -> torch.Tensor:
        """IMAGE ``[B, height, width, 3]`` float32 on the device; memory of its own.

        pictures: each exactly one picture without row padding. Raises ValueError if a length does not fit the size.
        """
        size = cext.picture_bytes(width, height, self.pixel_format)
        staged = self._up.host(len(pictures), size)
        for row, picture in zip(staged, pictures, strict=True):
            view = memoryview(picture)
            if view.nbytes != size:
                raise ValueError(f"a picture of {width} x {height} needs {size} bytes, not {view.nbytes}")
            row.numpy()[:] = view  # a copy more than the CPU's conversion makes, which reads the slot itself
        planes = staged.to(self.device, non_blocking=True)
        self._up.in_flight()
        return self._rgb(planes, width, height)

    def to_planes(self, images: torch.Tensor, outs: Sequence[Any]) -> None:
        """Write each image of ``[B, H, W, 3 or 4]`` (float32 or float16, on the device) into a writable buffer of
        exactly one picture. Waits for the device. Raises ValueError before writing if a buffer does not fit."""
        height, width = images.shape[1:3]
        size = cext.picture_bytes(width, height, self.pixel_format)
        views = [memoryview(out) for out in outs]
        for view in views:
            if view.nbytes != size:
                raise ValueError(f"a picture of {width} x {height} has {size} bytes, the buffer {view.nbytes}")
        levels = self._levels(images)
        staged = self._down.host(len(images), size)
        staged.copy_(levels, non_blocking=True)
        self._down.in_flight()
        self._down.wait()
        for row, view in zip(staged, views, strict=True):
            view[:] = memoryview(row.numpy())  # another one: a slot is no memory that the device can write

    def _rgb(self, planes: torch.Tensor, width: int, height: int) -> torch.Tensor:
        count = len(planes)
        if self.pixel_format == "rgb24":
            return planes.view(count, height, width, 3) / 255.0
        half_height, half_width = cext.chroma_shape(height, width)
        luma, chroma = planes[:, : height * width], planes[:, height * width :]
        if self.pixel_format == "nv12":
            u, v = chroma.reshape(count, half_height, half_width, 2).float().sub_(128.0).unbind(-1)
        else:
            u, v = chroma.reshape(count, 2, half_height, half_width).float().sub_(128.0).unbind(1)
        ys, rv, _, gu, gv, _, bu, _ = self.colour.to_rgb
        # Levels minus their offset are exact in float32, so that only the products are rounded.
        tint = torch.stack((rv * v, torch.add(gu * u, v, alpha=gv), bu * u), -1)
        if height % 2 or width % 2:
            tint = tint.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
            blocks = tint.new_empty(count, height, 1, width, 1, 3)
            tint = tint.view(count, height, 1, width, 1, 3)
        else:
            blocks = tint.new_empty(count, half_height, 2, half_width, 2, 3)
            tint = tint.view(count, half_height, 1, half_width, 1, 3)
        grey = (luma.float() - self.colour.luma[0]).mul_(ys)
        torch.add(grey.view(*blocks.shape[:5], 1), tint, out=blocks)
        return blocks.view(count, height, width, 3).clamp_(0.0, 1.0)

    def _levels(self, images: torch.Tensor) -> torch.Tensor:
        """``[B, bytes of a picture]`` uint8."""
        count, height, width = images.shape[:3]
        # A clamp passes NaN on; infinities become the largest numbers and are clamped.
        rgb = images[..., :3].float().nan_to_num(nan=0.0).clamp_(0.0, 1.0)
        if self.pixel_format == "rgb24":
            return rgb.mul_(255.0).round_().to(torch.uint8).view(count, -1)
        yr, yg, yb, y0, ur, ug, ub, vr, vg, vb = self.colour.to_yuv
        red, green, blue = rgb.unbind(-1)
        luma = torch.add(yr * red, green, alpha=yg).add_(blue, alpha=yb).add_(y0)
        # The last row or column of an odd size is paired with itself.
        if height % 2:
            rgb = torch.cat((rgb, rgb[:, -1:]), 1)
        if width % 2:
            rgb = torch.cat((rgb, rgb[:, :, -1:]), 2)
        half_height, half_width = cext.chroma_shape(height, width)
        red, green, blue = rgb.view(count, half_height, 2, half_width, 2, 3).sum((2, 4)).unbind(-1)
        u = torch.add(ur * red, green, alpha=ug).add_(blue, alpha=ub).add_(128.0)
        v = torch.add(vr * red, green, alpha=vg).add_(blue, alpha=vb).add_(128.0)
        chroma = torch.stack((u, v), -1 if self.pixel_format == "nv12" else 1)
        levels = torch.cat((luma.reshape(count, -1), chroma.reshape(count, -1)), 1)
        return levels.round_().clamp_(0.0, 255.0).to(torch.uint8)


class _Staging:
    """Host memory that the device copies from or to, page-locked where that helps, used again and again."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: Any = None  # the event after the last copy

    def host(self, count: int, size: int) -> torch.Tensor:
        """``[count, size]`` uint8 that no copy uses any more; what was in it is lost."""
        self.wait()
        if self._memory.numel() < count * size:
            self._memory = torch.empty(count * size, dtype=torch.uint8, pin_memory=self._is_cuda)
        return self._memory[: count * size].view(count, size)

    def in_flight(self) -> None:
        """A copy has been enqueued."""
        if self._is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a session's pictures are converted. device: there; None for the CPU. page_locked: what the CPU writes,
    so that nodes upload it faster. may_return: a graph that cannot take an IMAGE on the device gets it on the CPU."""

    device: torch.device | None = None
    page_locked: bool = False
    may_return: bool = False


ON_CPU: Final = Placement()


def placement(
    choice: Choice, device: torch.device, on_cpu: Callable[[Sequence[Buffer], int, int], torch.Tensor]
) -> Placement:
    """What the setting means on this device: nothing on the CPU; ``auto`` measures (``faster_on_device``).
    Where that fails it is the CPU."""
    if device.type == "cpu":
        if choice == "device":
            logger.warning("convert is device, but graphs run on the CPU: pixels are converted there")
        return ON_CPU
    if choice == "cpu":
        return Placement(page_locked=True)
    if choice == "device":
        return Placement(device, page_locked=True)
    try:
        faster, device_s, cpu_s = faster_on_device(device, on_cpu)
    except Exception as exc:  # no memory left for it, say; nothing else depends on the measurement
        logger.warning("pixels are converted on the CPU, the measurement failed: %s: %s", type(exc).__name__, exc)
        return Placement(page_locked=True)
    logger.info("a 720p IMAGE is on %s after %.2f ms, %.2f ms by the CPU", device, 1e3 * device_s, 1e3 * cpu_s)
    return Placement(device if faster else None, page_locked=True, may_return=True)


def faster_on_device(
    device: torch.device,
    on_cpu: Callable[[Sequence[Buffer], int, int], torch.Tensor],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[bool, float, float]:
    """Whether an IMAGE is on the device sooner when it is converted there; seconds there, seconds by the CPU.

    on_cpu: the conversion on the CPU, into page-locked memory. Each is measured to the end of its work, by the median
    of some rounds in turn.
    """
    width, height = _SIZE
    picture = bytes(cext.picture_bytes(width, height))
    there = DevicePixels(device)
    candidates: list[Callable[[], torch.Tensor]] = [
        lambda: there.to_images([picture], width, height),
        lambda: on_cpu([picture], width, height).to(device, non_blocking=True),  # as a node does
    ]
    seconds: list[list[float]] = [[], []]
    for _ in range(_ROUNDS + 1):
        for taken, candidate in zip(seconds, candidates, strict=True):
            began = clock()
            candidate()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(clock() - began)
    there_s, cpu_s = (sorted(taken[1:])[_ROUNDS // 2] for taken in seconds)  # the first one allocates
    return there_s < cpu_s, there_s, cpu_s
