"""The conversion in torch against the kernels' 64-bit oracle, on the CPU: the same code runs on a GPU."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cext
from cext import Colour, PixelFormat, _pixels_py
from engine.backend import FrameIn, GraphFailed
from engine.comfy_backend import ComfyGraph
from engine.graph import device_pixels
from engine.graph.device import is_lost
from engine.graph.device_pixels import ON_CPU, DevicePixels, Placement, faster_on_device, placement
from engine.graph.runner import NodeFailed, TickInput, TickOutput
from engine.graph.tensors import Converter
from engine.wire import VideoFormat

CPU = torch.device("cpu")
COLOURS = [Colour(matrix, full_range) for matrix in ("bt601", "bt709") for full_range in (False, True)]
FORMATS: tuple[PixelFormat, ...] = get_args(PixelFormat)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def special_image(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = rng.uniform(-0.2, 1.2, shape).astype(dtype)
    specials = np.array([np.nan, np.inf, -np.inf, -0.0, 1.0, 0.0, 6e-8, 60000.0, -60000.0], dtype)
    flat = image.reshape(-1)
    where = rng.integers(0, flat.size, min(flat.size, 40))
    flat[where] = specials[np.arange(where.size) % specials.size]
    return image


@settings(max_examples=80, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 20),
    count=st.integers(1, 3),
    pixel_format=st.sampled_from(FORMATS),
    colour=st.sampled_from(COLOURS),
    dtype=st.sampled_from(["float32", "float16"]),
    channels=st.sampled_from([3, 4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_picture_there_and_any_image_back(
    width: int,
    height: int,
    count: int,
    pixel_format: PixelFormat,
    colour: Colour,
    dtype: str,
    channels: int,
    seed: int,
) -> None:
    pixels = DevicePixels(CPU, pixel_format, colour)
    size = cext.picture_bytes(width, height, pixel_format)
    pictures = [noise(size, seed + number) for number in range(count)]
    images = pixels.to_images(pictures, width, height)
    assert images.shape == (count, height, width, 3)
    for image, picture in zip(images.numpy(), pictures, strict=True):
        planes = cext.planes_from_buffer(picture, width, height, pixel_format).arrays
        assert np.abs(image - _pixels_py.exact_image(planes, colour)).max() <= 3e-7

    given_images = special_image((count, height, width, channels), dtype, seed)
    yard = [bytearray(b"\xa5" * (size + 16)) for _ in range(count)]
    pixels.to_planes(torch.from_numpy(given_images), [memoryview(out)[8:-8] for out in yard])
    for image, out in zip(given_images, yard, strict=True):
        written = cext.planes_from_buffer(out[8:-8], width, height, pixel_format).arrays
        exact = _pixels_py.exact_planes(image, len(written), colour)
        for plane, levels in zip(written, exact, strict=True):
            assert np.abs(plane - np.minimum(levels, 255)).max() <= 0.5 + 1e-4
        assert out[:8] + out[-8:] == b"\xa5" * 16


@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_every_luma_under_every_chroma_is_exact_enough(colour: Colour) -> None:
    """All 16.7 million combinations, 256 x 256 blocks of one luma pair at a time would take minutes: every fifth."""
    levels = np.unique(np.r_[0:256:5, 16, 128, 235, 240, 255]).astype(np.uint8)
    u, v = np.meshgrid(levels, levels)
    pixels = DevicePixels(CPU, "i420", colour)
    for y in range(0, 256, 3):
        luma = np.full((2 * len(levels), 2 * len(levels)), y, np.uint8)
        image = pixels.to_images([luma.tobytes() + u.tobytes() + v.tobytes()], luma.shape[1], luma.shape[0])
        exact = _pixels_py.exact_image((luma, u, v), colour)
        assert np.abs(image[0].numpy() - exact).max() <= 3e-7


@pytest.mark.parametrize("pixel_format", FORMATS)
def test_bytes_inside_the_rgb_cube_come_back_exactly(pixel_format: PixelFormat) -> None:
    luma = np.linspace(60, 190, 64 * 48).astype(np.uint8)
    chroma = np.random.default_rng(1).integers(120, 137, 64 * 48 // 2, np.uint8)
    picture = noise(3 * 64 * 48) if pixel_format == "rgb24" else luma.tobytes() + chroma.tobytes()
    pixels = DevicePixels(CPU, pixel_format, Colour("bt709"))
    out = bytearray(len(picture))
    pixels.to_planes(pixels.to_images([picture], 64, 48), [out])
    assert out == picture


def test_levels_are_those_of_the_kernels() -> None:
    """Halves round alike, to even."""
    image = np.random.default_rng(2).uniform(0, 1, (1, 34, 50, 3)).astype(np.float32)
    image[0, :, :, :] = np.round(image * 510) / 510  # halves of RGB levels
    pixels = DevicePixels(CPU, "rgb24")
    here, there = bytearray(3 * 34 * 50), bytearray(3 * 34 * 50)
    pixels.to_planes(torch.from_numpy(image), [there])
    cext.image_to_picture(image[0], cext.planes_from_buffer(here, 50, 34, "rgb24"))
    assert here == there


def test_sliced_images_of_any_strides_are_read() -> None:
    canvas = torch.rand(2, 40, 60, 4)
    crop = canvas[:, 5:25, 7:37, :3]
    pixels = DevicePixels(CPU)
    sliced, packed = (bytearray(cext.picture_bytes(30, 20)) for _ in range(2))
    pixels.to_planes(crop[1:], [sliced])
    pixels.to_planes(crop[1:].contiguous(), [packed])
    assert sliced == packed
    assert (canvas == canvas.clamp(0, 1)).all()  # nothing of the graph's is written to


def test_an_image_does_not_change_when_the_next_one_is_converted() -> None:
    pixels = DevicePixels(CPU)
    first = pixels.to_images([noise(96, 1)], 8, 8)
    before = first.clone()
    pixels.to_images([noise(96, 2)], 8, 8)
    assert torch.equal(first, before)


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    pixels = DevicePixels(CPU)
    with pytest.raises(ValueError, match="8 x 8 needs 96 bytes, not 95"):
        pixels.to_images([noise(95)], 8, 8)
    outs = [bytearray(96), bytearray(95)]
    with pytest.raises(ValueError, match="8 x 8 has 96 bytes, the buffer 95"):
        pixels.to_planes(torch.ones(2, 8, 8, 3), outs)
    assert outs[0] == bytes(96)


@pytest.mark.parametrize(("device_s", "cpu_s"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_faster_way_is_chosen_by_the_clock(device_s: float, cpu_s: float) -> None:
    moments: list[float] = [0.0]

    def clock() -> float:  # two readings a measurement, device and CPU in turn
        reading = len(moments) - 1
        step = (device_s, cpu_s)[reading // 2 % 2] if reading % 2 else 0.0
        moments.append(moments[-1] + step)
        return moments[-1]

    def on_cpu(pictures: Any, width: int, height: int) -> torch.Tensor:
        return torch.zeros(1, height, width, 3)

    assert faster_on_device(CPU, on_cpu, clock) == (device_s < cpu_s, device_s, cpu_s)


# ---- where pixels are converted


ON_DEVICE = Placement(CPU, may_return=True)  # torch's conversion, on the device that is there


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which conversions ran."""
    ran: list[str] = []
    to_images, to_planes = DevicePixels.to_images, DevicePixels.to_planes

    def images(self: DevicePixels, *arguments: Any) -> torch.Tensor:
        ran.append("to_images")
        return to_images(self, *arguments)

    def planes(self: DevicePixels, *arguments: Any) -> None:
        ran.append("to_planes")
        to_planes(self, *arguments)

    monkeypatch.setattr(DevicePixels, "to_images", images)
    monkeypatch.setattr(DevicePixels, "to_planes", planes)
    return ran


@pytest.mark.parametrize("pixel_format", ["i420", "nv12"])
def test_a_session_converts_where_it_was_placed(monkeypatch: pytest.MonkeyPatch, pixel_format: PixelFormat) -> None:
    ran = spy(monkeypatch)
    picture = bytes([120]) * cext.picture_bytes(32, 18, pixel_format)
    for place, expected in ((ON_DEVICE, ["to_images", "to_planes"]), (ON_CPU, [])):
        ran.clear()
        converter = Converter(pixel_format, placement=place)
        images = converter.to_images([picture, picture], 32, 18)
        assert [result.planes for result in converter.to_planes(images)] == [picture, picture]
        assert ran == expected


IMAGES = [torch.full((1, 9, 9, 3), 0.5, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
IMAGES += [torch.full((1, 8, 8, 3), 128, dtype=torch.uint8), torch.full((2, 8, 8, 1), 0.3), torch.rand(1, 8, 8, 4)]
IMAGES += [torch.rand(1, 3, 8, 8).permute(0, 2, 3, 1)]


@pytest.mark.parametrize("images", IMAGES, ids=lambda images: f"{images.dtype}{tuple(images.shape)}")
def test_whatever_nodes_put_out_is_converted_there_as_on_the_cpu(images: torch.Tensor) -> None:
    for there, here in zip(
        Converter(placement=ON_DEVICE).to_planes(images), Converter().to_planes(images), strict=True
    ):
        assert (there.width, there.height) == (here.width, here.height)
        levels = [np.frombuffer(result.planes, np.uint8).astype(int) for result in (there, here)]
        assert np.abs(levels[0] - levels[1]).max() <= 1  # halves may round apart: sums in another order


def test_images_elsewhere_than_on_the_device_are_converted_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's own nodes put IMAGEs out on the CPU."""
    ran = spy(monkeypatch)
    converter = Converter(placement=Placement(torch.device("meta")))
    assert len(converter.to_planes(torch.zeros(1, 8, 8, 3))) == 1
    assert ran == []


class Fussy:
    """A runner whose node fails: in the second tick, always or never."""

    name, reason = "plan", ""

    def __init__(self, exception: str, *, always: bool = False, never: bool = False) -> None:
        self.exception = exception
        self.always = always
        self.never = never
        self.ticks: list[torch.Tensor | None] = []

    def load(self, prompt: Any) -> None:
        """Any prompt."""

    def tick(self, tick: TickInput) -> TickOutput:
        self.ticks.append(tick.images)
        if self.always or (len(self.ticks) == 2 and not self.never):
            raise NodeFailed("2", "Cv2Node", self.exception, "can't convert cuda:0 device type tensor to numpy")
        return TickOutput(tick.images)


PROMPT: Any = {
    "1": {"class_type": "LoadTensor", "inputs": {}},
    "2": {"class_type": "SaveTensor", "inputs": {"images": ["1", 0]}},
}


def graph_over(runner: Any, place: Placement) -> ComfyGraph:
    return ComfyGraph(runner, PROMPT, VideoFormat(8, 8), place)


def test_a_graph_that_takes_no_image_on_the_device_gets_them_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = spy(monkeypatch)
    runner = Fussy("TypeError")
    graph = graph_over(runner, ON_DEVICE)
    levels = []
    for number in range(4):
        [shown] = graph.run(PROMPT, [FrameIn(number, number, bytes([100 + number]) * 64 + b"\x80" * 32)]).pictures
        assert shown is not None
        levels.append(shown.planes[0])
    assert levels == [100, 101, 102, 103]  # not one was lost
    assert len(runner.ticks) == 5
    assert runner.ticks[1] is not runner.ticks[2]
    assert ran == ["to_images", "to_planes", "to_images"]  # the second frame failed, and the CPU went on


@pytest.mark.parametrize(
    ("exception", "place"),
    [("torch.OutOfMemoryError", ON_DEVICE), ("TypeError", Placement(CPU)), ("TypeError", ON_CPU)],
    ids=["memory", "forced", "cpu"],
)
def test_other_failures_are_the_graphs(exception: str, place: Placement) -> None:
    runner = Fussy(exception, always=True)
    with pytest.raises(GraphFailed):
        graph_over(runner, place).run(PROMPT, [FrameIn(0, 0, bytes(96))])
    assert len(runner.ticks) == 1


def test_a_graph_that_fails_wherever_the_picture_is_keeps_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = spy(monkeypatch)
    runner = Fussy("ValueError", always=True)
    graph = graph_over(runner, ON_DEVICE)
    with pytest.raises(GraphFailed):
        graph.run(PROMPT, [FrameIn(0, 0, bytes(96))])
    assert len(runner.ticks) == 2
    runner.always, runner.never = False, True
    graph.run(PROMPT, [FrameIn(1, 1, bytes(96))])
    assert ran == ["to_images", "to_images", "to_planes"]


@pytest.mark.parametrize("conversion", ["to_images", "to_planes"])
@pytest.mark.parametrize("place", [ON_DEVICE, Placement(CPU)], ids=["auto", "forced"])
def test_a_device_without_memory_for_pictures(
    monkeypatch: pytest.MonkeyPatch, conversion: str, place: Placement
) -> None:
    """The CPU converts them where it may; a session that may not loses its frames, and says so by name."""

    def fails(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("no memory left")

    monkeypatch.setattr(DevicePixels, conversion, fails)
    freed: list[str] = []
    runner = Fussy("", never=True)
    graph = ComfyGraph(runner, PROMPT, VideoFormat(8, 8), place, free_memory=lambda: freed.append("models"))
    for number in range(2):
        frame = FrameIn(number, number, bytes([100 + number]) * 64 + b"\x80" * 32)
        if place is ON_DEVICE:
            [shown] = graph.run(PROMPT, [frame]).pictures
            assert shown is not None
            assert shown.planes[0] == 100 + number
            continue
        with pytest.raises(GraphFailed, match="no memory left") as caught:
            graph.run(PROMPT, [frame])
        assert caught.value.code == "out_of_memory"
    assert freed == ([] if place is ON_DEVICE else ["models", "models"])


def test_where_the_cpu_finds_no_memory_either_it_is_the_frames_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[str] = []

    def fails(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("no memory left")

    monkeypatch.setattr(Converter, "to_planes", fails)
    graph = ComfyGraph(
        Fussy("", never=True), PROMPT, VideoFormat(8, 8), ON_DEVICE, free_memory=lambda: freed.append("models")
    )
    with pytest.raises(GraphFailed) as caught:
        graph.run(PROMPT, [FrameIn(0, 0, bytes(96))])
    assert (caught.value.code, freed) == ("out_of_memory", ["models"])


def test_on_a_machine_without_a_gpu_the_setting_means_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    choices: list[Any] = ["auto", "cpu", "device"]
    assert {placement(choice, CPU, Converter().to_images) for choice in choices} == {ON_CPU}
    assert "graphs run on the CPU" in caplog.text


@pytest.mark.parametrize(
    ("choice", "faster", "expected"),
    [
        ("auto", True, Placement(torch.device("cuda", 0), page_locked=True, may_return=True)),
        ("auto", False, Placement(None, page_locked=True, may_return=True)),
        ("device", False, Placement(torch.device("cuda", 0), page_locked=True)),
        ("cpu", True, Placement(None, page_locked=True)),
    ],
)
def test_on_a_gpu_the_faster_way_or_the_one_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, choice: Any, faster: bool, expected: Placement
) -> None:
    monkeypatch.setattr(device_pixels, "faster_on_device", lambda *_: (faster, 0.001, 0.002))
    assert placement(choice, torch.device("cuda", 0), Converter().to_images) == expected


def test_a_measurement_that_fails_costs_the_engine_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("no memory left")

    monkeypatch.setattr(device_pixels, "faster_on_device", fails)
    assert placement("auto", torch.device("cuda", 0), Converter().to_images) == Placement(page_locked=True)
    assert "no memory left" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", ["auto", "cpu", "device"])
def test_pictures_on_a_real_gpu_come_back_exactly(choice: Any) -> None:
    device = torch.device("cuda", 0)
    place = placement(choice, device, Converter(placement=Placement(page_locked=True)).to_images)
    converter = Converter(placement=place)
    # Flat pictures come back exactly; of another level each time, they show memory that was used again too early.
    before: tuple[bytes, torch.Tensor] | None = None
    for level in range(40, 200, 10):
        picture = bytes([level]) * (1280 * 720) + bytes([128]) * (1280 * 720 // 2)
        images = converter.to_images([picture], 1280, 720)
        assert images.device == (place.device or CPU)
        assert place.device or images.is_pinned()
        uploaded = images.to(device, non_blocking=True)
        del images
        for expected, there in [before] if before else []:
            [result] = converter.to_planes(there)
            assert result.planes == expected
        before = picture, uploaded


def test_the_pool_is_aligned_for_streaming_stores() -> None:
    converter = Converter()
    held = [converter.to_images([bytes(cext.picture_bytes(w, 480))], w, 480) for w in (640, 854, 1280)]
    assert [images.data_ptr() % 64 for images in held] == [0, 0, 0]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (None, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_device_is_lost_where_every_call_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, lost: bool
) -> None:
    def synchronize(_: torch.device) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert is_lost(torch.device("cuda:0")) is lost
    assert not is_lost(torch.device("cpu"))
