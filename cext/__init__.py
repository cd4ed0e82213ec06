"""Pixel conversion between decoded pictures and ComfyUI's IMAGE.

The door of the kernels: everything is checked here, with a ValueError before a byte of the destination changes, and
the kernels behind skip bounds checks. No memory is allocated and no thread started; the GIL is released.

Rules of the conversion:

- Chroma is nearest on the way in (a chroma sample colours its 2x2 block) and the mean of the 2x2 block on the way
  back, so that a pass-through of colours inside the RGB cube returns every byte unchanged.
- On the way back a channel is clamped to 0..1, NaN is 0, and levels are rounded to nearest. Alpha is ignored.
- Odd sizes: chroma has ``(size + 1) // 2`` samples; the last row or column is paired with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from . import _pixels_py
from ._colour import Colour
from ._planes import (
    Nv12Planes,
    Picture,
    PixelFormat,
    Planes,
    Rgb24Plane,
    chroma_shape,
    picture_bytes,
    planes_from_buffer,
)

try:
    from . import _pixels

    COMPILED = True
except ImportError:  # not compiled: the NumPy code gives the same result, some thirty times slower
    COMPILED = False

__all__ = [
    "BACKEND",
    "Backend",
    "Colour",
    "Nv12Planes",
    "Picture",
    "PixelFormat",
    "Planes",
    "Rgb24Plane",
    "backends",
    "bytes_to_images",
    "chroma_shape",
    "i420_to_image",
    "image_to_bytes",
    "image_to_i420",
    "image_to_nv12",
    "image_to_picture",
    "image_to_rgb24",
    "images_to_pictures",
    "nv12_to_image",
    "picture_bytes",
    "picture_to_image",
    "pictures_to_images",
    "planes_from_buffer",
    "rgb24_to_image",
    "use_backend",
]

Backend = Literal["numpy", "c", "avx2", "avx512"]
Image: TypeAlias = NDArray[np.float32] | NDArray[np.float16]

P = TypeVar("P", Planes, Nv12Planes, Rgb24Plane)

DEFAULT_COLOUR = Colour()

# Steps of NumPy's exact overlap search, which is exponential for strange strides; planes of codecs need a handful.
OVERLAP_WORK: Any = 10_000


def backends() -> tuple[Backend, ...]:
    """The backends that this machine can run, the fastest last."""
    compiled: tuple[Backend, ...] = ("c", "avx2", "avx512")
    return ("numpy", *(name for name in compiled if COMPILED and _pixels.supports(name)))


def use_backend(name: Backend) -> None:
    """Run every later conversion of this process with ``name``. Raises ValueError if this machine cannot."""
    global BACKEND
    if name not in get_args(Backend):
        raise ValueError(f"backend is {name!r}, it must be one of {', '.join(get_args(Backend))}")
    if name not in backends():
        raise ValueError(f"backend {name} does not run here: the extension is not built or the CPU lacks it")
    if name != "numpy":
        _pixels.select(name)
    BACKEND = name


BACKEND: Backend = "numpy"
use_backend(backends()[-1])


def i420_to_image(planes: Planes, out: Any, colour: Colour = DEFAULT_COLOUR) -> None:
    """Convert one decoded picture to what ComfyUI calls IMAGE.

    planes: may be read-only.
    out: (H, W, 3) RGB 0..1, float32 or float16, pixels of a row contiguous; written in place.
    colour: matrix and range of the stream.
    Raises ValueError before touching ``out`` if sizes, types or memory do not fit.
    """
    picture_to_image(_of(planes, Planes), out, colour)


def image_to_i420(image: Any, planes: Planes, colour: Colour = DEFAULT_COLOUR) -> None:
    """Convert one IMAGE to a picture, written into ``planes`` in place.

    image: (H, W, 3) RGB or (H, W, 4) with an ignored alpha, float32 or float16, nominally 0..1, pixels contiguous.
    planes: writable, of the image's size, not overlapping each other or the image.
    colour: matrix and range that the planes shall have.
    Raises ValueError before touching ``planes`` if sizes, types or memory do not fit.
    """
    image_to_picture(image, _of(planes, Planes), colour)


def nv12_to_image(planes: Nv12Planes, out: Any, colour: Colour = DEFAULT_COLOUR) -> None:
    """As ``i420_to_image``, from interleaved chroma."""
    picture_to_image(_of(planes, Nv12Planes), out, colour)


def image_to_nv12(image: Any, planes: Nv12Planes, colour: Colour = DEFAULT_COLOUR) -> None:
    """As ``image_to_i420``, to interleaved chroma."""
    image_to_picture(image, _of(planes, Nv12Planes), colour)


def rgb24_to_image(plane: Rgb24Plane, out: Any) -> None:
    """As ``i420_to_image``, from packed RGB: level 255 is 1."""
    picture_to_image(_of(plane, Rgb24Plane), out)


def image_to_rgb24(image: Any, plane: Rgb24Plane) -> None:
    """As ``image_to_i420``, to packed RGB."""
    image_to_picture(image, _of(plane, Rgb24Plane))


def picture_to_image(picture: Picture, out: Any, colour: Colour = DEFAULT_COLOUR) -> None:
    """As ``i420_to_image``, for a picture of any format. ``colour`` does not matter for rgb24."""
    _read((picture,), _image("out", out, ndim=3, writable=True)[np.newaxis], colour)


def image_to_picture(image: Any, picture: Picture, colour: Colour = DEFAULT_COLOUR) -> None:
    """As ``image_to_i420``, for a picture of any format."""
    _write(_image("image", image, ndim=3)[np.newaxis], (picture,), colour)


def pictures_to_images(
    pictures: Sequence[Picture], out: Any, colour: Colour = DEFAULT_COLOUR, *, cached: int = 0
) -> None:
    """Convert a batch: ``out`` is (B, H, W, 3) and takes ``pictures`` in order. The GIL is released once.

    The pictures have one size and one pixel format; each may lie anywhere. cached: so many bytes at the end of
    ``out`` will still be in the cache when somebody reads them, so they are written through it. Raises ValueError
    before touching ``out``.
    """
    _read(pictures, _image("out", out, ndim=4, writable=True), colour, cached)


def bytes_to_images(
    buffers: Sequence[Any],
    width: int,
    height: int,
    out: Any,
    colour: Colour = DEFAULT_COLOUR,
    pixel_format: PixelFormat = "i420",
    *,
    cached: int = 0,
) -> None:
    """`planes_from_buffer` and `pictures_to_images` in one. For the one picture of a frame, I420 to float32, all is
    checked in C: 2 us where the Python checks take 12."""
    is_plain = BACKEND != "numpy" and len(buffers) == 1 and pixel_format == "i420"
    if is_plain and _pixels.plain_to_image(buffers[0], width, height, out, colour, cached):
        return
    # Another shape, or a mistake, of which the door knows what to say.
    pictures = [planes_from_buffer(buffer, width, height, pixel_format) for buffer in buffers]
    pictures_to_images(pictures, out, colour, cached=cached)


def image_to_bytes(image: Any, out: Any, colour: Colour = DEFAULT_COLOUR, pixel_format: PixelFormat = "i420") -> None:
    """`image_to_picture` into a writable buffer of exactly the picture's bytes; quick as `bytes_to_images`."""
    if BACKEND != "numpy" and pixel_format == "i420" and _pixels.plain_from_image(image, out, colour):
        return
    array = _image("image", image, ndim=3)
    image_to_picture(array, planes_from_buffer(out, array.shape[1], array.shape[0], pixel_format), colour)


def images_to_pictures(images: Any, pictures: Sequence[Picture], colour: Colour = DEFAULT_COLOUR) -> None:
    """Convert a batch back: ``images`` is (B, H, W, 3) or (B, H, W, 4). The GIL is released once.

    The pictures have one size and one pixel format. Raises ValueError before touching any of them.
    """
    _write(_image("images", images, ndim=4), pictures, colour)


def _read(pictures: Sequence[Picture], out: Image, colour: Colour, cached: int = 0) -> None:
    _batch("out", out, pictures)
    if any(np.may_share_memory(out, plane) for picture in pictures for plane in picture.arrays):
        raise ValueError("out lies in the memory of a picture")
    _kernels().to_images([picture.arrays for picture in pictures], out, colour, cached)


def _write(images: Image, pictures: Sequence[Picture], colour: Colour) -> None:
    _batch("image", images, pictures)
    planes = [plane for picture in pictures for plane in picture.arrays]
    for number, plane in enumerate(planes):
        if not plane.flags.writeable:
            raise ValueError("a plane of the picture is read-only")
        row = plane[0].nbytes
        if len(plane) > 1 and plane.strides[0] < row:
            raise ValueError(f"a plane has a line size of {plane.strides[0]} bytes, less than its rows of {row}")
        if np.may_share_memory(images, plane):
            raise ValueError("the picture lies in the memory of the image")
        if any(_overlap(plane, other) for other in planes[:number]):
            raise ValueError("two planes that are to be written overlap")
    _kernels().from_images(images, [picture.arrays for picture in pictures], colour)


def _kernels() -> Any:
    return _pixels_py if BACKEND == "numpy" else _pixels


def _of(picture: P, kind: type[P]) -> P:
    if not isinstance(picture, kind):
        raise ValueError(f"the picture is {type(picture).__name__}, it must be {kind.__name__}")
    return picture


def _image(name: str, image: Any, *, ndim: int, writable: bool = False) -> Image:
    """``image`` as an array of whole pixels. Rows may have gaps between them, pixels only an unused alpha."""
    try:
        array = np.asarray(image)
    except (TypeError, ValueError, BufferError) as exc:
        raise ValueError(f"{name} gives no memory: {exc}") from exc
    if array.dtype not in (np.float32, np.float16):
        raise ValueError(f"{name} holds {array.dtype}, it must hold float32 or float16")
    channels = (3,) if writable else (3, 4)
    if array.ndim != ndim or array.shape[-1] not in channels:
        shape = "(B, H, W, C)" if ndim == 4 else "(H, W, C)"
        raise ValueError(f"{name} is {array.shape}, it must be {shape} with C = {' or '.join(map(str, channels))}")
    if 0 in array.shape:
        raise ValueError(f"{name} is {array.shape}, an image has at least one pixel")
    if not array.flags.aligned:
        raise ValueError(f"{name} does not lie at a multiple of {array.itemsize} bytes")
    pixel, row, step = array.strides[-2], array.strides[-3], array.itemsize
    if array.strides[-1] != step or (array.shape[-2] > 1 and pixel not in [step * count for count in channels]):
        raise ValueError(f"{name} has gaps between the values of a row")
    if array.shape[-3] > 1 and row <= 0:
        raise ValueError(f"{name} has a line size of {row} bytes, it must be positive")
    if writable:
        if not array.flags.writeable:
            raise ValueError(f"{name} is read-only")
        if array.shape[-3] > 1 and row < array[..., 0, :, :].nbytes // (array.shape[0] if ndim == 4 else 1):
            raise ValueError(f"{name} has a line size of {row} bytes, less than its rows are long")
        if ndim == 4 and len(array) > 1 and array.strides[0] < (array.shape[1] - 1) * row + array[0, 0].nbytes:
            raise ValueError(f"{name} has images that overlap")
    return array


def _batch(name: str, images: Image, pictures: Sequence[Picture]) -> None:
    """Raises ValueError if the pictures are not as many and as large as the images, or of several formats."""
    if len(images) != len(pictures):
        raise ValueError(f"{name} holds {len(images)} images for {len(pictures)} pictures")
    _, height, width, channels = images.shape
    for picture in pictures:
        if type(picture) is not type(pictures[0]) or not isinstance(picture, Picture):
            raise ValueError(f"a picture is {type(picture).__name__}, all must be of one pixel format")
        if (picture.height, picture.width) != (height, width):
            needed = (picture.height, picture.width, channels)
            raise ValueError(f"{name} is {images.shape[1:]}, the picture needs {needed}")


def _overlap(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether two planes share a byte. Rows of U and V side by side in one block interleave without sharing any."""
    if not np.may_share_memory(one, other):
        return False
    try:
        return np.shares_memory(one, other, max_work=OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True
