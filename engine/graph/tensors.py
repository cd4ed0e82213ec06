"""Pictures as they travel, and ComfyUI's IMAGE: ``[B, H, W, 3]`` float32, 0..1, on the CPU or the graph's device.

One converter serves one session. On the way in it reuses the memory of tensors that the graph has let go of, because
fresh memory costs more in page faults than the conversion itself; on the way out it takes whatever nodes give.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

import cext

from .device_pixels import ON_CPU, DevicePixels, Placement
from .image_memory import cached_bytes, empty_image

#: Tensors that may be in the graph at once and still come back: one that runs, one that its caches hold, one spare.
POOLED: Final = 3
#: A graph may put a picture of any size out; this bounds what one of its frames can cost (8K: 7680 x 4320).
MAX_PIXELS: Final = 7680 * 4320


def _idle_references() -> int:
    """What ``getrefcount`` says of an array that only a list holds: the list, the loop's name and, up to Python 3.13,
    the argument of the call."""
    for array in [np.empty(0)]:
        count = sys.getrefcount(array)
    return count


IDLE_REFERENCES: Final = _idle_references()


class NotAnImage(ValueError):
    """What the graph put out cannot be shown; the sentence says what it was."""


@dataclass(frozen=True, slots=True)
class PictureBytes:
    """One picture without row padding, in the session's pixel format. Width and height are even."""

    planes: bytes | memoryview
    width: int
    height: int
    slot: int = 0  # that holds them, where there is one


Place: TypeAlias = Callable[[int], tuple[int, memoryview] | None]


def _nowhere(size: int) -> None:
    """No slots."""


class Converter:
    """Planes to IMAGE and back, in one pixel format and colour. Calls come from one thread at a time."""

    def __init__(
        self,
        pixel_format: cext.PixelFormat = "i420",
        colour: cext.Colour | None = None,
        placement: Placement = ON_CPU,
    ) -> None:
        self.pixel_format = pixel_format
        self.colour = colour or cext.Colour()
        self._placement = placement
        self._device = DevicePixels(placement.device, pixel_format, self.colour) if placement.device else None
        self._pool: list[NDArray[np.float32]] = []
        self._cached_bytes = cached_bytes()

    @property
    def may_return(self) -> bool:
        """Whether IMAGEs are on the device and need not be; ``return_to_cpu`` brings them back."""
        return self._device is not None and self._placement.may_return

    def return_to_cpu(self) -> Callable[[], None]:
        """From here on the CPU converts. Gives what takes it back, where that was no help."""
        before = self._device
        self._device = None

        def undo() -> None:
            self._device = before

        return undo

    def to_images(self, pictures: Sequence[Any], width: int, height: int) -> torch.Tensor:
        """One IMAGE ``[B, height, width, 3]`` of a batch, private to the caller: nodes may write into it.

        pictures: bytes-like, each exactly one picture. Raises ValueError if a length does not fit the size.
        """
        if self._device is not None:
            return self._device.to_images(pictures, width, height)
        memory = self._memory((len(pictures), height, width, 3))
        # The graph reads it next.
        cext.bytes_to_images(
            pictures, width, height, memory, self.colour, self.pixel_format, cached=self._cached_bytes
        )
        return torch.from_numpy(memory)

    def _memory(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array that nothing but the pool refers to. A tensor over an array, and every view of it in any node's
        hands, holds a reference to the array until the last one is gone."""
        self._pool = [array for array in self._pool if array.shape == shape]
        for array in self._pool:
            if sys.getrefcount(array) == IDLE_REFERENCES:
                if self._placement.page_locked:
                    torch.cuda.synchronize()  # an upload from it may be under way still
                return array
        fresh = empty_image(shape, page_locked=self._placement.page_locked)
        if len(self._pool) < POOLED:
            self._pool.append(fresh)
        return fresh

    def to_planes(self, images: torch.Tensor, places: Sequence[Place] = ()) -> list[PictureBytes]:
        """The pictures of an IMAGE ``[B, H, W, C]``; an odd last row or column is cut off.

        C: 1 (grey), 3, or 4 with an ignored alpha. Any float type or uint8, any device. Raises NotAnImage.
        places: for each picture in turn, what gives a slot and its memory for so many bytes; a picture that gets none
        has memory of its own. Either way it is written there, and no copy is made.
        """
        on_device = self._device is not None and _is_on(images, self._device.device)
        ready = normalised(images, on_device=on_device)
        height, width = ready.shape[1:3]
        size = cext.picture_bytes(width, height, self.pixel_format)
        wanted = [*places, *[_nowhere] * len(ready)][: len(ready)]
        given = [place(size) or (0, np.empty(size, np.uint8).data) for place in wanted]
        if on_device and self._device is not None:
            self._device.to_planes(ready, [memory for _, memory in given])
        else:
            for image, (_, memory) in zip(ready.numpy(), given, strict=True):
                cext.image_to_bytes(image, memory, self.colour, self.pixel_format)
        return [PictureBytes(memory, width, height, slot) for slot, memory in given]


def _is_on(images: Any, device: torch.device) -> bool:
    return isinstance(images, torch.Tensor) and images.device == device


def normalised(images: Any, *, on_device: bool = False) -> torch.Tensor:
    """``images`` as the kernels take it: float32 or float16, 3 or 4 channels, whole pixels in memory, even size, on
    the CPU or, with ``on_device``, where it is.

    Costs nothing for an IMAGE that is so already. Raises NotAnImage.
    """
    if not isinstance(images, torch.Tensor):
        raise NotAnImage(f"the graph gave {type(images).__name__} for a picture, IMAGE is a tensor")
    shape = tuple(images.shape)
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4):
        raise NotAnImage(f"the graph gave a tensor {shape}, IMAGE is (batch, height, width, 3)")
    height, width = shape[1] // 2 * 2, shape[2] // 2 * 2
    if not shape[0] or not height or not width:
        raise NotAnImage(f"the graph gave a tensor {shape}, a picture has at least 2 x 2 pixels")
    if height * width > MAX_PIXELS:
        raise NotAnImage(f"the graph gave a picture of {width} x {height}, the limit is {MAX_PIXELS} pixels")
    if images.layout != torch.strided or images.is_complex() or images.is_meta:
        raise NotAnImage(f"the graph gave a tensor of {images.dtype} ({images.layout}), IMAGE holds floats")
    ready: torch.Tensor = images.detach()
    if shape[1:3] != (height, width):
        ready = ready[:, :height, :width]
    if ready.dtype is torch.float32 and ready.device.type == "cpu" and shape[3] == 3 and ready.is_contiguous():
        return ready  # what most nodes give, 5 us before the rest is done
    device = ready.device if on_device else torch.device("cpu")
    if ready.dtype is torch.uint8:
        ready = ready.to(device, torch.float32) / 255.0
    elif ready.dtype not in (torch.float32, torch.float16):
        if not ready.is_floating_point() and ready.dtype is not torch.bool:
            raise NotAnImage(f"the graph gave a tensor of {ready.dtype}, IMAGE holds floats from 0 to 1")
        ready = ready.to(device, torch.float32)
    ready = ready.to(device)
    if ready.shape[3] == 1:
        ready = ready.expand(-1, -1, -1, 3)
    channels = ready.shape[3]
    whole_pixels = ready.stride(3) == 1 and ready.stride(2) == channels and ready.stride(1) >= width * channels
    return ready if whole_pixels else ready.contiguous()
