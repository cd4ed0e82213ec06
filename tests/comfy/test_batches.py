"""Frames that wait together may run as one batch (OpenSession.max_batch): each gets what it would get alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.backend import FrameIn, Graph, PictureOut
from engine.builder import _advance
from engine.comfy_backend import ComfyBackend
from engine.config import Choice, Settings
from engine.graph.comfy import ComfyHost
from engine.graph.workflow import Prompt, read
from engine.wire import VideoFormat
from tests.comfy.conftest import graph

EXAMPLES = Path(__file__).parents[2] / "examples" / "workflows"
VIDEO = VideoFormat(64, 48)
BATCH = 4

#: All with pictures alone and no random numbers: the rows of a batch of noise differ by intent.
APART = sorted(path.stem for path in EXAMPLES.glob("*.json") if path.stem != "grain")


@pytest.fixture(params=["plan", "executor"])
def backend(host: ComfyHost, request: pytest.FixtureRequest) -> ComfyBackend:
    choice: Choice = request.param
    backend = ComfyBackend(Settings(address="unix:none", runner=choice))
    backend._host = host
    return backend


def built(backend: ComfyBackend, prompt: Prompt) -> Graph:
    building = backend.build(prompt, VIDEO, lambda stage: None)
    while not hasattr(step := _advance(building, None), "run"):
        assert step is None, "nothing to load"
    return step  # type: ignore[return-value]


def example(name: str, host: ComfyHost) -> Prompt:
    prompt = read(
        json.loads((EXAMPLES / f"{name}.json").read_text()), max_nodes=512, definitions=host.definitions
    ).prompt
    assert prompt is not None
    return prompt


def frames(first: int = 0, count: int = BATCH) -> list[FrameIn]:
    """Different ones."""
    random = np.random.default_rng(first)
    size = VIDEO.frame_bytes
    return [
        FrameIn(first + number, first + number, random.integers(16, 236, size, dtype=np.uint8).tobytes())
        for number in range(count)
    ]


def alone(graph: Graph, prompt: Prompt, batch: Sequence[FrameIn]) -> list[PictureOut | None]:
    return [graph.run(prompt, [frame]).pictures[0] for frame in batch]


@pytest.mark.parametrize("name", APART)
def test_batch_gives_each_frame_what_it_gets_alone(name: str, host: ComfyHost, backend: ComfyBackend) -> None:
    prompt = example(name, host)
    together, separate = built(backend, prompt), built(backend, prompt)
    try:
        for first, count in ((0, 4), (10, 1), (20, 3), (30, 4)):  # as many as happen to wait
            batch = frames(first, count)
            pictures = together.run(prompt, batch).pictures
            assert pictures == alone(separate, prompt, batch)
            assert len(pictures) == count
    finally:
        together.close()
        separate.close()


def test_graph_that_gives_fewer_pictures_gives_none_for_the_rest(backend: ComfyBackend) -> None:
    prompt = graph(
        first=("ImageFromBatch", {"image": ["live", 0], "batch_index": 0, "length": 2}),
        out=("SaveTensor", {"images": ["first", 0]}),
    )
    made = built(backend, prompt)
    try:
        pictures = made.run(prompt, frames()).pictures
    finally:
        made.close()
    assert [picture is None for picture in pictures] == [False, False, True, True]


def test_picture_made_of_no_frame_stands_for_all_of_a_batch(backend: ComfyBackend) -> None:
    prompt = graph(
        colour=("EmptyImage", {"width": 16, "height": 16, "batch_size": 1, "color": 0x808080}),
        out=("SaveTensor", {"images": ["colour", 0]}),
    )
    del prompt["live"]
    made = built(backend, prompt)
    try:
        pictures = made.run(prompt, frames()).pictures
    finally:
        made.close()
    assert len(pictures) == BATCH
    assert len({picture.planes for picture in pictures if picture is not None}) == 1
    assert None not in pictures
