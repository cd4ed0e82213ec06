"""Pictures to IMAGE and back: exact bytes, memory that comes back, and whatever nodes put out."""

import numpy as np
import pytest
import torch

import cext
from engine.graph.tensors import POOLED, Converter, NotAnImage, normalised


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def test_rgb_bytes_come_back_exactly():
    converter = Converter("rgb24")
    frames = [noise(3 * 34 * 18, seed) for seed in range(2)]
    images = converter.to_images(frames, 34, 18)
    assert images.shape == (2, 18, 34, 3)
    assert images.dtype is torch.float32
    assert [picture.planes for picture in converter.to_planes(images)] == frames


@pytest.mark.parametrize("pixel_format", ["i420", "nv12"])
@pytest.mark.parametrize("colour", [cext.Colour(), cext.Colour("bt709", full_range=True)])
def test_yuv_bytes_inside_the_rgb_cube_come_back_exactly(pixel_format, colour):
    """Every luma from dark to bright under weak chroma; levels outside the cube have no RGB to come back from."""
    width, height = 32, 16
    luma = np.linspace(60, 190, width * height).astype(np.uint8)
    chroma = np.random.default_rng(1).integers(120, 137, width * height // 2, np.uint8)
    frame = luma.tobytes() + chroma.tobytes()
    converter = Converter(pixel_format, colour)
    (picture,) = converter.to_planes(converter.to_images([frame], width, height))
    assert (picture.width, picture.height) == (width, height)
    assert picture.planes == frame


def test_a_frame_of_another_length_is_refused():
    with pytest.raises(ValueError, match="needs 1536"):
        Converter().to_images([bytes(1535)], 32, 32)


def test_memory_comes_back_once_nobody_has_a_view_of_it():
    converter = Converter("rgb24")
    frame = noise(3 * 16 * 16)
    images = converter.to_images([frame], 16, 16)
    address = images.data_ptr()
    view = images[0].permute(2, 0, 1).unbind()[1]
    del images
    assert converter.to_images([frame], 16, 16).data_ptr() != address
    del view
    assert address in [held.data_ptr() for held in [converter.to_images([frame], 16, 16) for _ in range(POOLED)]]


def test_pictures_that_are_kept_stay_as_they_are():
    """A graph may remember any number of frames; the pool must not write into them."""
    converter = Converter("rgb24")
    frames = [noise(3 * 16 * 16, seed) for seed in range(POOLED + 3)]
    kept = [converter.to_images([frame], 16, 16) for frame in frames]
    assert [converter.to_planes(images)[0].planes for images in kept] == frames
    assert len(converter._pool) == POOLED


def test_a_change_of_size_lets_the_old_memory_go():
    converter = Converter("rgb24")
    converter.to_images([noise(3 * 16 * 16)], 16, 16)
    converter.to_images([noise(3 * 8 * 8)], 8, 8)
    assert [array.shape for array in converter._pool] == [(1, 8, 8, 3)]


GREY = torch.full((1, 8, 8, 3), 0.5)


@pytest.mark.parametrize(
    "images",
    [
        GREY.to(torch.float16),
        GREY.to(torch.bfloat16),
        GREY.to(torch.float64),
        (GREY * 256).to(torch.uint8),
        torch.full((1, 8, 8, 1), 0.5),
        torch.cat([GREY, torch.zeros(1, 8, 8, 1)], 3),
        torch.full((1, 3, 8, 8), 0.5).movedim(1, -1),
        GREY.flip(2),
        torch.full((1, 9, 9, 3), 0.5),
        torch.full((1, 1, 1, 3), 0.5).expand(1, 8, 8, 3),
        GREY.clone().requires_grad_(),
    ],
    ids=["f16", "bf16", "f64", "u8", "grey", "alpha", "planar", "flipped", "odd", "one value", "grad"],
)
def test_whatever_nodes_give_becomes_a_picture(images):
    (picture,) = Converter("rgb24").to_planes(images)
    assert (picture.width, picture.height) == (8, 8)
    assert picture.planes == bytes([128]) * 192


def test_odd_sizes_lose_their_last_row_and_column():
    images = torch.zeros(1, 5, 7, 3)
    images[:, 4:] = images[:, :, 6:] = 1.0
    (picture,) = Converter("rgb24").to_planes(images)
    assert (picture.width, picture.height) == (6, 4)
    assert picture.planes == bytes(72)


def test_an_inference_tensor_and_values_out_of_range():
    with torch.inference_mode():
        images = torch.tensor([float("nan"), -1.0, 2.0]).repeat(1, 2, 2, 1)
    assert Converter("rgb24").to_planes(images)[0].planes == bytes([0, 0, 255]) * 4


def test_an_image_as_the_kernels_take_it_is_not_copied():
    images = torch.rand(2, 8, 8, 3)
    assert normalised(images).data_ptr() == images.data_ptr()
    assert normalised(images[:, 1:, 1:]).shape == (2, 6, 6, 3)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("picture", "gave str"),
        (torch.zeros(8, 8, 3), r"\(8, 8, 3\)"),
        (torch.zeros(1, 8, 8, 2), r"IMAGE is \(batch, height, width, 3\)"),
        (torch.zeros(0, 8, 8, 3), "at least 2 x 2"),
        (torch.zeros(1, 1, 8, 3), "at least 2 x 2"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.int64), "int64"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.complex64), "complex64"),
        (torch.zeros(1, 8, 8, 3, device="meta"), "IMAGE holds floats"),
        (torch.zeros(1, 1, 1, 3).expand(1, 8192, 8192, 3), "the limit is"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_sentence(value, words):
    with pytest.raises(NotAnImage, match=words):
        Converter().to_planes(value)
