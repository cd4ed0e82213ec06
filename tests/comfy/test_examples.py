"""The shipped workflows on the real nodes: they run on real frames, and their live parameter can be seen."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import cext
from engine.comfy_backend import default_threads
from engine.graph.overrides import apply
from engine.graph.runner import TickInput
from engine.graph.tensors import Converter
from engine.graph.workflow import Workflow, parse
from gateway_shim.localnet.assets import NoAsset, find_clip

DIRECTORY = Path(__file__).parents[2] / "examples" / "workflows"
WIDTH, HEIGHT = 640, 360
#: The parameter of each example that a viewer sees at once, and the value to set.
LIVE = {
    "banner": ("Place", "y", 20),
    "colour-split": ("Shift", "x", 60),
    "demo": ("Mix", "blend_factor", 1.0),
    "edges": ("Mix", "blend_factor", 1.0),
    "grain": ("Grain", "strength", 0.5),
    "green-key": ("Threshold", "value", 0.6),
    "mirror": ("Seam", "x", 0),
    "monochrome": ("Mix", "blend_factor", 0.0),
    "mosaic": ("Blocks", "width", 8),
    "pass-through": None,
    "picture-in-picture": ("Place", "x", 300),
    "silhouette": ("Threshold", "value", 0.9),
    "soft-glow": ("Glow", "blend_factor", 0.0),
    "tiles": ("Mirror", "flip_method", "x-axis: vertically"),
    "tilt-shift": ("Blur", "blur_radius", 20),
    "tint": ("Colour", "color", 0x2040FF),
    "vignette": ("Dark", "blend_factor", 0.0),
}


def example(name: str) -> Workflow:
    return parse((DIRECTORY / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def frames() -> list[NDArray[np.uint8]]:
    """Three pictures of the demo's clip, I420 planes as the decoder gives them."""
    try:
        clip = find_clip(None)
    except NoAsset as exc:
        reason = str(exc)
        pytest.fail(reason) if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1" else pytest.skip(reason)
    pictures = []
    with av.open(clip) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in (20, 60, 100):
                pictures.append(frame.reformat(WIDTH, HEIGHT, "yuv420p").to_ndarray().reshape(-1))
            if len(pictures) == 3:
                break
    return pictures


@pytest.fixture(autouse=True)
def threads_of_an_engine() -> Iterator[None]:
    """So that the times are those that a stream would see."""
    before = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    yield
    torch.set_num_threads(before)


def test_every_example_is_here_and_described():
    names = {path.stem for path in DIRECTORY.glob("*.json")}
    assert names == set(LIVE)
    assert len(names) >= 10
    page = (DIRECTORY / "README.md").read_text()
    assert re.findall(r"^\| \[([a-z-]+)\]\(([a-z-]+)\.json\) \|", page, re.MULTILINE) == [
        (name, name) for name in sorted(names)
    ]
    for name, live in LIVE.items():
        if live is not None:
            assert f"`{live[0]}.{live[1]}`" in page, name


@pytest.mark.parametrize("name", LIVE)
def test_every_node_of_an_example_has_a_title(name):
    titles = [node.get("_meta", {}).get("title") for node in example(name).prompt.values()]
    assert all(titles)
    assert len(set(titles)) == len(titles), "a title is a name for overrides only if it is unique"


@pytest.mark.parametrize("name", LIVE)
def test_example_changes_real_frames_and_its_parameter_shows(host, runner, frames, name, record_property):
    workflow = example(name)
    assert host.validate(workflow.prompt) == []
    runner.load(workflow.prompt)
    converter = Converter("i420", cext.Colour())

    def run(number: int) -> NDArray[np.float64]:
        images = converter.to_images([frames[number].tobytes()], WIDTH, HEIGHT)
        output = runner.tick(TickInput(images, number)).images
        assert output is not None
        (picture,) = converter.to_planes(output)
        assert (picture.width, picture.height) == (WIDTH, HEIGHT)
        return np.frombuffer(picture.planes, np.uint8).astype(float)

    run(0)
    times = []
    for number in range(len(frames)):
        began = time.perf_counter()
        shown = run(number)
        times.append(time.perf_counter() - began)
        difference = np.abs(shown - frames[number].astype(float)).mean()
        assert difference < 1.0 if LIVE[name] is None else difference > 1.0, "grey levels in the mean"
    record_property("ms", round(min(times) * 1000, 1))
    print(f"{name}: {min(times) * 1000:.1f} ms")
    if LIVE[name] is None:
        return
    title, field, value = LIVE[name]
    (node_id,) = [key for key, node in workflow.prompt.items() if node["_meta"]["title"] == title]
    runner.update(apply(workflow.prompt, {node_id: {field: value}}, host.definitions))
    change = np.abs(run(len(frames) - 1) - shown)
    assert change.mean() > 2.5, "grey levels in the mean of all planes: less is hard to see"


def test_the_banners_caption_goes_to_the_data_channel(host, runner):
    runner.load(example("banner").prompt)
    output = runner.tick(TickInput(torch.rand(1, HEIGHT, WIDTH, 3)))
    assert output.texts == [("8", "live: Big Buck Bunny")]
