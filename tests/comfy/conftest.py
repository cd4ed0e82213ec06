"""The real ComfyUI, booted once per test process. Without one these tests skip; where it must be there, they fail."""

import os
from collections.abc import Iterator

import pytest
import torch

from engine.config import read
from engine.graph.comfy import ComfyHost
from engine.graph.runner import Runner, TickInput, TickOutput
from tests.fakes import nodes as fakes

pytest.register_assert_rewrite("tests.comfy.lives")


@pytest.fixture
def host() -> Iterator[ComfyHost]:
    """On this thread, even if another test had it on its own meanwhile; boots with the first test that asks.

    Node classes that a test adds go with it.
    """
    directory = read().comfyui_dir
    if directory is None:
        reason = "there is no ComfyUI: run `make comfyui` or set COMFYUI_DIR"
        if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    host = ComfyHost.load(directory)
    classes, definitions = dict(host.classes), dict(host.definitions)
    assert not host.add_nodes(fakes.CLASSES)
    yield host
    host.classes.clear()
    host.classes.update(classes)
    host.definitions = definitions


@pytest.fixture(params=["executor", "plan", "auto"])
def runner(host: ComfyHost, request: pytest.FixtureRequest) -> Iterator[Runner]:
    fakes.runs.clear()
    fakes.Fails.error = None
    runner = host.new_runner(request.param)
    yield runner
    runner.close()


def picture(level: float, size: int = 8) -> torch.Tensor:
    return torch.full((1, size, size, 3), level)


def tick(runner: Runner, level: float) -> TickOutput:
    return runner.tick(TickInput(picture(level)))


def shown(runner: Runner, level: float) -> float:
    """The level of the picture that comes out for a grey one that goes in."""
    images = tick(runner, level).images
    assert images is not None
    assert images.min() == images.max()
    return round(float(images.max()), 4)


def graph(**nodes: tuple[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """``graph(a=("Class", {...}))`` with a live input ``live`` and whatever else is given."""
    return {
        "live": {"class_type": "LoadTensor", "inputs": {}},
        **{name: {"class_type": class_type, "inputs": inputs} for name, (class_type, inputs) in nodes.items()},
    }
