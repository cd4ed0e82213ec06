"""A picture on its way to the engine: its I420 planes as arrays, whoever decoded it. Knows no codec library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

#: Y (H, W), U and V (H/2, W/2), uint8. Views of the decoder's memory, whose rows may be padded; they keep it alive.
Rows: TypeAlias = Sequence[NDArray[np.uint8]]


def planes_size(width: int, height: int) -> int:
    """Bytes of an I420 picture of even size."""
    return width * height * 3 // 2


def rows_size(rows: Rows) -> int:
    """Bytes of the picture as I420."""
    size = 0
    for plane in rows:
        size += plane.size
    return size


def write_planes(rows: Rows, out: bytearray | memoryview) -> int:
    """Copy a picture to the beginning of ``out`` as I420; the bytes written.

    Decoders pad their rows (854 wide has a line size of 896), hence one strided copy per plane.
    Raises ValueError before touching ``out`` if it is too small.
    """
    size = rows_size(rows)
    if len(out) < size:
        raise ValueError(f"out has {len(out)} bytes, the picture needs {size}")
    at = 0
    for plane in rows:
        np.ndarray(plane.shape, np.uint8, out, at)[:] = plane
        at += plane.size
    return size


def planes_for_message(rows: Rows) -> tuple[bytes | memoryview, ...]:
    """A picture as pieces that, one after the other, are its I420 bytes; views where its rows are tight."""
    # Padded rows are packed first, a copy more: 960 views of rows cost what it does and their join twice that.
    return tuple(plane.reshape(-1).data if plane.strides[0] == plane.shape[1] else plane.tobytes() for plane in rows)
