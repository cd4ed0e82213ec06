"""The numbered clips that every other media test leans on."""

from pathlib import Path

import av
import numpy as np
import pytest

from gateway_shim.localnet.numbered import luma_of, picture, read_number, stamp, write_clip


@pytest.mark.parametrize("size", [(64, 64), (320, 240), (854, 480), (1280, 720)])
@pytest.mark.parametrize("number", [0, 1, 12345, 65535])
def test_number_is_read_back(size: tuple[int, int], number: int) -> None:
    assert read_number(luma_of(picture(number, *size))) == number


def test_inverted_picture_reads_the_same() -> None:
    assert read_number(255 - luma_of(picture(4711, 320, 240))) == 4711


def test_flat_picture_has_no_number() -> None:
    assert read_number(np.full((240, 320), 128, np.uint8)) is None


def test_one_wrong_cell_is_noticed() -> None:
    luma = luma_of(picture(7, 440, 240)).copy()
    luma[:30, 40:60] = 235
    assert read_number(luma) is None


def test_number_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="70000"):
        stamp(np.zeros((64, 64), np.uint8), 70000)


@pytest.mark.parametrize(("audio", "b_frames"), [(None, 0), ("aac", 2), ("opus", 0)])
def test_clip_decodes_to_its_numbers(tmp_path: Path, audio: str | None, b_frames: int) -> None:
    path = write_clip(tmp_path / "clip.ts", frames=45, audio=audio, b_frames=b_frames)  # type: ignore[arg-type]
    with av.open(str(path)) as container:
        assert [read_number(luma_of(frame)) for frame in container.decode(video=0)] == list(range(45))
