"""Frames that wait together may run as one batch (OpenSession.max_batch): each gets what it would get alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from engine.backend import FrameIn, Graph, PictureOut
from engine.builder import _advance
from engine.comfy_backend import ComfyBackend
from engine.config import Choice, Settings
from engine.graph.comfy import ComfyHost
from engine.graph.rows import ROWS_APART, rows_apart
from engine.graph.workflow import Prompt, read
from engine.parameters import Revision
from engine.run import Run
from engine.run_clock import RunClock
from engine.shared_run import run_together
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
    assert len({bytes(picture.planes) for picture in pictures if picture is not None}) == 1
    assert None not in pictures


def sharing(host: ComfyHost) -> ComfyBackend:
    backend = ComfyBackend(Settings(address="unix:none", runner="plan", share_batches=True))
    backend._host = host
    return backend


@contextmanager
def several(backend: ComfyBackend, prompt: Prompt, count: int) -> Iterator[list[Graph]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(built(backend, prompt))) for _ in range(count)]


def check_shared_run(graphs: Sequence[Graph], prompt: Prompt) -> None:
    """All graphs but the last run a frame each in one run; the last gives what each of these frames gets alone."""
    *together, separate = graphs
    ones = [frames(10 * number, 1) for number in range(len(together))]
    runs = [
        Run(Revision(1, prompt, graph), one, [0], RunClock(0.0)) for graph, one in zip(together, ones, strict=True)
    ]
    for result, one in zip(run_together(runs), ones, strict=True):
        assert not isinstance(result, Exception)
        assert result.pictures == alone(separate, prompt, one)


@pytest.mark.parametrize("name", APART)
def test_sessions_that_share_a_run_get_what_each_gets_alone(name: str, host: ComfyHost) -> None:
    prompt = example(name, host)
    with several(sharing(host), prompt, 4) as graphs:
        if not graphs[0].shares:
            pytest.skip("has a node that is not known to be safe")
        check_shared_run(graphs, prompt)


def test_every_class_that_shares_is_in_an_example_that_does(host: ComfyHost) -> None:
    prompts = [example(name, host) for name in APART]
    shown = {node["class_type"] for prompt in prompts if rows_apart(prompt) for node in prompt.values()}
    assert shown >= ROWS_APART
    assert sum(map(rows_apart, prompts)) >= 10


@pytest.mark.parametrize("name", ["grain", "banner"])
def test_random_numbers_and_texts_are_not_shared(name: str, host: ComfyHost) -> None:
    assert not rows_apart(example(name, host))


def test_graph_that_puts_a_batch_into_one_picture_runs_once_a_session(host: ComfyHost) -> None:
    prompt = graph(
        colour=("EmptyImage", {"width": 64, "height": 48, "batch_size": 1, "color": 0}),
        over=("ImageCompositeMasked", {"destination": ["colour", 0], "source": ["live", 0], "x": 0, "y": 0,
                                       "resize_source": False}),
        out=("SaveTensor", {"images": ["over", 0]}),
    )  # fmt: skip
    assert rows_apart(prompt)
    with several(sharing(host), prompt, 3) as graphs:
        check_shared_run(graphs, prompt)


def test_nothing_is_shared_unless_the_operator_says_so(host: ComfyHost) -> None:
    backend = ComfyBackend(Settings(address="unix:none"))
    backend._host = host
    made = built(backend, prompt := example("mirror", host))
    assert rows_apart(prompt)
    assert not made.shares
    made.close()
