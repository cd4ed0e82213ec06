"""Clips whose content costs a codec what a camera's does: texture, movement and grain, and a number in each frame."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from gateway_shim.localnet import numbered

SIZES = {"512": (512, 512), "720p": (1280, 720), "1080p": (1920, 1080)}
#: Bits per second of an ingest, as in the measurements that the goals come from.
BIT_RATES = {"512": 1_500_000, "720p": 3_000_000, "1080p": 6_000_000}
RATE = 30
#: Frames of a clip, and of each of its groups of pictures: it runs in a loop, and a cut falls on its seam.
FRAMES = 60
_GRAINS = 7
_REACH = 48  # pixels that the picture wanders either way


def _texture(width: int, height: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Noise with the spectrum of a photograph, rather smooth; 16 to 235 with few values near the ends."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = np.maximum(np.hypot(rows, columns), 2 / max(width, height)) ** -1.3
    phases = np.exp(2j * np.pi * rng.random(amplitude.shape))
    noise = np.fft.irfft2(amplitude * phases, (height, width))
    return (126 + 40 * noise / noise.std()).astype(np.float32)


class Content:
    """Pictures 0 to ``FRAMES`` - 1 of one size, as I420; the last goes over into the first."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        rng = np.random.default_rng(1)
        # Made at a quarter of the size and repeated: as smooth as a picture that was scaled up, and made quickly.
        coarse = _texture((width + 2 * _REACH) // 2, (height + 2 * _REACH) // 2, rng)
        # Weak colours: RGB cannot hold strong ones beside any brightness, and what it cannot hold is clipped.
        self._luma = coarse.repeat(2, 0).repeat(2, 1)
        self._chroma = [128 + (coarse - 126) / 5, 128 - (coarse[::-1] - 126) / 5]
        self._grain = [rng.normal(0, 2.5, (height, width)).astype(np.float32) for _ in range(_GRAINS)]

    def planes(self, number: int) -> NDArray[np.uint8]:
        """Y, U and V one after another: (H * 3 / 2, W)."""
        angle = 2 * np.pi * number / FRAMES
        x, y = (round(_REACH * (1 + part)) & ~1 for part in (np.sin(angle), np.cos(angle)))
        height, width = self.height, self.width
        luma = self._luma[y : y + height, x : x + width] + self._grain[number % _GRAINS]
        out = np.empty(width * height * 3 // 2, np.uint8)
        view = out[: width * height].reshape(height, width)
        np.clip(luma, 16, 235, out=luma)
        view[:] = luma
        numbered.stamp(view, number)
        at = width * height
        for plane in self._chroma:
            part = plane[y // 2 : (y + height) // 2, x // 2 : (x + width) // 2]
            out[at : at + part.size] = np.clip(part, 16, 240).ravel()
            at += part.size
        return out.reshape(height * 3 // 2, width)


def write(path: Path, size: str, frames: int = FRAMES) -> Path:
    """A clip of ``size`` as an ingest encodes it: CABAC, one reference of B-frames less, a keyframe every 2 s."""
    width, height = SIZES[size]
    return write_size(path, width, height, BIT_RATES[size], frames)


def write_size(path: Path, width: int, height: int, bit_rate: int, frames: int = FRAMES) -> Path:
    content = Content(width, height)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=RATE)
        video.width, video.height, video.pix_fmt, video.bit_rate = width, height, "yuv420p", bit_rate
        video.codec_context.time_base = Fraction(1, RATE)
        video.options = {
            "preset": "superfast",
            "tune": "zerolatency",
            "maxrate": str(bit_rate),
            "bufsize": str(bit_rate),
            "x264-params": f"keyint={FRAMES}:min-keyint={FRAMES}:scenecut=0:bframes=0:cabac=1",
        }
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(content.planes(number), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path
