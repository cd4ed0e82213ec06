"""Pictures of any size, format and colour into one fixed form: scaled to cover it, then cut to its middle."""

from __future__ import annotations

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .colour import Colour
from .planes import frame_of, plane_views
from .rows import planes_size

_FORMAT = "yuv420p"
# Where covering the target takes more than so many times its width or height, the rest is cut off before scaling:
# 16x4096 over 1280x720 would be 327680 pixels high, which swscale refuses, and half a gigabyte where it does not.
_EXTREME = 4


class Fitter:
    """Gives yuv420p frames of ``width`` x ``height`` (even) and ``colour``; those that fit already as they are."""

    def __init__(self, width: int, height: int, colour: Colour) -> None:
        self._width = width
        self._height = height
        self.colour = colour
        # One per shape: with several shapes a reformatter sets itself up again each time (hot-path.md section 9).
        self._reformatter = VideoReformatter()
        self._shape: tuple[int, int, str, Colour] | None = None

    def fits(self, frame: av.VideoFrame) -> bool:
        return frame.width == self._width and frame.height == self._height and frame.format.name == _FORMAT

    def fit(self, frame: av.VideoFrame, colour: Colour | None = None) -> av.VideoFrame:
        """The middle of ``frame`` at our size and in our colour. ``frame`` is not written to.

        colour: what its samples mean, where it is not ours: a source may switch to another camera.
        """
        colour = colour or self.colour
        if self.fits(frame) and colour == self.colour:
            return frame
        width, height = cover(frame.width, frame.height, self._width, self._height)
        if width > _EXTREME * self._width or height > _EXTREME * self._height:
            frame = self._trimmed(frame, colour)
            width, height = cover(frame.width, frame.height, self._width, self._height)
        shape = (frame.width, frame.height, frame.format.name, colour)
        if shape != self._shape:
            self._reformatter, self._shape = VideoReformatter(), shape
        scaled = self._reformatter.reformat(
            frame,
            width,
            height,
            _FORMAT,
            src_colorspace=colour.matrix_tag,
            dst_colorspace=self.colour.matrix_tag,
            src_color_range=colour.range_tag,
            dst_color_range=self.colour.range_tag,
            threads=1,
        )
        return scaled if self.fits(scaled) else _middle(scaled, self._width, self._height)

    def _trimmed(self, frame: av.VideoFrame, colour: Colour) -> av.VideoFrame:
        """The middle of a frame, of the target's shape or nearly so, at its own scale and in its own colour."""
        if frame.format.name not in (_FORMAT, "yuvj420p"):
            even = frame.width & ~1, frame.height & ~1
            tags = {"src_color_range": colour.range_tag, "dst_color_range": colour.range_tag}
            frame = VideoReformatter().reformat(frame, *even, _FORMAT, threads=1, **tags)
        width, height = frame.width, frame.height
        if width * self._height >= height * self._width:
            return _middle(frame, min(_even_up(-(-height * self._width // self._height)), width), height)
        return _middle(frame, width, min(_even_up(-(-width * self._height // self._width)), height))


def _middle(frame: av.VideoFrame, width: int, height: int) -> av.VideoFrame:
    """A copy of the middle of an 8-bit 4:2:0 frame, all sizes even."""
    # Even offsets keep the chroma samples on their luma samples.
    left, top = (frame.width - width) // 4, (frame.height - height) // 4
    out = np.empty(planes_size(width, height), np.uint8)
    at = 0
    for plane, scale in zip(plane_views(frame), (2, 1, 1), strict=True):
        rows, columns = height * scale // 2, width * scale // 2
        y, x = top * scale, left * scale
        target = out[at : at + rows * columns].reshape(rows, columns)
        target[:] = plane[y : y + rows, x : x + columns]
        at += rows * columns
    return frame_of(out.data, width, height)


def cover(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int]:
    """The smallest even size of the shape ``width`` x ``height`` that covers the target in both directions."""
    if width * to_height >= height * to_width:
        return _even_up(-(-width * to_height // height)), to_height
    return to_width, _even_up(-(-height * to_width // width))


def _even_up(value: int) -> int:
    return value + (value & 1)
