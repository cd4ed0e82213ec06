"""A contact sheet: frames of the input above the same frames of the output, and where the change was made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .measure import TICKS
from .probe import pictures

_COLUMNS = 4
_CELL_WIDTH = 320  # pixels
_MARGIN = 12
_CAPTION = 20
_TITLE = 32
_BACKGROUND = (24, 26, 30)
_TEXT = (210, 214, 220)
_MARK = (255, 176, 32)


def choose(pts: Sequence[int], change: int | None, count: int = 12) -> list[int]:
    """``count`` of the pts, evenly spread; with a change, half before and half from it on, both sides of it shown."""
    if (
        change is None
        or not (before := [p for p in pts if p < change])
        or not (after := [p for p in pts if p >= change])
    ):
        return _spread(pts, count)
    return _spread(before, count // 2) + _spread(after, count - count // 2)


def _spread(pts: Sequence[int], count: int) -> list[int]:
    """First and last included."""
    if len(pts) <= count:
        return list(pts)
    return [pts[round(index * (len(pts) - 1) / (count - 1))] for index in range(count)]


def write(
    target: Path,
    sent: Path,
    received: Path,
    *,
    chosen: Sequence[int],
    first_pts: int,
    change: int | None,
    title: str = "",
    update: str = "",
) -> None:
    """Draw the frames ``chosen`` (pts) of both recordings into ``target``, a PNG. Needs Pillow.

    first_pts: time zero of the captions. change: pts of the first frame made with the changed parameter.
    title: the first line. update: what was changed, as the client sent it.
    A frame that did not arrive is an empty cell.
    """
    from PIL import Image, ImageDraw, ImageFont

    above = _thumbnails(sent, chosen)
    below = _thumbnails(received, chosen)
    heights = [max((image.height for image in row.values()), default=180) for row in (above, below)]
    cell = (_CELL_WIDTH + _MARGIN, sum(heights) + _CAPTION + 2 * _MARGIN)
    rows = -(-len(chosen) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * cell[0] + _MARGIN, _TITLE + rows * cell[1] + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    large = ImageFont.load_default(18)
    draw.text((_MARGIN, _MARGIN), title, fill=_TEXT, font=large)
    if update:
        draw.text((sheet.width - _MARGIN, _MARGIN), _short(update), fill=_MARK, font=large, anchor="ra")
    marked = False
    for index, pts in enumerate(chosen):
        left = _MARGIN + index % _COLUMNS * cell[0]
        top = _TITLE + _MARGIN + index // _COLUMNS * cell[1]
        changed = change is not None and pts >= change
        caption = f"{(pts - first_pts) / TICKS:6.2f} s"
        if changed and not marked:
            caption += "   changed here"
            draw.line([(left - _MARGIN // 2, top), (left - _MARGIN // 2, top + cell[1] - _MARGIN)], _MARK, 4)
            marked = True
        draw.text((left, top), caption, fill=_MARK if changed else _TEXT, font=font)
        for name, row, y in (("in", above, top + _CAPTION), ("out", below, top + _CAPTION + heights[0] + 2)):
            if (image := row.get(pts)) is not None:
                sheet.paste(image, (left, y))
                if index % _COLUMNS == 0:
                    draw.rectangle((left, y, left + 30, y + _CAPTION), fill=_BACKGROUND)
                    draw.text((left + 4, y + 2), name, fill=_TEXT, font=font)
            else:
                box = (left, y, left + _CELL_WIDTH - 1, y + heights[1] - 1)
                draw.rectangle(box, outline=_TEXT)
                draw.text((left + 8, y + 8), "did not arrive", fill=_TEXT, font=font)
    sheet.save(target)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _thumbnails(path: Path, chosen: Iterable[int]) -> dict[int, Any]:
    wanted = set(chosen)
    found = {}
    for pts, frame in pictures(path):
        if pts in wanted and pts not in found:
            height = max(2, round(frame.height * _CELL_WIDTH / frame.width))
            found[pts] = frame.reformat(_CELL_WIDTH, height, format="rgb24").to_image()  # type: ignore[no-untyped-call]
    return found
