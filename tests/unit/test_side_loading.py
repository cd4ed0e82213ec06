"""Models loaded aside, with a loader small enough to know by heart: who gets what, and where it was made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.graph.side_loading import Shelf, SideLoading

INPUTS = {"name": "a.safetensors"}


def loader() -> Any:
    """A class as those of ComfyUI's ``nodes``; ``loads`` counts them, and each gives its number."""

    class Loader:
        FUNCTION = "load"
        loads = 0

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"name": ("STRING",)}}

        def load(self, name: str) -> tuple[int]:
            Loader.loads += 1
            return (Loader.loads,)

    Loader.__module__ = "nodes"
    return Loader


@pytest.fixture
def node_class() -> Any:
    return loader()


@pytest.fixture
def side_loading(node_class: Any) -> SideLoading:
    return SideLoading({"Loader": node_class}, SimpleNamespace(), torch.device("cpu"))


def call(side_loading: SideLoading, shelf: Shelf) -> Callable[[], None]:
    load = side_loading.call_for("Loader", INPUTS, shelf)
    assert load is not None
    return load


def run(side_loading: SideLoading, node_class: Any, shelf: Shelf) -> int:
    with side_loading.taking_from(shelf):
        [number] = node_class().load(**INPUTS)
    return int(number)


def test_two_builds_of_one_workflow_take_what_each_has_loaded(side_loading: SideLoading, node_class: Any) -> None:
    one: Shelf = {}
    other: Shelf = {}
    call(side_loading, one)()
    call(side_loading, other)()
    one_got = run(side_loading, node_class, one)
    one.clear()  # its build is over
    assert (one_got, run(side_loading, node_class, other)) == (1, 2)
    assert node_class.loads == 2


def test_two_nodes_alike_take_one_result_each(side_loading: SideLoading, node_class: Any) -> None:
    shelf: Shelf = {}
    for _ in range(2):
        call(side_loading, shelf)()
    assert {run(side_loading, node_class, shelf) for _ in range(2)} == {1, 2}
    assert run(side_loading, node_class, shelf) == 3, "the third loads its own"


def test_a_running_session_takes_nothing_from_a_build(side_loading: SideLoading, node_class: Any) -> None:
    shelf: Shelf = {}
    call(side_loading, shelf)()
    assert node_class().load(**INPUTS) == (2,)
    assert run(side_loading, node_class, shelf) == 1


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", ["enter cuda:1", "load", "leave"]), ("cpu", ["load"])])
def test_a_model_is_loaded_for_the_device_of_the_graphs(
    monkeypatch: pytest.MonkeyPatch, node_class: Any, device: str, expected: list[str]
) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        log.append(f"enter {device}")
        yield
        log.append("leave")

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(node_class, "load", lambda self, name: log.append("load"))
    call(SideLoading({"Loader": node_class}, SimpleNamespace(), torch.device(device)), {})()
    assert log == expected
