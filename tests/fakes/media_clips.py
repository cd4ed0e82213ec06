"""Numbered clips as bytes, made once per test run, and what stands in the pictures and sounds that come of them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np

from gateway_shim.localnet.numbered import luma_of, read_number, write_clip
from gateway_shim.media.decode import Decoder, Picture, Sound
from gateway_shim.media.ts import AccessUnit, TsReader


@functools.cache
def clip(
    frames: int = 60,
    *,
    width: int = 320,
    height: int = 240,
    audio: str | None = None,
    b_frames: int = 0,
    gop: int = 30,
    first_number: int = 0,
    options: tuple[tuple[str, str], ...] = (),
) -> bytes:
    """An MPEG transport stream of numbered frames at 30 fps, written by libavformat."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_clip(
            Path(folder) / "clip.ts",
            frames=frames,
            width=width,
            height=height,
            audio=audio,  # type: ignore[arg-type]
            b_frames=b_frames,
            gop=gop,
            first_number=first_number,
            preset="veryfast" if b_frames else "ultrafast",
            options=dict(options),
        )
        return path.read_bytes()


def units_of(data: bytes, reader: TsReader | None = None, size: int = 1000) -> list[AccessUnit]:
    """Everything in one segment, fed in pieces of ``size`` bytes."""
    reader = reader or TsReader()
    units = []
    for at in range(0, len(data), size):
        units += reader.feed(data[at : at + size])
    return units + reader.end_segment()


def video(units: Iterable[AccessUnit]) -> list[AccessUnit]:
    return [unit for unit in units if unit.track.kind == "video"]


def audio(units: Iterable[AccessUnit]) -> list[AccessUnit]:
    return [unit for unit in units if unit.track.kind == "audio"]


def decoded(units: Iterable[AccessUnit], decoder: Decoder | None = None) -> list[Picture | Sound]:
    decoder = decoder or Decoder()
    return decoder.feed(units) + decoder.flush()


def pictures(items: Iterable[Picture | Sound]) -> list[Picture]:
    return [item for item in items if isinstance(item, Picture)]


def sounds(items: Iterable[Picture | Sound]) -> list[Sound]:
    return [item for item in items if isinstance(item, Sound)]


def numbers(items: Iterable[Picture | Sound]) -> list[int | None]:
    return [read_number(luma_of(item.frame)) for item in pictures(items)]


def bursts(items: Iterable[Picture | Sound]) -> list[float]:
    """Seconds on the time line of the blocks' pts at which a burst of sound begins; the left channel is looked at."""
    begins: list[float] = []
    quiet_until = float("-inf")
    for block in sounds(items):
        samples = block.frame.to_ndarray().reshape(-1, 2)[:, 0].astype(int)
        loud = np.flatnonzero(abs(samples) > 2000)
        for index in loud:
            at = block.pts / 90_000 + index / 48_000
            if at > quiet_until:
                begins.append(at)
            quiet_until = at + 0.05
    return begins


def steps(values: Iterable[int]) -> set[int]:
    return {after - before for before, after in pairwise(values)}
