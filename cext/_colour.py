"""Colour: what the numbers in a picture's planes mean, and the coefficients that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Matrix = Literal["bt601", "bt709"]

# Weights of red and blue in luma. ITU-R BT.601-7 section 2.5.1, BT.709-6 section 3 (item 3.2).
LUMA_WEIGHTS: dict[str, tuple[float, float]] = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


@dataclass(frozen=True)
class Colour:
    """Matrix and range of a stream; the same value must be used on the way in and on the way out.

    matrix: ``bt601`` or ``bt709``. An untagged stream is BT.601 limited.
    full_range: luma 0..255 and chroma 0..255 around 128 (JPEG); otherwise luma 16..235 and chroma 16..240.
    """

    matrix: Matrix = "bt601"
    full_range: bool = False

    def __post_init__(self) -> None:
        if self.matrix not in LUMA_WEIGHTS:
            raise ValueError(f"matrix is {self.matrix!r}, it must be one of {', '.join(LUMA_WEIGHTS)}")

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights of red, green and blue in luma; their sum is 1."""
        red, blue = LUMA_WEIGHTS[self.matrix]
        return red, 1.0 - red - blue, blue

    @property
    def luma(self) -> tuple[float, float]:
        """Level of black, and levels from black to white (BT.601-7 section 2.5.3 for the limited range)."""
        return (0.0, 255.0) if self.full_range else (16.0, 219.0)

    @property
    def chroma_levels(self) -> float:
        """Levels from the lowest to the highest chroma, which lies around 128."""
        return 255.0 if self.full_range else 224.0

    @cached_property
    def to_rgb(self) -> tuple[float, ...]:
        """``(ys, rv, r0, gu, gv, g0, bu, b0)``: R = ys Y + rv V + r0, G = ys Y + gu U + gv V + g0,
        B = ys Y + bu U + b0 for Y, U, V in levels and R, G, B in 0..1. The offsets of black and of grey chroma are
        folded into r0, g0, b0."""
        red, green, blue = self.weights
        black, span = self.luma
        ys = 1.0 / span
        rv = 2.0 * (1.0 - red) / self.chroma_levels
        bu = 2.0 * (1.0 - blue) / self.chroma_levels
        gu, gv = -bu * blue / green, -rv * red / green
        zero = -ys * black
        return ys, rv, zero - 128.0 * rv, gu, gv, zero - 128.0 * (gu + gv), bu, zero - 128.0 * bu

    @cached_property
    def to_yuv(self) -> tuple[float, ...]:
        """``(yr, yg, yb, y0, ur, ug, ub, vr, vg, vb)``: Y = yr R + yg G + yb B + y0 for one pixel; U and V likewise,
        with offset 128, for the sum of four pixels: the mean's quarter is folded into the chroma weights."""
        red, green, blue = self.weights
        black, span = self.luma
        u = 0.25 * self.chroma_levels / (2.0 * (1.0 - blue))
        v = 0.25 * self.chroma_levels / (2.0 * (1.0 - red))
        return (
            *(span * red, span * green, span * blue, black),
            *(-red * u, -green * u, (1.0 - blue) * u),
            *((1.0 - red) * v, -green * v, -blue * v),
        )
