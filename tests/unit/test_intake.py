"""What the input hands on: every picture in the form of the first one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import av
import pytest

from gateway_shim.media.colour import Colour
from gateway_shim.media.decode import Picture
from gateway_shim.media.planes import plane_views
from gateway_shim.stream.intake import Decoded, Intake


async def ignored(_: Decoded) -> None:
    """Nobody takes pictures here."""


@pytest.fixture
async def intake() -> AsyncIterator[Intake]:
    nobody: Any = None
    intake = Intake(nobody, size=None, on_picture=ignored, on_sound=lambda _: None)
    yield intake
    await intake.close()


def black(width: int, height: int, colour: Colour) -> Picture:
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane, level in zip(plane_views(frame), (0 if colour.full_range else 16, 128, 128), strict=True):
        plane[:] = level
    return Picture(frame, 0, width, height, colour)


async def test_a_source_that_switches_camera_keeps_size_and_colour(intake: Intake) -> None:
    cameras = [(64, 48, Colour()), (64, 48, Colour(full_range=True)), (128, 96, Colour("bt709")), (64, 48, Colour())]
    for camera in cameras:
        [handed] = intake._ready([black(*camera)])
        assert isinstance(handed, Decoded)
        assert (handed.frame.width, handed.frame.height, handed.colour) == cameras[0]
        levels = [float(plane.mean()) for plane in plane_views(handed.frame)]
        assert levels == pytest.approx([16, 128, 128], abs=1)  # full range has black at 0
