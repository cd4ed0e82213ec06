"""Our cache keys against ComfyUI's own: the same pictures from the same nodes, in every tick of random lives."""

import random

import pytest

from engine.graph.runner import NodeFailed
from tests.fakes import nodes as fakes

from .conftest import graph, shown, tick


@pytest.fixture
def special(host):
    from .special_nodes import CLASSES

    assert not host.add_nodes(CLASSES)
    return CLASSES


@pytest.fixture
def stock(host):
    """A runner with ComfyUI's own keys."""
    runner = host.new_runner("stock")
    runner.load(graph(save=("SaveTensor", {"images": ["live", 0]})))
    assert "its own cache keys" in runner.reason
    yield runner
    runner.close()


def any_graph(pick: random.Random):
    """Every node differs from the others: ComfyUI runs two that are alike once, we run both."""
    sources = ["live", "still", "mix", "async", "expanded", "modern", "changed"]

    def one_of(*names: str) -> list[object]:
        return [pick.choice(names), 0]

    return graph(
        still=("StaticColour", {"level": pick.choice([0.0, 0.25])}),
        changed=("Changed", {}),
        mix=("Average", {"one": one_of("live", "still", "changed"), "other": one_of("live", "still")}),
        lazy=("Lazy", {"first": ["mix", 0], "second": ["changed", 0], "use_second": pick.random() < 0.3}),
        expanded=("Expands", {"image": one_of("live", "still", "mix"), "level": pick.choice([0.5, 0.75])}),
        modern=("Modern", {"image": one_of("still", "lazy"), "mark": pick.randrange(2), "mode": "double"}),
        **{"async": ("Async", {"image": one_of("modern", "still", "expanded")})},
        fails=("Fails", {"image": one_of("async", "live", *sources[:3])}),
        save=("SaveTensor", {"images": ["fails", 0]}),
        second=("SaveTensor", {"images": one_of(*sources)}),
    )


@pytest.mark.parametrize("runner", ["executor"], indirect=True)
@pytest.mark.parametrize("seed", range(20))
def test_random_lives_agree_with_comfyuis_own_keys(host, runner, stock, special, seed):
    pick = random.Random(seed)

    def life(subject, choices):
        fakes.runs.clear()
        for prompt, level, failing in choices:
            if prompt is not None:
                subject.update(prompt)
            fakes.Fails.error = ValueError("no good") if failing else None
            before = fakes.runs.copy()
            try:
                result = [shown(subject, level)]
            except NodeFailed as failed:
                result = [failed.node_id, failed.message]
            yield result, fakes.runs - before

    prompts = [any_graph(pick) for _ in range(4)]
    choices = [
        (pick.choice(prompts) if index == 0 or pick.random() < 0.5 else None, pick.random(), pick.random() < 0.2)
        for index in range(16)
    ]
    assert list(life(runner, choices)) == list(life(stock, choices))


def test_a_lazy_input_that_is_not_asked_for_does_not_run(host, runner, special):
    prompt = graph(
        still=("StaticColour", {"level": 0.25}),
        lazy=("Lazy", {"first": ["live", 0], "second": ["still", 0], "use_second": False}),
        save=("SaveTensor", {"images": ["lazy", 0]}),
    )
    runner.load(prompt)
    assert shown(runner, 0.5) == 0.5
    assert fakes.runs["StaticColour"] == 0
    prompt["lazy"]["inputs"]["use_second"] = True
    runner.update(prompt)
    assert shown(runner, 0.5) == 0.25


@pytest.mark.parametrize("used", [False, True], ids=["alone", "beside another input"])
def test_a_lazy_input_that_a_class_cannot_ask_for_is_what_comfyui_gives(host, runner, stock, special, used):
    """Nothing since 0.3.75, even where another node needed what is behind it."""
    prompt = graph(
        still=("StaticColour", {"level": 0.25}),
        it=("NeverAsks", {"image": ["still" if used else "live", 0], "other": ["still", 0]}),
        save=("SaveTensor", {"images": ["it", 0]}),
        also=("SaveTensor", {"images": ["still", 0]}),
    )
    for each in (runner, stock):
        each.load(prompt)
    assert shown(runner, 0.5) == shown(stock, 0.5)
    if used:
        assert shown(runner, 0.5) == 0.25


@pytest.mark.parametrize("runner", ["executor", "auto"], indirect=True)
def test_an_expansion_runs_every_frame_and_keeps_its_static_part(host, runner, special):
    runner.load(
        graph(
            expanded=("Expands", {"image": ["live", 0], "level": 0.5}),
            save=("SaveTensor", {"images": ["expanded", 0]}),
        )
    )
    assert [shown(runner, level) for level in (0.0, 1.0)] == [0.25, 0.75]


def test_a_blocked_frame_has_no_picture(host, runner, special):
    runner.load(graph(blocks=("Blocks", {"image": ["live", 0]}), save=("SaveTensor", {"images": ["blocks", 0]})))
    assert [tick(runner, level).images is None for level in (0.5, 1.0, 0.5)] == [False, True, False]


def test_a_v3_node_reads_like_any_other(host, runner, special):
    definition = host.definitions["Modern"]
    assert [(item.name, item.type) for item in definition.inputs] == [
        ("image", "IMAGE"),
        ("mark", "INT"),
        ("mode", "COMBO"),
    ]
    assert definition.input("mode").choices == ("keep", "double")
    prompt = graph(
        modern=("Modern", {"image": ["live", 0], "mark": 0, "mode": "double"}),
        save=("SaveTensor", {"images": ["modern", 0]}),
    )
    runner.load(prompt)
    assert shown(runner, 0.25) == 0.5
    prompt["modern"]["inputs"]["mode"] = "thrice"
    assert [item.code for item in host.validate(prompt)] == ["unknown_choice"]
