"""Where IMAGEs lie, and that writing them through the cache makes them no other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import cext
from engine.graph import image_memory
from engine.graph.image_memory import LARGE_PAGE, cached_bytes, empty_image


@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (1, 512, 512, 3), (2, 720, 1280, 3)])
def test_memory_suits_streaming_stores_and_is_whole(shape: tuple[int, ...]) -> None:
    image = empty_image(shape)
    assert image.shape == shape
    assert image.dtype == np.float32
    assert image.ctypes.data % 64 == 0
    image[:] = 1.0
    assert image.sum() == image.size


def test_large_images_ask_for_large_pages() -> None:
    image = empty_image((1, 720, 1280, 3))
    begin = image.ctypes.data
    assert begin % LARGE_PAGE == 0
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(number, 16) for number in area.split(" ", 1)[0].split("-"))
        if first <= begin < last:
            assert "hg" in area.rsplit("VmFlags:", 1)[1].split()
            return
    raise AssertionError("the image lies nowhere")


def test_an_unknown_cache_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = tmp_path / "size"
    monkeypatch.setattr(image_memory, "_CACHE_SIZE", size)
    assert cached_bytes() == 0
    size.write_text("unknown\n")
    assert cached_bytes() == 0
    size.write_text("32768K\n")
    assert cached_bytes() == 16 << 20


def test_images_that_are_read_soon_are_the_same() -> None:
    width, height = 1280, 720
    planes = np.random.default_rng(1).integers(0, 256, width * height * 3 // 2, np.uint8)
    picture = cext.planes_from_buffer(planes, width, height)
    plain, soon = (empty_image((1, height, width, 3)) for _ in range(2))
    cext.pictures_to_images([picture], plain)
    cext.pictures_to_images([picture], soon, soon=True)
    assert np.array_equal(plain, soon)
