"""Test clips whose frames carry their own number, so that loss, order and identity can be read off the picture.

The number stands as a bar of black and white cells across the top eighth of the picture. It survives H.264, scaling,
blur, sharpening and colour changes; inversion is recognised by the first two cells (white, black). The sound is
silence with a 1 kHz burst that begins exactly with every ``BURST_EVERY``-th frame, so that the offset between
picture and sound can be read off as well.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

#: Cells: white, black, 16 bits of the number (most significant first), 4 bits of check sum.
_BITS = 16
_CHECK_BITS = 4
_CELLS = 2 + _BITS + _CHECK_BITS
_WHITE, _BLACK = 235, 16  # limited range

BURST_EVERY = 30
BURST_S = 0.1
SAMPLE_RATE = 48_000


def _check(number: int) -> int:
    """Sum of the number's nibbles, modulo 16: catches any single wrong cell."""
    return sum(number >> shift & 15 for shift in range(0, _BITS, 4)) & 15


def stamp(luma: NDArray[np.uint8], number: int) -> None:
    """Write ``number`` (0..65535) into the top eighth of a luma plane (H, W), in place."""
    if not 0 <= number < 1 << _BITS:
        raise ValueError(f"frame number {number} is not in 0..{(1 << _BITS) - 1}")
    word = (0b10 << _BITS | number) << _CHECK_BITS | _check(number)
    height, width = luma.shape
    edges = np.linspace(0, width, _CELLS + 1).round().astype(int)
    for cell in range(_CELLS):
        bit = word >> (_CELLS - 1 - cell) & 1
        luma[: height // 8, edges[cell] : edges[cell + 1]] = _WHITE if bit else _BLACK


def read_number(luma: NDArray[np.uint8]) -> int | None:
    """The number in a luma plane (H, W), or None when the bar is not readable."""
    height, width = luma.shape
    edges = np.linspace(0, width, _CELLS + 1)
    row = slice(height // 32, max(height // 32 + 1, height * 3 // 32))
    means = []
    for left, right in itertools.pairwise(edges):
        margin = (right - left) * 0.3  # a blurred edge stays out of the mean
        first = int(left + margin)
        means.append(float(luma[row, first : max(int(right - margin), first + 1)].mean()))
    threshold = (means[0] + means[1]) / 2
    if abs(means[0] - means[1]) < 40:
        return None
    inverted = means[0] < means[1]
    word = 0
    for mean in means:
        word = word << 1 | ((mean > threshold) != inverted)
    number = word >> _CHECK_BITS & (1 << _BITS) - 1
    return number if word & 15 == _check(number) else None


def luma_of(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """The luma plane of a yuv420p frame as (H, W), without its padding; a view, valid while the frame lives."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, abs(plane.line_size))  # type: ignore[call-overload]
    return rows[: frame.height, : frame.width]  # type: ignore[no-any-return]


def picture(number: int, width: int, height: int) -> av.VideoFrame:
    """A yuv420p frame with a moving textured background and its number on top."""
    rows, columns = np.mgrid[0:height, 0:width]
    luma = (128 + 60 * np.sin((columns + 4 * number) / 23) * np.cos((rows - 2 * number) / 17)).astype(np.uint8)
    stamp(luma, number)
    chroma_rows, chroma_columns = np.mgrid[0 : height // 2, 0 : width // 2]
    u = (128 + 40 * np.sin((chroma_columns + number) / 31)).astype(np.uint8)
    v = (128 + 40 * np.cos((chroma_rows + number) / 29)).astype(np.uint8)
    planes = np.concatenate([luma.ravel(), u.ravel(), v.ravel()]).reshape(height * 3 // 2, width)
    return av.VideoFrame.from_ndarray(planes, format="yuv420p")


def sound(first_sample: int, samples: int, rate: Fraction, *, first_number: int = 0) -> NDArray[np.int16]:
    """``samples`` of mono sound beginning at ``first_sample`` (48 kHz): bursts at the frames that are due one."""
    at = first_sample + np.arange(samples)
    period = SAMPLE_RATE * BURST_EVERY / rate
    phase = np.mod(at + float(first_number * SAMPLE_RATE / rate), float(period))
    burst = phase < BURST_S * SAMPLE_RATE
    samples_f: NDArray[np.float64] = burst * 16000 * np.sin(2 * np.pi * 1000 * phase / SAMPLE_RATE)
    return samples_f.astype(np.int16)


def write_clip(
    path: Path,
    *,
    frames: int,
    width: int = 320,
    height: int = 240,
    rate: int = 30,
    audio: Literal["aac", "opus"] | None = None,
    b_frames: int = 0,
    gop: int = 30,
    first_number: int = 0,
    preset: str = "ultrafast",
    options: dict[str, str] | None = None,
) -> Path:
    """Write ``frames`` numbered frames (and sound of the same length) to ``path``; the suffix picks the container.

    gop: frames between two IDR pictures, exact. The bit rate follows from a constant quality good enough to read by.
    """
    with av.open(str(path), "w") as container:
        codec_options = {
            "preset": preset,
            "crf": "23",
            "sc_threshold": "0",
            "forced-idr": "1",
            "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={b_frames}:open-gop=0",
        } | (options or {})
        video: Any = container.add_stream("libx264", rate=rate, options=codec_options)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.time_base = Fraction(1, rate)
        track: Any = None
        if audio:
            track = container.add_stream({"aac": "aac", "opus": "libopus"}[audio], rate=SAMPLE_RATE)
            track.codec_context.layout = "mono"
            track.codec_context.format = "fltp" if audio == "aac" else "s16"
        written = 0
        for index in range(frames):
            frame = picture(first_number + index, width, height)
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(video.encode(frame))
            while track is not None and written * rate < (index + 1) * SAMPLE_RATE:
                block = track.codec_context.frame_size or 960
                samples = sound(written, block, Fraction(rate), first_number=first_number)
                if audio == "aac":
                    data = av.AudioFrame.from_ndarray((samples / 32768).astype(np.float32)[None], "fltp", "mono")
                else:
                    data = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
                data.sample_rate, data.pts, data.time_base = SAMPLE_RATE, written, Fraction(1, SAMPLE_RATE)
                container.mux(track.encode(data))
                written += block
        container.mux(video.encode(None))
        if track is not None:
            container.mux(track.encode(None))
    return path
