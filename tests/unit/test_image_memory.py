"""Where IMAGEs lie, and that writing them through the cache makes them no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
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


@pytest.fixture
def streaming() -> Iterator[None]:
    """Streaming stores on every processor: on Intel's, where they never pay, nothing would go past the cache."""
    before = cext._pixels.stream_from(0)
    yield
    cext._pixels.stream_from(before)


@pytest.mark.parametrize("height", [719, 720])
@pytest.mark.parametrize("cached", [1, 5_000_000, 11_000_000, 100_000_000])
def test_images_are_the_same_however_much_of_them_goes_through_the_cache(
    cached: int, height: int, streaming: None
) -> None:
    width, count = 1280, 2
    chroma = (height + 1) // 2, (width + 1) // 2
    random = np.random.default_rng(1)
    pictures = [
        cext.Planes(*(random.integers(0, 256, shape, np.uint8) for shape in ((height, width), chroma, chroma)))
        for _ in range(count)
    ]
    plain, written = (empty_image((count, height, width, 3)) for _ in range(2))
    written.fill(-1.0)
    cext.pictures_to_images(pictures, plain)
    cext.pictures_to_images(pictures, written, cached=cached)
    assert np.array_equal(plain, written)
