"""The conversion in NumPy, in 64-bit floats: what the kernels are tested against, and the fallback without them.

Written from the definition of the colour spaces, not from the kernels' folded coefficients. Allocates freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._colour import Colour

Floats = NDArray[np.float64]
Arrays = Sequence[NDArray[np.uint8]]


def to_images(pictures: Sequence[Arrays], images: NDArray[Any], colour: Colour, cached: int = 0) -> None:
    """Write each picture's RGB 0..1 into ``images`` (B, H, W, 3). One array: rgb24; two: nv12; three: i420."""
    for arrays, image in zip(pictures, images, strict=True):
        image[...] = exact_image(arrays, colour)


def from_images(images: NDArray[Any], pictures: Sequence[Arrays], colour: Colour) -> None:
    """Write ``images`` (B, H, W, 3 or 4) into the pictures' planes, rounded to nearest."""
    for image, arrays in zip(images, pictures, strict=True):
        for plane, levels in zip(arrays, exact_planes(image, len(arrays), colour), strict=True):
            plane[...] = np.minimum(np.rint(levels), 255)


def exact_image(arrays: Arrays, colour: Colour) -> Floats:
    """(H, W, 3) RGB 0..1 of one picture."""
    y = arrays[0].astype(np.float64)
    if len(arrays) == 1:
        return y / 255.0
    u, v = (arrays[1][:, 0::2], arrays[1][:, 1::2]) if len(arrays) == 2 else arrays[1:]
    height, width = y.shape
    cb, cr = (
        ((plane.astype(np.float64) - 128.0) / colour.chroma_levels).repeat(2, 0).repeat(2, 1)[:height, :width]
        for plane in (u, v)
    )
    kr, kg, kb = colour.weights
    black, span = colour.luma
    luma = (y - black) / span
    red = luma + 2.0 * (1.0 - kr) * cr
    blue = luma + 2.0 * (1.0 - kb) * cb
    green = (luma - kr * red - kb * blue) / kg
    return np.clip(np.stack((red, green, blue), axis=-1), 0.0, 1.0)


def exact_planes(image: NDArray[Any], count: int, colour: Colour) -> list[Floats]:
    """The levels of one image's planes before rounding; ``count`` planes as in ``to_images``."""
    rgb = np.clip(np.nan_to_num(image[..., :3].astype(np.float64), nan=0.0), 0.0, 1.0)
    if count == 1:
        return [255.0 * rgb]
    kr, kg, kb = colour.weights
    black, span = colour.luma
    luma = rgb @ np.array([kr, kg, kb])
    cb = (rgb[..., 2] - luma) / (2.0 * (1.0 - kb))
    cr = (rgb[..., 0] - luma) / (2.0 * (1.0 - kr))
    u, v = (128.0 + colour.chroma_levels * block_mean(difference) for difference in (cb, cr))
    y = black + span * luma
    if count == 3:
        return [y, u, v]
    return [y, np.stack((u, v), axis=-1).reshape(len(u), -1)]


def block_mean(plane: Floats) -> Floats:
    """Mean of each 2x2 block; the last row or column of an odd size is paired with itself."""
    height, width = plane.shape
    even = np.pad(plane, ((0, height % 2), (0, width % 2)), mode="edge")
    mean: Floats = even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2).mean(axis=(1, 3))
    return mean
