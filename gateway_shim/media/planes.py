"""Pictures as bytes: I420, that is Y, U, V one after another, rows without padding."""

from __future__ import annotations

import av
import numpy as np
from numpy.typing import NDArray

from .rows import Rows, planes_size


def planes_of(frame: av.VideoFrame) -> bytes:
    """A yuv420p frame (H, W even) as I420 bytes of H*W*3/2. Raises ValueError for another format."""
    _check(frame)
    # tobytes() of a view without padding is one copy, with padding one strided copy; the join is the second.
    return b"".join(plane.tobytes() for plane in plane_views(frame))


def rows_of(frame: av.VideoFrame) -> Rows:
    """The planes of a yuv420p frame of even size, without a copy. Raises ValueError for another format."""
    _check(frame)
    return plane_views(frame)


def frame_of(planes: bytes | bytearray | memoryview, width: int, height: int) -> av.VideoFrame:
    """A yuv420p frame over I420 bytes. ``planes`` must stay as it is while the frame is in use.

    Nothing is copied, but for heights that are no multiple of 4: PyAV's from_numpy_buffer (18.1) takes the height of
    a yuv420p array as rows // 6 * 4.

    Raises ValueError for an odd size or too few bytes.
    """
    if width % 2 or height % 2 or width <= 0 or height <= 0:
        raise ValueError(f"{width}x{height} is no size for 4:2:0, both must be even and positive")
    size = planes_size(width, height)
    array = np.frombuffer(planes, np.uint8)
    if array.size < size:
        raise ValueError(f"{array.size} bytes are not enough for {width}x{height}, that is {size}")
    if height % 4 == 0:
        return av.VideoFrame.from_numpy_buffer(array[:size].reshape(height * 3 // 2, width), "yuv420p")
    frame = av.VideoFrame(width, height, "yuv420p")
    at = 0
    for view in plane_views(frame):
        view[:] = array[at : at + view.size].reshape(view.shape)
        at += view.size
    return frame


def _check(frame: av.VideoFrame) -> None:
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        raise ValueError(f"the frame is {frame.format.name}, not yuv420p")
    if frame.width % 2 or frame.height % 2:
        raise ValueError(f"the frame is {frame.width}x{frame.height}, not of even size")


def plane_views(frame: av.VideoFrame) -> list[NDArray[np.uint8]]:
    """Views of the three planes (H, W) without their padding, valid while the frame lives."""
    return [
        np.ndarray((plane.height, plane.width), np.uint8, plane, 0, (plane.line_size, 1))  # type: ignore[arg-type]
        for plane in frame.planes
    ]
