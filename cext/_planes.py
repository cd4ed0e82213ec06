"""Pictures in memory as video codecs keep them: 8-bit planes behind a checked door.

A picture object holds views and copies nothing. Constructing one checks shapes and strides, so that the kernels need
no bounds checks. I420 and NV12 chroma is ``((height + 1) // 2, (width + 1) // 2)``: an odd last column or row has
chroma of its own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

PixelFormat = Literal["i420", "nv12", "rgb24"]
Bytes: TypeAlias = NDArray[np.uint8]


def rows(name: str, plane: Any, shape: tuple[int, ...] | None = None, ndim: int = 2) -> Bytes:
    """``plane`` as a uint8 array whose rows have contiguous bytes and a positive line size.

    ``plane`` is an array or has the buffer protocol; it may be read-only. Raises ValueError if it does not fit.
    """
    try:
        array = np.asarray(plane)
    except (TypeError, ValueError, BufferError) as exc:
        raise ValueError(f"{name} gives no memory: {exc}") from exc
    if array.dtype != np.uint8:
        raise ValueError(f"{name} holds {array.dtype}, it must hold uint8")
    if array.ndim != ndim:
        raise ValueError(f"{name} has {array.ndim} dimensions, it must have {ndim}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} is {array.shape}, the picture needs {shape}")
    if 0 in array.shape:
        raise ValueError(f"{name} is {array.shape}, a picture has at least one pixel")
    if not array[0].flags.c_contiguous:
        raise ValueError(f"{name} has gaps between the bytes of a row")
    if array.shape[0] > 1 and array.strides[0] <= 0:
        raise ValueError(f"{name} has a line size of {array.strides[0]} bytes, it must be positive")
    return array


def chroma_shape(height: int, width: int) -> tuple[int, int]:
    return (height + 1) // 2, (width + 1) // 2


class Planes:
    """One I420 picture (yuv420p): Y ``(H, W)``, U and V ``((H+1)//2, (W+1)//2)``, uint8, any positive line size."""

    __slots__ = ("arrays", "height", "u", "v", "width", "y")
    pixel_format: ClassVar[PixelFormat] = "i420"

    def __init__(self, y: Any, u: Any, v: Any) -> None:
        self.y = rows("y", y)
        self.height, self.width = self.y.shape
        chroma = chroma_shape(self.height, self.width)
        self.u = rows("u", u, chroma)
        self.v = rows("v", v, chroma)
        self.arrays = (self.y, self.u, self.v)


class Nv12Planes:
    """One NV12 picture: Y ``(H, W)`` and UV ``((H+1)//2, 2 * ((W+1)//2))`` with U and V alternating, uint8."""

    __slots__ = ("arrays", "height", "uv", "width", "y")
    pixel_format: ClassVar[PixelFormat] = "nv12"

    def __init__(self, y: Any, uv: Any) -> None:
        self.y = rows("y", y)
        self.height, self.width = self.y.shape
        height, width = chroma_shape(self.height, self.width)
        self.uv = rows("uv", uv, (height, 2 * width))
        self.arrays = (self.y, self.uv)


class Rgb24Plane:
    """One packed RGB picture: ``(H, W, 3)`` uint8, pixels of a row contiguous, any positive line size."""

    __slots__ = ("arrays", "height", "rgb", "width")
    pixel_format: ClassVar[PixelFormat] = "rgb24"

    def __init__(self, rgb: Any) -> None:
        self.rgb = rows("rgb", rgb, ndim=3)
        self.height, self.width, channels = self.rgb.shape
        if channels != 3:
            raise ValueError(f"rgb has {channels} channels, it must have 3")
        self.arrays = (self.rgb,)


Picture: TypeAlias = Planes | Nv12Planes | Rgb24Plane


def picture_bytes(width: int, height: int, pixel_format: PixelFormat = "i420") -> int:
    """Bytes of a picture without row padding. Raises ValueError for a size below 1 or an unknown format."""
    if width < 1 or height < 1:
        raise ValueError(f"the picture is {width}x{height}, a picture has at least one pixel")
    if pixel_format == "rgb24":
        return 3 * width * height
    if pixel_format in ("i420", "nv12"):
        chroma_height, chroma_width = chroma_shape(height, width)
        return width * height + 2 * chroma_height * chroma_width
    raise ValueError(f"pixel format is {pixel_format!r}, it must be i420, nv12 or rgb24")


@overload
def planes_from_buffer(buffer: Any, width: int, height: int, pixel_format: Literal["i420"] = "i420") -> Planes: ...
@overload
def planes_from_buffer(buffer: Any, width: int, height: int, pixel_format: Literal["nv12"]) -> Nv12Planes: ...
@overload
def planes_from_buffer(buffer: Any, width: int, height: int, pixel_format: Literal["rgb24"]) -> Rgb24Plane: ...
@overload
def planes_from_buffer(buffer: Any, width: int, height: int, pixel_format: PixelFormat) -> Picture: ...


def planes_from_buffer(buffer: Any, width: int, height: int, pixel_format: PixelFormat = "i420") -> Picture:
    """A picture over planes that lie one after the other without row padding; no byte is copied.

    buffer: exactly the picture's bytes (bytes, memoryview, mmap, uint8 array), writable if it is to be written.
    Raises ValueError if the buffer is not contiguous or has another length than ``picture_bytes`` says.
    """
    needed = picture_bytes(width, height, pixel_format)
    try:
        data = np.frombuffer(buffer, np.uint8)
    except (TypeError, ValueError, BufferError) as exc:
        raise ValueError(f"the buffer gives no contiguous bytes: {exc}") from exc
    if data.size != needed:
        raise ValueError(f"the buffer has {data.size} bytes, {width}x{height} {pixel_format} needs {needed}")
    if pixel_format == "rgb24":
        return Rgb24Plane(data.reshape(height, width, 3))
    y = data[: width * height].reshape(height, width)
    rest = data[width * height :]
    chroma = chroma_shape(height, width)
    if pixel_format == "nv12":
        return Nv12Planes(y, rest.reshape(chroma[0], 2 * chroma[1]))
    u, v = rest.reshape(2, *chroma)
    return Planes(y, u, v)
