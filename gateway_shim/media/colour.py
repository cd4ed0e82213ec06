"""How the numbers of a picture mean colours: matrix and range, from and to the tags that H.264 carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Matrix = Literal["bt601", "bt709"]

# ITU-T H.273 tables 2 to 4. FFmpeg's enumerations use the same numbers, its range is one more than the flag.
_MATRIX_BT709 = 1
_MATRIX_SMPTE170M = 6
RANGE_LIMITED = 1
RANGE_FULL = 2


@dataclass(frozen=True, slots=True)
class Colour:
    """Matrix and range of a Y'CbCr picture. Untagged pictures are BT.601 limited, as swscale takes them."""

    matrix: Matrix = "bt601"
    full_range: bool = False

    @property
    def matrix_tag(self) -> int:
        """Number for matrix, primaries and transfer alike: H.273 numbers the three in step for these two systems."""
        return _MATRIX_BT709 if self.matrix == "bt709" else _MATRIX_SMPTE170M

    @property
    def range_tag(self) -> int:
        return RANGE_FULL if self.full_range else RANGE_LIMITED


def colour_of(matrix_tag: int, range_tag: int, pixel_format: str) -> Colour:
    """The colour of a decoded frame. ``pixel_format`` yuvj... is FFmpeg's older way to say full range.

    Matrices other than BT.709 (BT.2020 among them) are taken for BT.601: there is no conversion for them here, and
    BT.2020's luma weights lie nearer to BT.601.
    """
    return Colour(
        matrix="bt709" if matrix_tag == _MATRIX_BT709 else "bt601",
        full_range=range_tag == RANGE_FULL or pixel_format.startswith("yuvj"),
    )
