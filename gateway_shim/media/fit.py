"""Pictures of any size and format into one fixed size: scaled to cover it, then cut to its middle."""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .colour import Colour
from .planes import frame_of, plane_views
from .rows import planes_size

_FORMAT = "yuv420p"


class Fitter:
    """Gives yuv420p frames of ``width`` x ``height`` (even). Frames that fit already come back as they are."""

    def __init__(self, width: int, height: int, colour: Colour) -> None:
        self._width = width
        self._height = height
        self._range = colour.range_tag
        # One per shape: with several shapes a reformatter sets itself up again each time (hot-path.md section 9).
        self._reformatter = VideoReformatter()
        self._shape: tuple[int, int, str] | None = None

    def fits(self, frame: av.VideoFrame) -> bool:
        return frame.width == self._width and frame.height == self._height and frame.format.name == _FORMAT

    def fit(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The middle of ``frame`` at our size; its samples keep matrix and range. ``frame`` is not written to."""
        if self.fits(frame):
            return frame
        shape = (frame.width, frame.height, frame.format.name)
        if shape != self._shape:
            self._reformatter, self._shape = VideoReformatter(), shape
        width, height = cover(frame.width, frame.height, self._width, self._height)
        scaled = self._reformatter.reformat(
            frame,
            width,
            height,
            _FORMAT,
            src_color_range=self._range,
            dst_color_range=self._range,
            threads=1,
        )
        return scaled if self.fits(scaled) else self._cut(scaled)

    def _cut(self, frame: av.VideoFrame) -> av.VideoFrame:
        # Even offsets keep the chroma samples on their luma samples.
        left, top = (frame.width - self._width) // 4, (frame.height - self._height) // 4
        out = np.empty(planes_size(self._width, self._height), np.uint8)
        at = 0
        for plane, scale in zip(plane_views(frame), (2, 1, 1), strict=True):
            rows, columns = self._height * scale // 2, self._width * scale // 2
            y, x = top * scale, left * scale
            target = out[at : at + rows * columns].reshape(rows, columns)
            target[:] = plane[y : y + rows, x : x + columns]
            at += rows * columns
        return frame_of(out.data, self._width, self._height)


def cover(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int]:
    """The smallest even size of the shape ``width`` x ``height`` that covers the target in both directions."""
    if width * to_height >= height * to_width:
        return _even_up(-(-width * to_height // height)), to_height
    return to_width, _even_up(-(-height * to_width // width))


def _even_up(value: int) -> int:
    return value + (value & 1)
