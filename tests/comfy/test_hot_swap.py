"""A graph in the making, step by step, with the real ComfyUI: what runs where, and how often."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.backend import Aside, FrameIn, Graph, GraphFailed, Stage
from engine.builder import _advance
from engine.comfy_backend import ComfyBackend
from engine.config import Settings
from engine.graph.comfy import ComfyHost
from engine.graph.executor_runner import ExecutorRunner
from engine.graph.runner import TickInput
from engine.graph.side_loading import Shelf
from engine.graph.workflow import Prompt
from engine.wire import VideoFormat
from tests.comfy.conftest import graph, picture
from tests.fakes import nodes as fakes

VIDEO = VideoFormat(64, 64)
#: The one VAE that needs no file.
VAE = ("VAELoader", {"vae_name": "pixel_space"})


def workflow() -> Prompt:
    return graph(
        vae=VAE,
        colour=("StaticColour", {"level": 0.5}),
        mixed=("Average", {"one": ["live", 0], "other": ["scaled", 0]}),
        scaled=("ImageScale", {"image": ["colour", 0], "upscale_method": "area", "width": 64, "height": 64,
                               "crop": "disabled"}),
        latent=("VAEEncode", {"pixels": ["mixed", 0], "vae": ["vae", 0]}),
        decoded=("VAEDecode", {"samples": ["latent", 0], "vae": ["vae", 0]}),
        out=("SaveTensor", {"images": ["decoded", 0]}),
    )  # fmt: skip


@pytest.fixture
def backend(host: ComfyHost) -> ComfyBackend:
    fakes.runs.clear()
    backend = ComfyBackend(Settings(address="unix:none", warm_up_frames=2))
    backend._host = host
    return backend


def on_a_thread(aside: Aside) -> Exception | None:
    """Do it on another thread; gives what it raised."""
    failed: list[Exception] = []

    def call() -> None:
        try:
            aside.call()
        except Exception as exc:
            failed.append(exc)

    thread = threading.Thread(target=call, name="loader")
    thread.start()
    thread.join()
    return failed[0] if failed else None


def built(backend: ComfyBackend, prompt: Prompt) -> tuple[Graph, list[str], list[Stage]]:
    """The graph, its steps ("aside" or "step") and what was reported; as the engine's builder does it."""
    stages: list[Stage] = []
    steps: list[str] = []
    building = backend.build(prompt, VIDEO, stages.append)
    error: Exception | None = None
    while True:
        step = _advance(building, error)
        if not isinstance(step, Aside | None):
            return step, steps, stages
        steps.append("step" if step is None else "aside")
        error = on_a_thread(step) if step is not None else None


def test_models_load_aside_and_every_static_node_is_a_step_of_its_own(backend: ComfyBackend) -> None:
    graph, steps, stages = built(backend, workflow())
    try:
        assert steps.count("aside") == 1
        assert steps.count("step") == 1 + 3 + 2, "the plan, three static nodes, two frames"
        assert fakes.runs["StaticColour"] == 1
        loading = [stage for stage in stages if stage.name == "loading"]
        assert [(stage.node_id, stage.done, stage.total) for stage in loading] == [("vae", 1, 1)]
        assert [stage.done for stage in stages if stage.message.startswith("frame")] == [1, 2]
        result = graph.run(workflow(), [FrameIn(5, 0, bytes([128]) * VIDEO.frame_bytes)])
        assert result.pictures[0] is not None
        assert fakes.runs["StaticColour"] == 1
    finally:
        graph.close()


def test_loaded_model_is_taken_once(host: ComfyHost) -> None:
    node_class = host._nodes.NODE_CLASS_MAPPINGS[VAE[0]]
    shelf: Shelf = {}
    load = host.side_loading.call_for(*VAE, shelf)
    assert load is not None
    on_a_thread(Aside(load))
    ((waiting,),) = shelf.values()
    with host.side_loading.taking_from(shelf):
        given = getattr(node_class(), node_class.FUNCTION)(**VAE[1])
        assert given is waiting, "the node took what was loaded aside"
        assert getattr(node_class(), node_class.FUNCTION)(**VAE[1]) is not waiting, "and the next one loads its own"


def test_two_builds_of_one_workflow_load_nothing_on_comfyuis_thread(
    backend: ComfyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    side_loading = backend._loaded.side_loading
    loaders = backend._loaded._nodes.NODE_CLASS_MAPPINGS[VAE[0]]
    side_loading.call_for(*VAE, {})
    original = side_loading._methods[VAE[0]]
    threads: list[str] = []

    def counted(self: object, **inputs: object) -> object:
        threads.append(threading.current_thread().name)
        return original(self, **inputs)

    monkeypatch.delitem(side_loading._methods, VAE[0])
    monkeypatch.setattr(loaders, loaders.FUNCTION, counted)
    graphs: list[Graph] = []
    buildings = [backend.build(workflow(), VIDEO, lambda _: None) for _ in range(2)]
    while buildings:  # in turn, a step each
        for building in list(buildings):
            step = _advance(building, None)
            if isinstance(step, Aside):
                on_a_thread(step)
            elif step is not None:
                graphs.append(step)
                buildings.remove(building)
    for each in graphs:
        each.close()
    assert threads == ["loader"] * 2


def test_only_loaders_of_comfyui_itself_go_aside(host: ComfyHost) -> None:
    assert host.side_loading.call_for("StaticColour", {"level": 0.5}, {}) is None
    assert host.side_loading.call_for("ImageScale", {"image": ["colour", 0]}, {}) is None


def test_load_that_fails_aside_fails_where_it_has_a_name(
    backend: ComfyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = backend._loaded._nodes.NODE_CLASS_MAPPINGS[VAE[0]]
    backend._loaded.side_loading.call_for(*VAE, {})

    def fails(self: object, **inputs: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setitem(backend._loaded.side_loading._methods, VAE[0], fails)
    monkeypatch.setattr(loaders, loaders.FUNCTION, fails)
    with pytest.raises(GraphFailed) as caught:
        built(backend, workflow())
    assert (caught.value.code, caught.value.node_id) == ("out_of_memory", "vae")


def test_prepared_node_is_not_run_again(runner: ExecutorRunner) -> None:
    prompt = workflow()
    runner.load(prompt)
    runner.prepare("colour")
    assert fakes.runs["StaticColour"] == 1
    tick_at(runner)
    tick_at(runner)
    assert fakes.runs == {"StaticColour": 1, "Average": 2}


def tick_at(runner: ExecutorRunner) -> None:
    assert runner.tick(TickInput(picture(0.5, 64))).images is not None


def test_memory_management_stays_one_threads(host: ComfyHost) -> None:
    management = host._management
    assert all(hasattr(getattr(management, name), "__wrapped__") for name in ("load_models_gpu", "free_memory"))
    assert management.loaded_models() is not None


def test_models_are_unloaded_where_pictures_find_no_memory(host: ComfyHost, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(host._management, "soft_empty_cache", lambda: emptied.append(True))
    host.free_memory()
    assert not host._management.loaded_models()
    assert emptied
