"""The shipped workflows on the real nodes: they run, and their live parameter can be seen."""

from pathlib import Path

import pytest
import torch

from engine.graph.overrides import apply
from engine.graph.runner import TickInput
from engine.graph.workflow import parse

DIRECTORY = Path(__file__).parents[2] / "examples" / "workflows"
#: The parameter of each example that a viewer sees at once, and the value to set.
LIVE = {
    "demo": ("Mix", "blend_factor", 1.0),
    "soft-glow": ("Glow", "blend_factor", 0.0),
    "silhouette": ("Threshold", "value", 0.9),
    "picture-in-picture": ("Place", "x", 300),
    "pass-through": None,
}


def test_every_example_is_here():
    assert {path.stem for path in DIRECTORY.glob("*.json")} == set(LIVE)


@pytest.mark.parametrize("name", LIVE)
def test_example_runs_and_its_parameter_shows(host, runner, name):
    workflow = parse((DIRECTORY / f"{name}.json").read_text())
    assert host.validate(workflow.prompt) == []
    runner.load(workflow.prompt)
    torch.manual_seed(1)
    picture = torch.rand(1, 512, 512, 3)
    before = runner.tick(TickInput(picture.clone())).images
    assert before.shape == (1, 512, 512, 3)
    if LIVE[name] is None:
        assert torch.equal(before, picture)
        return
    title, name, value = LIVE[name]
    (node_id,) = [key for key, node in workflow.prompt.items() if node["_meta"]["title"] == title]
    runner.update(apply(workflow.prompt, {node_id: {name: value}}, host.definitions))
    after = runner.tick(TickInput(picture.clone())).images
    assert (after - before).abs().mean() > 0.02, "five grey levels in the mean: less is hard to see"
