"""Pictures as I420 bytes: no padding, no copies where none are needed, nothing written into a frame."""

from __future__ import annotations

import av
import numpy as np
import pytest

from gateway_shim.localnet.numbered import luma_of, picture, read_number
from gateway_shim.media.planes import frame_of, planes_of, rows_of
from gateway_shim.media.rows import planes_for_message, planes_size, write_planes
from tests.fakes.media_clips import clip, decoded, pictures, units_of


@pytest.mark.parametrize(("width", "height"), [(854, 480), (320, 240), (2, 2), (18, 6), (480, 854)])
def test_planes_come_back_as_they_were(width: int, height: int) -> None:
    planes = np.random.default_rng(1).integers(0, 256, planes_size(width, height), np.uint8).tobytes()
    frame = frame_of(planes, width, height)
    assert (frame.width, frame.height, frame.format.name) == (width, height, "yuv420p")
    assert planes_of(frame) == planes
    # The same through a frame of libavcodec's, whose rows are padded.
    padded = av.VideoFrame.from_ndarray(np.frombuffer(planes, np.uint8).reshape(-1, width), "yuv420p")
    assert planes_of(padded) == planes
    out = bytearray(len(planes) + 3)
    assert write_planes(rows_of(padded), memoryview(out)) == len(planes)
    assert bytes(out) == planes + bytes(3)
    for each in (frame, padded):
        assert b"".join(planes_for_message(rows_of(each))) == planes


def test_decoded_rows_are_padded_and_the_padding_stays_out() -> None:
    [shown, *_] = pictures(decoded(units_of(clip(3, width=854, height=480))))
    assert shown.frame.planes[0].line_size > 854  # otherwise this test shows nothing
    planes = planes_of(shown.frame)
    assert len(planes) == planes_size(854, 480)
    again = frame_of(planes, 854, 480)
    assert read_number(luma_of(again)) == 0
    assert np.array_equal(luma_of(again), luma_of(shown.frame))


def test_frame_lies_over_the_bytes() -> None:
    planes = bytearray(planes_size(64, 48))
    frame = frame_of(planes, 64, 48)
    planes[0] = 99
    assert luma_of(frame)[0, 0] == 99


def test_frame_keeps_the_bytes_alive() -> None:
    frame = frame_of(bytes([7]) * planes_size(640, 480), 640, 480)
    for _ in range(20):
        bytes([8]) * planes_size(640, 480)
    assert (luma_of(frame) == 7).all()


@pytest.mark.parametrize(("width", "height"), [(3, 2), (2, 3), (0, 2), (-2, 2)])
def test_sizes_that_are_not_4_2_0_are_refused(width: int, height: int) -> None:
    with pytest.raises(ValueError, match="even"):
        frame_of(bytes(100), width, height)


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="not enough"):
        frame_of(bytes(planes_size(64, 48) - 1), 64, 48)
    with pytest.raises(ValueError, match="needs"):
        write_planes(rows_of(picture(0, 64, 48)), bytearray(planes_size(64, 48) - 1))


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="rgb24"):
        planes_of(av.VideoFrame(64, 48, "rgb24"))
    with pytest.raises(ValueError, match="even size"):
        planes_of(av.VideoFrame(63, 48, "yuv420p"))
