"""What an output stream is to be like."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .colour import Colour
from .hardware import X264, EncoderName
from .preset import AUTO, Preset

_DEFAULT_COLOUR = Colour()


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
        if self.width < 16 or self.height < 16 or self.width % 2 or self.height % 2:
            raise ValueError(f"cannot encode {self.width}x{self.height}: both must be even and at least 16")
        if self.segment_s <= 0:
            raise ValueError(f"segment_s is {self.segment_s}, it must be positive")
