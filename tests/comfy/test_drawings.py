"""Prompts drawn as ComfyUI's editor would save them come back as the same prompts, with the real node definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.graph.runner import TickInput
from engine.graph.schema import LITERAL_TYPES, Definitions
from engine.graph.workflow import Prompt, is_link, parse, read

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "workflows").glob("*.json"))


def drawn(prompt: Prompt, definitions: Definitions) -> dict[str, Any]:
    """Widgets in the order of the definition, seeds with the editor's own value behind; every link with an id."""
    nodes, links = [], []
    for order, (node_id, node) in enumerate(prompt.items()):
        definition = definitions[node["class_type"]]
        inputs, values = [], []
        for item in definition.inputs:
            value = node["inputs"].get(item.name)
            widget = bool(item.types & LITERAL_TYPES) and not item.force_input
            slot: dict[str, Any] = {"name": item.name, "type": item.type, "link": None}
            if is_link(value):
                links.append([len(links) + 1, value[0], value[1], node_id, len(inputs), item.type])
                slot["link"] = len(links)
            if widget:
                slot["widget"] = {"name": item.name}
                values.append(json.loads(item.default_json or "0") if is_link(value) else value)
                if item.control:
                    values.append("randomize")
            if not widget or is_link(value):
                inputs.append(slot)
        outputs = [{"name": item.name, "type": item.type} for item in definition.outputs]
        nodes.append({"id": node_id, "type": node["class_type"], "order": order, "mode": 0, "inputs": inputs,
                      "outputs": outputs, "widgets_values": values, "title": node["_meta"]["title"]})  # fmt: skip
    return {"version": 0.4, "nodes": nodes[::-1], "links": links}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_drawn_is_the_example(host, path):
    document = json.loads(path.read_text())
    definitions = host.definitions
    wanted = parse(document).prompt
    reading = read(drawn(document, definitions), definitions=definitions)
    assert reading.findings == ()
    given = reading.prompt
    assert given is not None
    for node in given.values():  # what was no input of the prompt is what the editor would show: the default
        node["inputs"] = {name: value for name, value in node["inputs"].items() if value is not None}
    assert list(given) == list(wanted)
    for node_id, node in wanted.items():
        assert given[node_id]["class_type"] == node["class_type"]
        assert given[node_id]["_meta"] == node["_meta"]
        assert node["inputs"].items() <= given[node_id]["inputs"].items()
        assert given[node_id]["inputs"].keys() <= node["inputs"].keys() | {"filename_prefix"}


def test_a_drawing_gives_the_picture_of_its_prompt(host, runner):
    document = json.loads((ROOT / "examples" / "workflows" / "grain.json").read_text())
    picture = torch.rand(1, 16, 16, 3)
    shown = []
    for prompt in (
        parse(document).prompt,
        read(drawn(document, host.definitions), definitions=host.definitions).prompt,
    ):
        assert prompt is not None
        runner.load(prompt)
        shown.append(runner.tick(TickInput(picture.clone())).images)
    assert torch.equal(*shown)
    assert not torch.equal(shown[0], picture)
