"""One test body for every backend, against the 64-bit NumPy code."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import cext
from cext import Colour, Nv12Planes, Picture, PixelFormat, Planes, Rgb24Plane, _pixels_py

COLOURS = [Colour(matrix, full_range) for matrix in ("bt601", "bt709") for full_range in (False, True)]
FORMATS: tuple[PixelFormat, ...] = get_args(PixelFormat)
# Around every vector width, odd and even, and one line longer than the kernels' tile of 4096 columns.
SIZES = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 3), (7, 5), (8, 2), (15, 4), (16, 3), (17, 2), (31, 5), (32, 6), (33, 7)]
SIZES += [(47, 3), (48, 2), (64, 48), (65, 3), (854, 4), (4099, 3), (8211, 2)]
LARGE = [(1279, 719), (1280, 720), (1920, 1080)]

# Half a unit in the last place of a half just below 1, and what the 32-bit arithmetic before it may add.
TOLERANCE = {"float32": 3e-7, "float16": 2.0**-12 + 3e-7}
CANARY = 0xA5


@pytest.fixture(params=["numpy", "c", "avx2", "avx512"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in cext.backends():
        pytest.skip(f"{request.param} does not run on this machine")
    before = cext.BACKEND
    cext.use_backend(request.param)
    yield request.param
    cext.use_backend(before)


@contextlib.contextmanager
def streaming(nbytes: int) -> Iterator[None]:
    """Streaming stores from ``nbytes`` on, where alignment permits them."""
    if cext.backends() == ("numpy",):
        yield
        return
    before = cext._pixels.stream_from(nbytes)
    try:
        yield
    finally:
        cext._pixels.stream_from(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261123)


class Yard:
    """Memory with canaries around an array: rows are padded, it begins ``offset`` bytes after a multiple of 64."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, padding: int = 0, offset: int = 0) -> None:
        item = np.dtype(dtype).itemsize
        row = int(np.prod(shape[1:])) * item
        step = row + padding * item
        self.memory = np.full(4096 + 64 + offset + shape[0] * step + 4096, CANARY, np.uint8)
        start = 4096 + -(self.memory.ctypes.data + 4096) % 64 + offset
        self.array: NDArray[Any] = self._rows(self.memory, start, shape[0], step, row).view(dtype).reshape(shape)
        self.outside = np.ones(self.memory.size, bool)
        self._rows(self.outside, start, shape[0], step, row)[...] = False
        assert np.shares_memory(self.array, self.memory)

    @staticmethod
    def _rows(memory: NDArray[Any], start: int, count: int, step: int, row: int) -> NDArray[Any]:
        return memory[start : start + count * step].reshape(count, step)[:, :row]

    def assert_only_inside(self) -> None:
        touched = np.flatnonzero(self.memory[self.outside] != CANARY)
        assert touched.size == 0, f"{touched.size} bytes outside the destination were written"


def yards(pixel_format: PixelFormat, width: int, height: int, padding: int = 0, offset: int = 0) -> list[Yard]:
    chroma = cext.chroma_shape(height, width)
    shapes: dict[PixelFormat, list[tuple[int, ...]]] = {
        "i420": [(height, width), chroma, chroma],
        "nv12": [(height, width), (chroma[0], 2 * chroma[1])],
        "rgb24": [(height, width, 3)],
    }
    return [Yard(shape, np.uint8, padding, offset) for shape in shapes[pixel_format]]


def picture_over(grounds: list[Yard]) -> Picture:
    kinds: dict[int, Any] = {1: Rgb24Plane, 2: Nv12Planes, 3: Planes}
    picture: Picture = kinds[len(grounds)](*(yard.array for yard in grounds))
    return picture


def random_picture(
    rng: np.random.Generator, pixel_format: PixelFormat, width: int, height: int, padding: int = 0, offset: int = 0
) -> Picture:
    grounds = yards(pixel_format, width, height, padding, offset)
    for yard in grounds:
        yard.array[...] = rng.integers(0, 256, yard.array.shape, np.uint8)
        yard.array.flags.writeable = False
    return picture_over(grounds)


def random_image(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Nominal range with overshoot, so that the clamp matters, and every special value."""
    image = rng.uniform(-0.2, 1.2, shape).astype(dtype)
    specials = np.array([np.nan, np.inf, -np.inf, -0.0, 1.0, 0.0, 6e-8, -np.nan, 60000.0, -60000.0], dtype)
    flat = image.reshape(-1)
    where = rng.integers(0, flat.size, min(flat.size, 40))
    flat[where] = specials[np.arange(where.size) % specials.size]
    return image


def assert_image(image: NDArray[Any], picture: Picture, colour: Colour) -> None:
    error = np.abs(image.astype(np.float64) - _pixels_py.exact_image(picture.arrays, colour)).max()
    assert error <= TOLERANCE[image.dtype.name]
    assert image.min() >= 0
    assert image.max() <= 1


def assert_levels(picture: Picture, image: NDArray[Any], colour: Colour) -> None:
    exact = _pixels_py.exact_planes(image, len(picture.arrays), colour)
    for plane, levels in zip(picture.arrays, exact, strict=True):
        # Half a level and the rounding of 32-bit sums near 255. Full-range chroma reaches 255.5, which no byte holds.
        assert np.abs(plane - np.minimum(levels, 255)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pixel_format", FORMATS)
@pytest.mark.parametrize("colour", COLOURS, ids=lambda c: f"{c.matrix}-{'full' if c.full_range else 'limited'}")
def test_error_at_every_size_with_padding_and_canaries(
    rng: np.random.Generator, colour: Colour, pixel_format: PixelFormat, dtype: str
) -> None:
    for number, (width, height) in enumerate(SIZES):
        padding, offset = (0, 0) if number % 3 == 0 else (number % 7, number % 5)
        picture = random_picture(rng, pixel_format, width, height, padding, offset)
        out = Yard((height, width, 3), dtype, padding, 4 * offset)
        cext.picture_to_image(picture, out.array, colour)
        assert_image(out.array, picture, colour)
        out.assert_only_inside()

        for channels in (3, 4):
            image = Yard((height, width, channels), dtype, padding, 4 * offset)
            image.array[...] = random_image(rng, (height, width, channels), dtype)
            image.array.flags.writeable = False
            grounds = yards(pixel_format, width, height, padding, offset)
            back = picture_over(grounds)
            cext.image_to_picture(image.array, back, colour)
            assert_levels(back, image.array, colour)
            for yard in grounds:
                yard.assert_only_inside()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("offset", [0, 4, 32])  # streaming stores, none, those of 32 bytes only
@pytest.mark.parametrize(("width", "height"), LARGE)
def test_error_of_large_pictures_at_every_alignment(
    rng: np.random.Generator, width: int, height: int, offset: int, dtype: str
) -> None:
    colour = COLOURS[2]
    pixel_format = FORMATS[(width + offset // 4) % 3]
    picture = random_picture(rng, pixel_format, width, height)
    out = Yard((height, width, 3), dtype, 0, offset)
    cext.picture_to_image(picture, out.array, colour)
    assert_image(out.array, picture, colour)
    out.assert_only_inside()
    grounds = yards(pixel_format, width, height)
    back = picture_over(grounds)
    cext.image_to_picture(out.array, back, colour)
    assert_levels(back, out.array, colour)
    for yard in grounds:
        yard.assert_only_inside()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pixel_format", FORMATS)
def test_streaming_stores_write_the_same_as_normal_ones(
    rng: np.random.Generator, pixel_format: PixelFormat, dtype: str
) -> None:
    for width, height, padding, offset in [
        (64, 5, 0, 0),
        (64, 4, 16, 32),
        (72, 3, 0, 0),
        (79, 1, 0, 0),
        (70, 4, 6, 16),
    ]:
        picture = random_picture(rng, pixel_format, width, height, 3, 1)
        normal, streamed = (Yard((height, width, 3), dtype, padding, offset) for _ in range(2))
        with streaming(1 << 40):
            cext.picture_to_image(picture, normal.array)
        with streaming(0):
            cext.picture_to_image(picture, streamed.array)
        np.testing.assert_array_equal(normal.array, streamed.array)
        streamed.assert_only_inside()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 9),
    padding=st.integers(0, 40),
    offset=st.sampled_from([0, 8]) | st.integers(0, 15),
    pixel_format=st.sampled_from(FORMATS),
    colour=st.sampled_from(COLOURS),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 2**32 - 1),
    stream=st.booleans(),
)
def test_any_geometry_converts_there_and_back(
    width: int,
    height: int,
    padding: int,
    offset: int,
    pixel_format: PixelFormat,
    colour: Colour,
    dtype: str,
    seed: int,
    stream: bool,
) -> None:
    rng = np.random.default_rng(seed)
    picture = random_picture(rng, pixel_format, width, height, padding, offset)
    out = Yard((height, width, 3), dtype, padding, 4 * offset)
    with streaming(0 if stream else 1 << 40):
        cext.picture_to_image(picture, out.array, colour)
    assert_image(out.array, picture, colour)
    out.assert_only_inside()
    out.array[...] = random_image(rng, out.array.shape, dtype)
    grounds = yards(pixel_format, width, height, padding, offset)
    back = picture_over(grounds)
    cext.image_to_picture(out.array, back, colour)
    assert_levels(back, out.array, colour)
    for yard in grounds:
        yard.assert_only_inside()


@pytest.mark.parametrize("pixel_format", ["i420", "nv12"])
@pytest.mark.parametrize("colour", COLOURS, ids=str)
@pytest.mark.parametrize(("width", "height"), [(64, 48), (33, 7), (854, 480)])
def test_pass_through_of_colours_in_the_cube_changes_no_byte(
    rng: np.random.Generator, colour: Colour, pixel_format: PixelFormat, width: int, height: int
) -> None:
    """The 2x2 mean undoes the nearest chroma exactly, wherever no pixel of the block had to be clamped."""
    picture = random_picture(rng, pixel_format, width, height)
    # Colours in the middle of the cube: moderate chroma, luma far enough from black and white.
    y = 100 + picture.arrays[0] // 5
    chroma = [112 + plane // 8 for plane in picture.arrays[1:]]
    source = (Planes if pixel_format == "i420" else Nv12Planes)(y, *chroma)
    exact = _pixels_py.exact_image(source.arrays, colour)
    assert exact.min() > 0
    assert exact.max() < 1
    image = np.empty((height, width, 3), np.float32)
    cext.picture_to_image(source, image, colour)
    back = cext.planes_from_buffer(
        bytearray(cext.picture_bytes(width, height, pixel_format)), width, height, pixel_format
    )
    cext.image_to_picture(image, back, colour)
    for before, after in zip(source.arrays, back.arrays, strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_rgb24_level_survives(dtype: Any) -> None:
    levels = np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(2, 128, 3)
    image = np.empty(levels.shape, dtype)
    cext.rgb24_to_image(Rgb24Plane(levels), image)
    back = Rgb24Plane(np.zeros_like(levels))
    cext.image_to_rgb24(image, back)
    np.testing.assert_array_equal(back.rgb, levels)
    assert image[0, 0, 0] == 0
    assert image[0, 85, 0] == 1


def test_black_white_and_primaries_are_the_recommendations_levels() -> None:
    """BT.601 and BT.709 colour bars at 100 %, limited range: published levels, independent of our formulas."""
    bars = {"bt601": [(1, 0, 0, 81, 90, 240), (0, 1, 0, 145, 54, 34), (0, 0, 1, 41, 240, 110)]}
    bars["bt709"] = [(1, 0, 0, 63, 102, 240), (0, 1, 0, 173, 42, 26), (0, 0, 1, 32, 240, 118)]
    for colour in COLOURS:
        if colour.full_range:
            continue
        for *rgb, y, u, v in [*bars[colour.matrix], (0, 0, 0, 16, 128, 128), (1, 1, 1, 235, 128, 128)]:
            planes = cext.planes_from_buffer(bytearray(16 * 2 * 3 // 2), 16, 2)
            cext.image_to_i420(np.broadcast_to(np.array(rgb, np.float32), (2, 16, 3)).copy(), planes, colour)
            assert [set(plane.flat) for plane in planes.arrays] == [{y}, {u}, {v}]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_is_black_and_infinities_are_clamped(dtype: str) -> None:
    image = np.empty((2, 48, 3), dtype)
    image[:, :16], image[:, 16:32], image[:, 32:] = np.nan, np.inf, -np.inf
    planes = cext.planes_from_buffer(bytearray(cext.picture_bytes(48, 2)), 48, 2)
    cext.image_to_i420(image, planes)
    assert (planes.y[:, :16] == 16).all()
    assert (planes.y[:, 16:32] == 235).all()
    assert (planes.y[:, 32:] == 16).all()
    assert (planes.u == 128).all()
    assert (planes.v == 128).all()


def test_alpha_is_ignored_in_packed_and_in_sliced_images(rng: np.random.Generator) -> None:
    rgba = rng.uniform(0, 1, (34, 50, 4)).astype(np.float32)
    rgba[..., 3] = np.nan
    results = []
    for image in (rgba, rgba[..., :3], np.ascontiguousarray(rgba[..., :3])):
        planes = cext.planes_from_buffer(bytearray(cext.picture_bytes(50, 34)), 50, 34)
        cext.image_to_i420(image, planes)
        results.append(np.concatenate([plane.ravel() for plane in planes.arrays]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("pixel_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_batch_is_its_pictures_one_by_one(rng: np.random.Generator, pixel_format: PixelFormat, dtype: str) -> None:
    pictures = [random_picture(rng, pixel_format, 38, 11, padding=index) for index in range(5)]
    storage = np.full((10, 11, 38, 3), 7, dtype)
    batch = storage[::2]  # images with gaps between them
    cext.pictures_to_images(pictures, batch, COLOURS[3])
    assert (storage[1::2] == 7).all()
    one = np.empty((11, 38, 3), dtype)
    for picture, image in zip(pictures, batch, strict=True):
        cext.picture_to_image(picture, one, COLOURS[3])
        np.testing.assert_array_equal(image, one)
    backs = [picture_over(yards(pixel_format, 38, 11, index)) for index in range(5)]
    cext.images_to_pictures(batch, backs, COLOURS[3])
    for image, back in zip(batch, backs, strict=True):
        assert_levels(back, image, COLOURS[3])


def test_crop_of_a_larger_image_is_read_and_written_in_place(rng: np.random.Generator) -> None:
    canvas = np.full((40, 60, 3), 0.25, np.float32)
    picture = random_picture(rng, "i420", 20, 10)
    crop = canvas[5:15, 7:27]
    cext.picture_to_image(picture, crop)
    assert_image(crop, picture, Colour())
    canvas[5:15, 7:27] = 0.25
    assert (canvas == 0.25).all()


def test_chroma_planes_side_by_side_in_one_block_are_accepted() -> None:
    block = np.zeros((8, 32), np.uint8)
    planes = Planes(np.zeros((16, 32), np.uint8), block[:, :16], block[:, 16:])
    image = np.zeros((16, 32, 3), np.float32)
    image[..., 0] = 1
    cext.image_to_i420(image, planes)
    assert set(planes.u.flat) == {90}
    assert set(planes.v.flat) == {240}


def test_planes_from_buffer_copies_nothing() -> None:
    buffer = bytearray(cext.picture_bytes(5, 3))
    planes = cext.planes_from_buffer(memoryview(buffer), 5, 3)
    planes.v[1, 2] = 9
    assert buffer[-1] == 9
    assert (planes.width, planes.height, planes.pixel_format) == (5, 3, "i420")
    assert not cext.planes_from_buffer(bytes(buffer), 5, 3).y.flags.writeable
    assert isinstance(cext.planes_from_buffer(buffer[:27], 5, 3, "nv12"), Nv12Planes)
    assert isinstance(cext.planes_from_buffer(bytearray(45), 5, 3, "rgb24"), Rgb24Plane)


def _planes(width: int = 8, height: int = 4) -> Planes:
    return cext.planes_from_buffer(bytearray(cext.picture_bytes(width, height)), width, height)


def _zeros(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.zeros(shape, dtype)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def _misaligned() -> NDArray[Any]:
    return np.zeros(4 * 8 * 3 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(4, 8, 3)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (_zeros(4, 9, 3), r"out is \(4, 9, 3\), the picture needs \(4, 8, 3\)"),
        (_zeros(4, 8, 4), r"out is \(4, 8, 4\), it must be \(H, W, C\) with C = 3"),
        (_zeros(1, 4, 8, 3), r"it must be \(H, W, C\)"),
        (_zeros(4, 8, 3, dtype=np.float64), "holds float64, it must hold float32 or float16"),
        (_zeros(4, 8, 3, dtype=">f4"), "it must hold float32 or float16"),
        (_read_only(_zeros(4, 8, 3)), "out is read-only"),
        (_zeros(3, 4, 8).transpose(1, 2, 0), "gaps between the values of a row"),
        (_zeros(4, 16, 3)[:, ::2], "gaps between the values of a row"),
        (_zeros(4, 8, 4)[..., :3], "gaps between the values of a row"),
        (_zeros(4, 8, 3)[::-1], "line size of -96 bytes, it must be positive"),
        (np.lib.stride_tricks.as_strided(_zeros(8, 8, 3), (4, 8, 3), (48, 12, 4)), "less than its rows are long"),
        (_misaligned(), "does not lie at a multiple of 4 bytes"),
        ("frame", "holds <U5"),
    ],
)
def test_unfit_out_is_refused_with_a_sentence(out: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cext.i420_to_image(_planes(), out)
    if isinstance(out, np.ndarray):
        assert not out.any()


@pytest.mark.parametrize(
    ("image", "planes", "sentence"),
    [
        (_zeros(4, 8, 2), _planes(), "C = 3 or 4"),
        (_zeros(4, 8, 3), _planes(10), r"the picture needs \(4, 10, 3\)"),
        (_zeros(4, 8, 3, dtype=np.uint8), _planes(), "holds uint8"),
        (_zeros(4, 8, 3), cext.planes_from_buffer(bytes(48), 8, 4), "read-only"),
        (np.broadcast_to(np.float32(0), (4, 8, 3)), _planes(), "gaps"),
    ],
)
def test_unfit_image_is_refused_with_a_sentence(image: Any, planes: Planes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cext.image_to_i420(image, planes)
    assert not any(plane.any() for plane in planes.arrays)


def test_wrong_kind_of_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="Planes, it must be Nv12Planes"):
        cext.nv12_to_image(_planes(), _zeros(4, 8, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one pixel format"):
        cext.pictures_to_images([_planes(), Rgb24Plane(np.zeros((4, 8, 3), np.uint8))], _zeros(2, 4, 8, 3))
    with pytest.raises(ValueError, match="2 images for 1 pictures"):
        cext.pictures_to_images([_planes()], _zeros(2, 4, 8, 3))


def test_overlap_is_refused() -> None:
    memory = np.zeros(8 * 4 * 3 * 4, np.uint8)
    image = memory.view(np.float32).reshape(4, 8, 3)
    inside = cext.planes_from_buffer(memory[16 : 16 + 48], 8, 4)
    with pytest.raises(ValueError, match="out lies in the memory of a picture"):
        cext.i420_to_image(inside, image)
    with pytest.raises(ValueError, match="lies in the memory of the image"):
        cext.image_to_i420(image, inside)
    planes = _planes()
    with pytest.raises(ValueError, match="two planes that are to be written overlap"):
        cext.image_to_i420(_zeros(4, 8, 3), Planes(planes.y, planes.u, planes.u))
    narrow = np.lib.stride_tricks.as_strided(np.zeros(64, np.uint8), (4, 8), (4, 1))
    with pytest.raises(ValueError, match="line size of 4 bytes, less than its rows of 8"):
        cext.image_to_i420(_zeros(4, 8, 3), Planes(narrow, planes.u, planes.v))
    pair = np.lib.stride_tricks.as_strided(np.zeros(400, np.float32), (2, 4, 8, 3), (96, 96, 12, 4))
    with pytest.raises(ValueError, match="images that overlap"):
        cext.pictures_to_images([_planes(), _planes()], pair)


def test_unfit_planes_are_refused_with_a_sentence() -> None:
    y, chroma = np.zeros((5, 7), np.uint8), np.zeros((3, 4), np.uint8)
    Planes(y, chroma, chroma)
    for arguments, sentence in [
        ((y, chroma[:2], chroma), r"u is \(2, 4\), the picture needs \(3, 4\)"),
        ((y, chroma, chroma[:, :3]), r"v is \(3, 3\), the picture needs \(3, 4\)"),
        ((y.astype(np.int8), chroma, chroma), "y holds int8, it must hold uint8"),
        ((y[0], chroma, chroma), "y has 1 dimensions, it must have 2"),
        ((y[:0], chroma, chroma), "at least one pixel"),
        ((y[::-1], chroma, chroma), "line size of -7 bytes, it must be positive"),
        ((np.zeros((5, 14), np.uint8)[:, ::2], chroma, chroma), "gaps between the bytes of a row"),
        ((np.broadcast_to(y[0], (5, 7)), chroma, chroma), "line size of 0 bytes"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            Planes(*arguments)
    with pytest.raises(ValueError, match="rgb has 4 channels"):
        Rgb24Plane(np.zeros((2, 2, 4), np.uint8))


def test_unfit_buffers_are_refused_with_a_sentence() -> None:
    for arguments, sentence in [
        ((bytes(11), 4, 2), "the buffer has 11 bytes, 4x2 i420 needs 12"),
        ((bytes(12), 4, 0), "4x0, a picture has at least one pixel"),
        ((bytes(12), 4, 2, "yuyv"), "'yuyv', it must be i420, nv12 or rgb24"),
        ((np.zeros(24, np.uint8)[::2], 4, 2), "no contiguous bytes"),
        (("text", 4, 2), "no contiguous bytes"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            cext.planes_from_buffer(*arguments)  # type: ignore[call-overload]


def test_backend_and_matrix_that_do_not_exist_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="must be one of numpy, c, avx2, avx512"):
        cext.use_backend("sse9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be one of bt601, bt709"):
        Colour("bt2020")  # type: ignore[arg-type]
    assert backend == cext.BACKEND


def test_compiled_backends_exist_where_the_extension_is_built() -> None:
    """Without this a build that lost its kernels would pass everything by skipping."""
    assert cext.backends()[:2] == ("numpy", "c")


def test_without_the_extension_numpy_takes_over() -> None:
    script = (
        "import sys; sys.modules['cext._pixels'] = None\n"
        "import cext, numpy\n"
        "assert cext.backends() == ('numpy',) and cext.BACKEND == 'numpy'\n"
        "image = numpy.ones((2, 2, 3), numpy.float32)\n"
        "planes = cext.planes_from_buffer(bytearray(6), 2, 2)\n"
        "cext.image_to_i420(image, planes)\n"
        "assert bytes(planes.y.ravel()) == bytes([235]) * 4\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_other_threads_run_during_a_conversion(backend: str) -> None:
    """With a switch interval of minutes the other thread only gets the GIL where a conversion gives it up."""
    if backend == "numpy":
        pytest.skip("NumPy decides for itself")
    planes, images, kernels = _planes(640, 360), np.zeros((1, 360, 640, 3), np.float32), cext._pixels
    stop = threading.Event()
    conversions = 0

    def convert() -> None:
        nonlocal conversions
        while not stop.is_set() and conversions < 5000:
            # Not through the door: NumPy's overlap check there gives the GIL up too.
            kernels.from_images(images, [planes.arrays], Colour())
            kernels.to_images([planes.arrays], images, Colour())
            conversions += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(600)
    try:
        thread = threading.Thread(target=convert, name="convert")
        thread.start()
        stop.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert conversions < 5000


# ---- bytes, checked in C where everything is plain


@pytest.mark.parametrize("colour", COLOURS, ids=str)
@pytest.mark.parametrize(("width", "height"), [(2, 2), (16, 16), (33, 7), (854, 480), (1280, 97)])
def test_bytes_convert_as_pictures_do_and_touch_nothing_else(
    rng: np.random.Generator, width: int, height: int, colour: Colour
) -> None:
    size = cext.picture_bytes(width, height)
    source = rng.integers(0, 256, size, np.uint8).tobytes()
    ground = Yard((height, width, 3), np.float32, padding=3)
    with streaming(4096):
        cext.bytes_to_images([source], width, height, ground.array[np.newaxis], colour, cached=2048)
    ground.assert_only_inside()
    assert_image(ground.array, cext.planes_from_buffer(source, width, height), colour)
    image = random_image(rng, (height, width, 3), "float32")
    ground.array[...] = image
    memory = Yard((1, size), np.uint8, offset=1)
    cext.image_to_bytes(ground.array, memory.array[0], colour)
    memory.assert_only_inside()
    assert_levels(cext.planes_from_buffer(memory.array[0], width, height), image, colour)


@pytest.mark.parametrize("pixel_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_not_plain_takes_the_long_way(
    rng: np.random.Generator, pixel_format: PixelFormat, dtype: str
) -> None:
    width, height, size = 34, 6, cext.picture_bytes(34, 6, pixel_format)
    sources = [rng.integers(0, 256, size, np.uint8).tobytes() for _ in range(2)]
    images = np.zeros((2, height, width, 3), dtype)
    cext.bytes_to_images(sources, width, height, images, pixel_format=pixel_format)
    alpha = np.concatenate([images, np.ones((2, height, width, 1), dtype)], axis=3)
    for image, source in zip(alpha, sources, strict=True):
        assert_image(image[..., :3], cext.planes_from_buffer(source, width, height, pixel_format), Colour())
        out = bytearray(size)
        cext.image_to_bytes(image, out, pixel_format=pixel_format)
        picture = cext.planes_from_buffer(out, width, height, pixel_format)
        assert_levels(picture, image, Colour())


def test_unfit_bytes_are_refused_with_a_sentence() -> None:
    image, out = _zeros(4, 8, 3), np.full(48, CANARY, np.uint8)
    whole = np.zeros(8 * 4 * 3, np.float32)
    inside = whole.view(np.uint8)[16 : 16 + 48]
    read_only = _zeros(4, 8, 3)
    read_only.flags.writeable = False
    crooked = np.lib.stride_tricks.as_strided(np.zeros(400, np.float32), (4, 8, 3), (48, 12, 4))
    for arguments, sentence in [
        (([bytes(47)], 8, 4, image[np.newaxis]), "the buffer has 47 bytes, 8x4 i420 needs 48"),
        (([bytes(48)], 8, 4, read_only[np.newaxis]), "out is read-only"),
        (([bytes(48)], 8, 4, image), r"out is \(4, 8, 3\), it must be \(B, H, W, C\)"),
        (([bytes(48)], 8, 4, _zeros(1, 8, 4, 3)), r"out is \(8, 4, 3\), the picture needs \(4, 8, 3\)"),
        (([bytes(48)], 8, 4, crooked[np.newaxis]), "line size of 48 bytes, less than its rows are long"),
        (([inside], 8, 4, whole.reshape(1, 4, 8, 3)), "out lies in the memory of a picture"),
        (([bytes(48)], 8, 0, image[np.newaxis]), "8x0, a picture has at least one pixel"),
        (([bytes(48)], 1 << 31, 1 << 31, image[np.newaxis]), "the buffer has 48 bytes"),
        ((["text"], 8, 4, image[np.newaxis]), "no contiguous bytes"),
        (([], 8, 4, image[np.newaxis]), "1 images for 0 pictures"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            cext.bytes_to_images(*arguments)  # type: ignore[arg-type]
    for arguments, sentence in [
        ((image, out[:47]), "the buffer has 47 bytes, 8x4 i420 needs 48"),
        ((image, bytes(48)), "read-only"),
        ((image.astype(np.float64), out), "image holds float64"),
        ((image[:, ::2], out), "gaps between the values of a row"),
        ((whole.reshape(4, 8, 3), inside), "lies in the memory of the image"),
        ((None, out), "image"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            cext.image_to_bytes(*arguments)  # type: ignore[arg-type]
    assert (out == CANARY).all()


@pytest.mark.parametrize("way", ["to_images", "to_bytes"])
@pytest.mark.parametrize("let_go", ["bytes", "image"])
def test_memory_is_held_while_the_interpreter_is_not(backend: str, way: str, let_go: str) -> None:
    """Let go of in the middle of a conversion it could be unmapped, or move."""
    if backend == "numpy":
        pytest.skip("NumPy decides for itself")
    width, height = 1280, 720
    planes, images = bytearray(cext.picture_bytes(width, height)), np.zeros((1, height, width, 3), np.float32)
    stop, views = threading.Event(), [memoryview(b"")]

    def convert() -> None:
        while not stop.is_set():
            image = images if way == "to_images" else images[0]
            taken = {"bytes": memoryview(planes), "image": memoryview(image)}
            views[0] = taken[let_go]
            with contextlib.suppress(ValueError):  # it was let go of before the conversion began
                if way == "to_images":
                    cext.bytes_to_images([taken["bytes"]], width, height, taken["image"])
                else:
                    cext.image_to_bytes(taken["image"], taken["bytes"])

    thread = threading.Thread(target=convert, name="convert")
    thread.start()
    try:
        for _ in range(2000):
            thread.join(0.0005)  # it goes on meanwhile
            try:
                views[0].release()
            except BufferError:
                return
        pytest.fail("nothing held the memory")
    finally:
        stop.set()
        thread.join()
