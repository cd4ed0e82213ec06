"""The plan by itself: which graphs it holds, what it lets go of, what it says of the others."""

import asyncio
import gc
import weakref

import pytest
import torch

import cext
from engine.comfy_backend import ComfyBackend, ComfyGraph
from engine.config import read
from engine.graph.plan_limits import obstacle
from engine.graph.runner import NodeFailed, TickInput
from engine.graph.workflow import WorkflowError
from engine.wire import VideoFormat
from tests.fakes import nodes as fakes

from .conftest import graph, picture, shown
from .lives import changed, node

CHAIN = graph(
    still=("StaticColour", {"level": 0.5}),
    mix=("Average", {"one": ["live", 0], "other": ["still", 0]}),
    save=("SaveTensor", {"images": ["mix", 0]}),
)


@pytest.fixture
def lab(host):
    from .graph_nodes import CLASSES
    from .special_nodes import CLASSES as SPECIAL

    assert not host.add_nodes({**CLASSES, **SPECIAL})
    fakes.runs.clear()
    fakes.Fails.error = None
    return host


@pytest.fixture
def limit(lab):
    """Adds a class to a graph and returns why the plan cannot hold it."""

    def ask(name, node_class, **inputs):
        assert not lab.add_nodes({name: node_class})
        prompt = graph(it=(name, inputs), save=("SaveTensor", {"images": ["live", 0]}))
        return obstacle(lab.parts, prompt)

    return ask


def v3(name, inputs=(), **extra):
    from comfy_api.latest import io

    class Made(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=name, category="fakes", inputs=list(inputs), outputs=[io.Image.Output()], **extra
            )

        @classmethod
        def execute(cls, **values):
            return io.NodeOutput(None)

    return Made


def test_a_graph_of_plain_nodes_is_held(lab):
    runner = lab.new_runner()
    runner.load(CHAIN)
    assert [shown(runner, level) for level in (0.0, 1.0)] == [0.25, 0.75]
    assert (runner.name, runner.reason) == ("plan", "every node of this graph can be called directly")


def test_hidden_inputs_of_the_executor(limit):
    class Looks(fakes.Average):
        @classmethod
        def INPUT_TYPES(cls):
            return {**fakes.Average.INPUT_TYPES(), "hidden": {"prompt": "DYNPROMPT"}}

    class Lists(fakes.Average):
        @classmethod
        def INPUT_TYPES(cls):
            return {**fakes.Average.INPUT_TYPES(), "hidden": {"todo": "EXECUTION_LIST"}}

    assert limit("Looks", Looks) == "node it (Looks) asks for the hidden input DYNPROMPT"
    assert limit("Lists", Lists) == "node it (Lists) asks for the hidden input EXECUTION_LIST"


def test_v3_classes_that_the_executor_has_to_run(limit):
    from comfy_api.latest import _io as io

    assert limit("Plain3", v3("Plain3", [io.Image.Input("image")])) == ""
    assert "may expand" in limit("Grows3", v3("Grows3", enable_expand=True))
    assert "DYNPROMPT" in limit("Looks3", v3("Looks3", hidden=[io.Hidden.dynprompt]))
    template = io.MatchType.Template("t", [io.Image])
    dynamic = io.MatchType.Input("any", template)
    assert limit("Matches3", v3("Matches3", [dynamic])) == "node it (Matches3) has the dynamic input any"
    hooked = v3("Hooked3")
    hooked.PREPARE_CLASS_CLONE = classmethod(lambda cls, hidden: cls)
    assert limit("Hooked3", hooked) == "node it (Hooked3) overrides PREPARE_CLASS_CLONE"


def test_a_loop_of_a_later_comfyui(lab):
    prompt = graph(save=("SaveTensor", {"images": ["live", 0]}))
    prompt["live"]["_loop_body"] = ["save"]
    assert obstacle(lab.parts, prompt) == "node live (LoadTensor) is part of a loop"


def test_an_unknown_version_runs_through_its_executor(lab, monkeypatch):
    monkeypatch.setattr(lab.parts, "version", "0.99.0")
    runner = lab.new_runner()
    runner.load(CHAIN)
    assert shown(runner, 1.0) == 0.75
    assert runner.name == "executor"
    assert "ComfyUI 0.99.0 is none of those" in runner.reason


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("execution", None, "get_output_data"),
        ("execution", None, "map_node_over_list"),
        ("execution", "PromptExecutor", "execute_async"),
        ("comfy_execution.graph", "ExecutionList", "ux_friendly_pick_node"),
        ("comfy_api.internal", None, "make_locked_method_func"),
    ],
)
def test_a_pack_that_changes_the_executor_gets_the_executor(lab, monkeypatch, module, owner, name):
    import importlib

    place = importlib.import_module(module)
    monkeypatch.setattr(getattr(place, owner) if owner else place, name, lambda *args, **kwargs: None)
    whole = f"{owner}.{name}" if owner else name
    assert obstacle(lab.parts, CHAIN) == f"a node pack replaced {whole} of ComfyUI's executor"


def test_forcing_the_plan_on_what_it_cannot_hold_is_refused_with_the_reason(lab):
    runner = lab.new_runner("plan")
    runner.load(CHAIN)
    looks = {**CHAIN, "more": node("Grows3", mark=0)}
    lab.add_nodes({"Grows3": v3("Grows3", enable_expand=True)})
    for take in (runner.update, runner.load):
        with pytest.raises(WorkflowError, match="may expand into other nodes") as caught:
            take(looks)
        assert [item.code for item in caught.value.findings] == ["plan_refused"]
    assert shown(runner, 1.0) == 0.75, "the running prompt stays"


def test_forcing_the_plan_on_a_node_that_expands_fails_the_frame(lab):
    runner = lab.new_runner("plan")
    expands = ("Expands", {"image": ["live", 0], "level": 0.5})
    runner.load(graph(e=expands, save=("SaveTensor", {"images": ["e", 0]})))
    with pytest.raises(NodeFailed, match="expands into other nodes") as caught:
        runner.tick(TickInput(picture(0.5)))
    assert (caught.value.node_id, caught.value.exception) == ("e", "NeedsExecutor")


def test_the_executor_can_be_forced(lab):
    runner = lab.new_runner("executor")
    runner.load(CHAIN)
    assert shown(runner, 1.0) == 0.75
    assert (runner.name, runner.reason) == ("executor", "ComfyUI's executor")


@pytest.mark.parametrize(("setting", "name"), [("auto", "plan"), ("plan", "plan"), ("executor", "executor")])
def test_the_setting_reaches_the_session(lab, setting, name):
    backend = ComfyBackend(read(["--runner", setting], {"COMFYUI_DIR": str(lab.directory)}))
    backend._host = lab
    building = backend.build(CHAIN, VideoFormat(8, 8), lambda stage: None)
    with pytest.raises(StopIteration) as done:
        while True:
            next(building)
    assert done.value.value.runner == name
    done.value.value.close()


def test_an_update_that_the_plan_cannot_hold_moves_to_the_executor_with_its_instances(lab):
    prompt = graph(
        count=("Counting", {"image": ["live", 0]}),
        save=("SaveTensor", {"images": ["count", 0]}),
        text=("SaveTextTensor", {"data": ["count", 1]}),
    )
    runner = lab.new_runner()
    runner.load(prompt)
    texts = [runner.tick(TickInput(picture(0.5))).texts for _ in range(2)]
    lab.add_nodes({"Grows3": v3("Grows3", enable_expand=True)})
    runner.update({**prompt, "more": node("Grows3")})
    texts += [runner.tick(TickInput(picture(0.5))).texts for _ in range(2)]
    assert [number for ((_, number),) in texts] == ["1", "2", "3", "4"]
    assert runner.name == "executor"
    assert runner.reason.endswith("node more (Grows3) may expand into other nodes")
    runner.update(prompt)
    assert runner.tick(TickInput(picture(0.5))).texts == [("text", "5")]
    assert runner.name == "executor", "it stays there: no node instance changes hands twice"
    runner.load(prompt)
    assert runner.name == "plan"


def test_what_describes_a_session_follows_the_runner(lab):
    expands = ("DiffExpand", {"a": ["level", 0], "above": 0.5, "mark": 0})
    level = ("DiffLevel", {"image": ["live", 0], "mark": 0})
    prompt = graph(
        level=level, e=expands, c=("DiffCatch", {"value": ["e", 0], "mark": 0}),
        save=("SaveTensor", {"images": ["live", 0]}),
    )  # fmt: skip
    graph_of = ComfyGraph(lab.new_runner(), prompt, VideoFormat(8, 8))
    from engine.backend import FrameIn

    dark, bright = (bytes([value]) * cext.picture_bytes(8, 8) for value in (20, 220))
    graph_of.run(prompt, [FrameIn(0, 0, dark)])
    assert graph_of.runner == "plan"
    graph_of.run(prompt, [FrameIn(1, 0, bright)])
    assert graph_of.runner == "executor"
    assert graph_of.runner_reason == "ComfyUI's executor; node e (DiffExpand) expands into other nodes"
    graph_of.close()


def test_outputs_of_live_nodes_are_let_go_of_as_soon_as_nobody_needs_them(lab):
    alive = []
    made = []

    class Watches(fakes.Average):
        def run(self, one, other):
            gc.collect()
            alive.append([reference() is not None for reference in made])
            out = one * 0.5 + other * 0.5
            made.append(weakref.ref(out))
            return (out,)

    lab.add_nodes({"Watches": Watches})
    runner = lab.new_runner("plan")
    runner.load(
        graph(
            still=("StaticColour", {"level": 0.5}),
            a=("Watches", {"one": ["live", 0], "other": ["still", 0]}),
            b=("Watches", {"one": ["a", 0], "other": ["still", 0]}),
            c=("Watches", {"one": ["b", 0], "other": ["b", 0]}),
            save=("SaveTensor", {"images": ["c", 0]}),
        )
    )
    tick = TickInput(picture(0.5))
    runner.tick(tick)
    assert alive == [[], [True], [False, True]], "a is gone when c runs, b is not"
    gc.collect()
    assert [reference() is not None for reference in made] == [False] * 3
    runner.tick(tick)
    assert fakes.runs["StaticColour"] == 1, "a static output stays"


@pytest.mark.parametrize("choice", ["executor", "plan", "auto"])
def test_a_static_node_can_run_before_the_first_frame(lab, choice):
    runner = lab.new_runner(choice)
    runner.load(CHAIN)
    runner.prepare("still")
    assert fakes.runs == {"StaticColour": 1}
    assert [shown(runner, level) for level in (0.0, 1.0)] == [0.25, 0.75]
    assert fakes.runs == {"StaticColour": 1, "Average": 2}


def test_an_expansion_before_the_first_frame_moves_to_the_executor(lab):
    prompt = graph(
        still=("StaticColour", {"level": 0.5}),
        e=("Expands", {"image": ["still", 0], "level": 0.5}),
        save=("SaveTensor", {"images": ["e", 0]}),
    )
    runner = lab.new_runner()
    runner.load(prompt)
    runner.prepare("e")
    assert runner.name == "executor"
    assert fakes.runs["Expands"] == 2
    assert shown(runner, 0.0) == 0.5
    assert fakes.runs["Expands"] == 2


def test_a_lazy_input_that_was_not_asked_for_is_none_even_if_its_source_ran(lab):
    seen = []

    class Peeks(fakes.Average):
        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"one": ("IMAGE",), "other": ("IMAGE", {"lazy": True})}}

        def check_lazy_status(self, one, other):
            return []

        def run(self, one, other):
            seen.append(other)
            return (one,)

    lab.add_nodes({"Peeks": Peeks})
    runner = lab.new_runner("plan")
    still = ("StaticColour", {"level": 0.5})
    runner.load(
        graph(
            still=still,
            mix=("Average", {"one": ["live", 0], "other": ["still", 0]}),
            peeks=("Peeks", {"one": ["mix", 0], "other": ["still", 0]}),
            save=("SaveTensor", {"images": ["peeks", 0]}),
        )
    )
    assert [shown(runner, 0.5) for _ in range(2)] == [0.5, 0.5]
    assert seen == [None, None]


def test_no_coroutine_outlives_its_frame(lab):
    level = ("DiffLevel", {"image": ["live", 0], "mark": 0})
    slow = ("DiffLater", {"a": ["level", 0], "turns": 10**9, "above": 9.0, "mark": 1})
    fails = ("DiffLater", {"a": ["level", 0], "turns": 2, "above": 0.1, "mark": 2})
    runner = lab.new_runner("plan")
    runner.load(
        graph(
            level=level, slow=slow, fails=fails,
            s=("DiffCatch", {"value": ["slow", 0], "mark": 0}), f=("DiffCatch", {"value": ["fails", 0], "mark": 1}),
        )
    )  # fmt: skip
    with pytest.raises(NodeFailed, match="too late"):
        runner.tick(TickInput(picture(0.5)))
    assert asyncio.all_tasks(lab.parts.loop) == set()


def test_a_graph_without_coroutines_needs_no_loop(lab, monkeypatch):
    runner = lab.new_runner("plan")
    runner.load(CHAIN)
    monkeypatch.setattr(lab.parts, "loop", None)
    assert shown(runner, 1.0) == 0.75


def test_the_frames_of_a_live_graph_leave_no_garbage_that_needs_the_collector(lab):
    runner = lab.new_runner("plan")
    runner.load(CHAIN)
    shown(runner, 0.5)
    gc.collect()
    gc.disable()
    try:
        for number in range(200):
            runner.tick(TickInput(picture(0.5), number))
        assert gc.collect() < 50
    finally:
        gc.enable()


def test_a_refused_update_keeps_the_plan(lab):
    runner = lab.new_runner()
    runner.load(CHAIN)
    with pytest.raises(WorkflowError):
        runner.update(changed(CHAIN, still={"level": 7.0}))
    assert shown(runner, 1.0) == 0.75


def test_nodes_run_in_inference_mode(lab):
    seen = []

    class Asks(fakes.StaticColour):
        def run(self, level):
            seen.append(torch.is_inference_mode_enabled())
            return super().run(level)

    lab.add_nodes({"Asks": Asks})
    runner = lab.new_runner("plan")
    runner.load(graph(still=("Asks", {"level": 0.5}), save=("SaveTensor", {"images": ["still", 0]})))
    assert shown(runner, 0.0) == 0.5
    assert seen == [True]


def test_an_observer_hears_of_each_node_that_runs_and_of_no_other(lab):
    runner = lab.new_runner()
    runner.load(CHAIN)
    shown(runner, 0.0)  # what is still has run
    heard = []
    runner.observer = lambda *node: heard.append(node)
    shown(runner, 1.0)
    assert [(node_id, class_type) for node_id, class_type, _ in heard] == [
        ("live", "LoadTensor"),
        ("mix", "Average"),
        ("save", "SaveTensor"),
    ]
    assert all(0 < seconds < 1 for _, _, seconds in heard)
    runner.observer = None
    shown(runner, 0.5)
    assert len(heard) == 3


def test_an_observer_hears_of_plain_nodes_beside_coroutines(lab):
    level = ("DiffLevel", {"image": ["live", 0], "mark": 0})
    later = ("DiffLater", {"a": ["level", 0], "turns": 2, "above": 9.0, "mark": 1})
    runner = lab.new_runner("plan")
    runner.load(graph(level=level, later=later, catch=("DiffCatch", {"value": ["later", 0], "mark": 0})))
    heard = []
    runner.observer = lambda node_id, *_: heard.append(node_id)
    runner.tick(TickInput(picture(0.5)))
    assert set(heard) == {"live", "level", "catch"}
