"""Pictures that stand in for the graph's: dimmed, grey, and with a line of text and a progress bar on them.

Every function gives a new frame and leaves what it got alone: decoded samples are references of the decoder.
Measured on one busy core of the project's machine, milliseconds at 1280x720: dimmed 0.2, with_notice 0.3.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from .planes import frame_of, plane_views, planes_of
from .rows import planes_size

_BLACK, _WHITE, _BAR = 16, 220, 150  # luma, inside the limited range, so legible in either
_CHROMA = 128

#: Pixels of one character of FFmpeg's VGA font.
_CELL_WIDTH, _CELL_HEIGHT = 8, 16


@dataclass(frozen=True, slots=True)
class Notice:
    """What a viewer reads. ``progress``: 0..1, None where nobody knows."""

    text: str = ""
    progress: float | None = None


def dimmed(frame: av.VideoFrame) -> av.VideoFrame:
    """Half the brightness and half the colour of a yuv420p frame of even size."""
    planes = np.frombuffer(bytearray(planes_of(frame)), np.uint8)
    luma = frame.width * frame.height
    planes >>= 1
    planes[:luma] += _BLACK // 2
    planes[luma:] += _CHROMA // 2
    return frame_of(planes.data, frame.width, frame.height)


def grey(width: int, height: int) -> av.VideoFrame:
    """A dark picture of even size."""
    planes = np.full(planes_size(width, height), _CHROMA, np.uint8)
    planes[: width * height] = 40
    return frame_of(planes.data, width, height)


def with_notice(frame: av.VideoFrame, notice: Notice) -> av.VideoFrame:
    """The frame with a black band at its foot: the text, cut to what fits, and the progress below it."""
    width, height = frame.width, frame.height
    copy = frame_of(bytearray(planes_of(frame)), width, height)
    luma, u, v = plane_views(copy)
    scale = max(1, min(height // 360, width // 640))
    band = min((_CELL_HEIGHT + 16) * scale, height) & ~1
    top = height - band
    luma[top:] = _BLACK
    u[top // 2 :] = v[top // 2 :] = _CHROMA
    margin = 8 * scale
    columns = (width - 2 * margin) // (_CELL_WIDTH * scale)
    if columns > 0 and notice.text:
        glyphs = np.kron(_glyphs(notice.text[:columns]), np.ones((scale, scale), bool))
        place = luma[top + 2 * scale : top + 2 * scale + glyphs.shape[0], margin : margin + glyphs.shape[1]]
        place[glyphs[: place.shape[0], : place.shape[1]]] = _WHITE
    if notice.progress is not None and width > 4 * margin:
        bar = luma[height - 6 * scale : height - 2 * scale, margin : width - margin]
        bar[:] = _BLACK + 30
        bar[:, : round(bar.shape[1] * min(max(notice.progress, 0.0), 1.0))] = _BAR
    return copy


@functools.lru_cache(16)
def _glyphs(text: str) -> NDArray[np.bool_]:
    """Where the characters of one line are ink: (16, 8 per character).

    FFmpeg decodes ANSI art with a font of its own, which spares us one; all but printable ASCII are orders to it.
    Without that decoder (a build of FFmpeg that leaves it out) there is a band without words.
    """
    ink = np.zeros((_CELL_HEIGHT, _CELL_WIDTH * len(text)), bool)
    if "ansi" not in av.codecs_available:
        return ink
    plain = "".join(character if " " <= character <= "~" else "?" for character in text)
    decoder = av.CodecContext.create("ansi", "r")
    # One row and one column more: a full line scrolls its own text away.
    decoder.width, decoder.height = _CELL_WIDTH * (len(text) + 1), 2 * _CELL_HEIGHT  # type: ignore[attr-defined]
    for picture in decoder.decode(av.Packet(plain.encode("ascii"))):  # type: ignore[attr-defined]
        plane = picture.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        ink = rows[:_CELL_HEIGHT, : ink.shape[1]] != 0
    return ink
