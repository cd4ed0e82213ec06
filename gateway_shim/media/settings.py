"""What an output stream is to be like."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .colour import Colour
from .hardware import X264, EncoderName
from .preset import AUTO, Preset

#: Pixels of a side of an output picture, the same that may be asked for: below, an encoder has no macroblock; above,
#: x264 and players give up, each at a size of its own.
MIN_SIDE, MAX_SIDE = 16, 8192

_DEFAULT_COLOUR = Colour()


def can_encode(width: int, height: int) -> bool:
    """Whether an output may have this size."""
    return not (width % 2 or height % 2) and min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What the output stream is like.

    width, height: of every output picture, even.
    frame_rate: what the input says of itself, None for nothing; the pictures' own stamps are believed more.
    bit_rate: of the video, bits per second; None for one that suits size and rate.
    codec: what to begin with; x264 takes over where NVENC fails.
    preset: of x264; auto: superfast, or ultrafast where the machine cannot keep up.
    threads: of x264; above 1 they share a picture's slices. 0: as many as the picture needs and the machine has, for
    ``streams`` streams at once.
    segment_s: seconds of media in a segment.
    audio: whether there is a sound track.
    colour: what the numbers of the pictures mean; it is written into the stream.
    """

    width: int
    height: int
    frame_rate: Fraction | None = None
    bit_rate: int | None = None
    codec: EncoderName = X264
    preset: Preset | Literal["auto"] = AUTO
    segment_s: float = 2.0
    audio: bool = True
    colour: Colour = _DEFAULT_COLOUR
    threads: int = 0
    streams: int = 1

    def __post_init__(self) -> None:
        if not can_encode(self.width, self.height):
            sides = f"both must be even and {MIN_SIDE} to {MAX_SIDE}"
            raise ValueError(f"cannot encode {self.width}x{self.height}: {sides}")
        if self.segment_s <= 0:
            raise ValueError(f"segment_s is {self.segment_s}, it must be positive")
