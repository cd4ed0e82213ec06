"""What ComfyUI's editor saves becomes the prompt that it would export."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.graph.schema import InputDefinition, NodeDefinition, OutputDefinition
from engine.graph.workflow import Severity, WorkflowError, is_drawing, parse, read


def definition(class_type: str, inputs: tuple[InputDefinition, ...], *outputs: str) -> NodeDefinition:
    made = tuple(OutputDefinition(kind, kind) for kind in outputs)
    return NodeDefinition(class_type, f"{class_type} Node", "test", "", inputs, made, not outputs, "test")


IMAGE = InputDefinition("image", "IMAGE", True)
DEFINITIONS = {
    item.class_type: item
    for item in (
        definition("LoadImage", (InputDefinition("image", "COMBO", True, choices=("a.png",)),), "IMAGE", "MASK"),
        definition("SaveImage", (InputDefinition("images", "IMAGE", True),
                                 InputDefinition("filename_prefix", "STRING", True, '"out"'))),
        definition("Blur", (IMAGE, InputDefinition("radius", "INT", True, "1"),
                            InputDefinition("sigma", "FLOAT", True, "2.0")), "IMAGE"),
        definition("Sampler", (InputDefinition("model", "MODEL", True),
                               InputDefinition("seed", "INT", True, "0", control=True),
                               InputDefinition("mode", "COMBO", True, choices=("euler", "fixed")),
                               IMAGE,
                               InputDefinition("strength", "FLOAT", False, "1.0"),
                               InputDefinition("forced", "INT", False, force_input=True),
                               InputDefinition("text", "STRING", False)), "IMAGE"),
        definition("Both", (InputDefinition("mask", "MASK", True), IMAGE), "MASK", "IMAGE"),
        definition("Many", (InputDefinition("list", "COMBO", True, choices=("x",)),
                            InputDefinition("curve", "CURVE", True)), "IMAGE"),
        definition("Model", (), "MODEL"),
        definition("Several", (IMAGE, InputDefinition("amount", "INT,FLOAT", True, "1"),
                               InputDefinition("size", "INT,FLOAT", True, "1", widget_type="FLOAT"),
                               InputDefinition("mode", "COMBO", True, choices=("a", "b")),
                               InputDefinition("text", "STRING", True, dynamic_prompt=True)), "IMAGE"),
    )
}  # fmt: skip


def node(
    node_id: int | str, kind: str, inputs: list[Any] | None = None, outputs: str = "", values: Any = None, **more: Any
) -> dict[str, Any]:
    """``inputs``: (name, type, link) each, a fourth makes it a widget too; ``outputs``: types."""
    slots = [
        {"name": name, "type": slot_type, "link": link} | ({"widget": {"name": name}} if widget else {})
        for name, slot_type, link, *widget in inputs or []
    ]
    return {
        "id": node_id,
        "type": kind,
        "mode": 0,
        "inputs": slots,
        "outputs": [{"name": name, "type": name} for name in outputs.split()],
    } | ({} if values is None else {"widgets_values": values}) | more  # fmt: skip


def drawing(*nodes: dict[str, Any], links: list[Any], **more: Any) -> dict[str, Any]:
    return {"version": 0.4, "nodes": list(nodes), "links": links, **more}


CAMERA = node(1, "LoadImage", outputs="IMAGE MASK", values=["a.png", "image"])


def viewers(link: int) -> dict[str, Any]:
    return node(9, "SaveImage", [("images", "IMAGE", link)], values=["out"])


def converted(document: dict[str, Any]) -> dict[str, Any]:
    """Node ids and inputs; nothing may be wrong."""
    before = copy.deepcopy(document)
    reading = read(document, definitions=DEFINITIONS)
    assert reading.findings == ()
    assert reading.prompt is not None
    assert document == before
    assert parse(json.dumps(reading.prompt)).prompt == reading.prompt
    return {node_id: item["inputs"] for node_id, item in reading.prompt.items()}


def found(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item.code, item.path) for item in read(document, definitions=DEFINITIONS).findings]


def test_nodes_links_and_widgets_become_a_prompt_with_live_ends():
    document = drawing(
        CAMERA,
        node(2, "Blur", [("image", "IMAGE", 1)], "IMAGE", [7, 1.5], title="Soften"),
        viewers(2),
        links=[[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 9, 0, "IMAGE"]],
    )
    prompt = read(document, definitions=DEFINITIONS).workflow().prompt
    assert prompt == {
        "1": {"class_type": "LoadTensor", "inputs": {}, "_meta": {"title": "LoadImage Node"}},
        "2": {
            "class_type": "Blur",
            "inputs": {"image": ["1", 0], "radius": 7, "sigma": 1.5},
            "_meta": {"title": "Soften"},
        },
        "9": {
            "class_type": "SaveTensor",
            "inputs": {"images": ["2", 0], "filename_prefix": "out"},
            "_meta": {"title": "SaveImage Node"},
        },
    }


def test_links_may_be_objects_and_ids_text():
    document = drawing(
        node("cam", "LoadImage", outputs="IMAGE MASK", values=["a.png"]),
        viewers(5),
        links=[{"id": 5, "origin_id": "cam", "origin_slot": 0, "target_id": 9, "target_slot": 0, "type": "IMAGE"}],
    )
    assert converted(document)["9"]["images"] == ["cam", 0]


@pytest.mark.parametrize(
    ("values", "inputs"),
    [
        ([42, "randomize", "euler", 0.5, "hi"], {"seed": 42, "mode": "euler", "strength": 0.5, "text": "hi"}),
        ([42, "fixed", "fixed", 0.5, ""], {"seed": 42, "mode": "fixed", "strength": 0.5, "text": ""}),
        ([42, "euler", 0.5, "hi"], {"seed": 42, "mode": "euler", "strength": 0.5, "text": "hi"}),
        ([42, "fixed"], {"seed": 42, "mode": "euler", "strength": 1.0}),
        ([], {"seed": 0, "mode": "euler", "strength": 1.0}),
        ([None, "fixed", "euler", 2.0, None], {"seed": 0, "mode": "euler", "strength": 2.0}),
        ({"seed": 3, "text": ["a"], "preview": {}}, {"seed": 3, "text": {"__value__": ["a"]}}),
    ],
)
def test_values_find_their_widgets_around_the_editors_own(values, inputs):
    document = drawing(
        CAMERA,
        node(2, "Model", outputs="MODEL"),
        node(3, "Sampler", [("model", "MODEL", 1), ("image", "IMAGE", 2), ("forced", "INT", None)], "IMAGE", values),
        viewers(3),
        links=[[1, 2, 0, 3, 0, "MODEL"], [2, 1, 0, 3, 1, "IMAGE"], [3, 3, 0, 9, 0, "IMAGE"]],
    )
    given = converted(document)["3"]
    assert given == {"model": ["2", 0], "image": ["1", 0]} | inputs


def test_a_converted_widget_takes_its_link_and_keeps_its_place_among_the_values():
    document = drawing(
        CAMERA,
        node(2, "PrimitiveNode", outputs="INT", values=[12, "increment"]),
        node(3, "Blur", [("image", "IMAGE", 1), ("radius", "INT", 2, True)], "IMAGE", [7, 1.5]),
        viewers(3),
        links=[[1, 1, 0, 3, 0, "IMAGE"], [2, 2, 0, 3, 1, "INT"], [3, 3, 0, 9, 0, "IMAGE"]],
    )
    given = converted(document)
    assert given["3"] == {"image": ["1", 0], "radius": 12, "sigma": 1.5}
    assert "2" not in given


def test_widget_types_of_packs_have_values_when_no_socket_is_drawn():
    values = ["x", [[0, 0], [1, 1]]]
    document = drawing(CAMERA, node(2, "Many", [], "IMAGE", values), viewers(1), links=[[1, 2, 0, 9, 0, "IMAGE"]])
    assert converted(document)["2"] == {"list": "x", "curve": {"__value__": [[0, 0], [1, 1]]}}


def test_an_input_of_several_types_is_a_socket_unless_it_names_a_widget():
    document = drawing(
        CAMERA,
        node(2, "PrimitiveNode", outputs="INT", values=[12, "fixed"]),
        node(3, "Several", [("image", "IMAGE", 1), ("amount", "INT,FLOAT", None)], "IMAGE", [2.5, "b", "a // b"]),
        viewers(3),
        links=[[1, 1, 0, 3, 0, "IMAGE"], [3, 3, 0, 9, 0, "IMAGE"]],
    )
    assert converted(document)["3"] == {"image": ["1", 0], "size": 2.5, "mode": "b", "text": "a "}


def test_reroutes_notes_and_named_links_are_only_drawn():
    document = drawing(
        CAMERA,
        node(2, "Reroute", [("", "*", 1)], "IMAGE"),
        node(3, "SetNode", [("IMAGE", "IMAGE", 2)], "*", ["picture"]),
        node(4, "GetNode", outputs="IMAGE", values=["picture"]),
        node(5, "Note", values=["look"]),
        node(6, "MarkdownNote", values=["# look"]),
        viewers(3),
        links=[[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"], [3, 4, 0, 9, 0, "IMAGE"]],
    )
    assert converted(document) == {"1": {}, "9": {"images": ["1", 0], "filename_prefix": "out"}}


def test_a_bypassed_node_hands_on_the_input_of_the_same_type():
    document = drawing(
        CAMERA,
        node(2, "Both", [("mask", "MASK", 1), ("image", "IMAGE", 2)], "MASK IMAGE", mode=4),
        node(3, "Both", [("mask", "MASK", 3), ("image", "IMAGE", 4)], "MASK IMAGE"),
        viewers(5),
        links=[
            [1, 1, 1, 2, 0, "MASK"], [2, 1, 0, 2, 1, "IMAGE"], [3, 2, 0, 3, 0, "MASK"], [4, 2, 1, 3, 1, "IMAGE"],
            [5, 3, 1, 9, 0, "IMAGE"],
        ],
    )  # fmt: skip
    assert converted(document)["3"] == {"mask": ["1", 1], "image": ["1", 0]}


def bypassed(outputs: str, slot: int, kind: str, *inputs: str) -> int | None:
    """Which of its inputs a bypassed node hands on to an input of type ``kind``."""
    sources = [node(10 + index, f"Source{index}", outputs="A") for index in range(len(inputs))]
    slots = [(f"in{index}", name, 1 + index) for index, name in enumerate(inputs)]
    links = [[1 + index, 10 + index, 0, 2, index, "A"] for index in range(len(inputs))]
    document = drawing(
        *sources, node(2, "Any", slots, outputs, mode=4), node(3, "End", [("x", kind, 99)]),
        links=[*links, [99, 2, slot, 3, 0, kind]],
    )  # fmt: skip
    prompt = read(document, definitions=DEFINITIONS).prompt
    assert prompt is not None
    link = prompt["3"]["inputs"].get("x")
    return None if link is None else int(link[0]) - 10


@pytest.mark.parametrize(
    ("outputs", "slot", "kind", "inputs", "handed_on"),
    [
        ("A A", 1, "A", ("A", "A"), 1),  # the input beside the output
        ("A A", 1, "A", ("A", "B"), 0),  # else the first of the very type
        ("A", 0, "A", ("B", "A,B", "A"), 2),  # before one that takes several
        ("A", 0, "A", ("B", "A,B"), 1),
        ("A", 0, "A", ("B", "*"), 1),
        ("A", 0, "a", ("B", "A"), 1),  # letter case does not count
        ("A A", 1, "*", ("B", "C"), 1),
        ("A A A", 2, "*", ("B", "C"), 0),
        ("A", 0, "A", ("B", "C"), None),
        ("A", 0, "A", (), None),
    ],
)
def test_which_input_a_bypassed_node_hands_on(outputs, slot, kind, inputs, handed_on):
    assert bypassed(outputs, slot, kind, *inputs) == handed_on


def test_helpers_that_feed_each_other_are_a_circle():
    document = drawing(
        node(2, "Reroute", [("", "*", 2)], "IMAGE"),
        node(3, "Blur", [("image", "IMAGE", 1)], "IMAGE", mode=4),
        viewers(3),
        links=[[1, 2, 0, 3, 0, "IMAGE"], [2, 3, 0, 2, 0, "IMAGE"], [3, 3, 0, 9, 0, "IMAGE"]],
    )
    assert ("cycle", "nodes.3.inputs.image") in found(document)


def test_what_a_muted_node_feeds_is_named():
    document = drawing(
        CAMERA,
        node(2, "Blur", [("image", "IMAGE", 1)], "IMAGE", [7, 1.5], mode=2),
        viewers(2),
        links=[[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 9, 0, "IMAGE"]],
    )
    assert found(document) == [("muted_source", "nodes.9.inputs.images")]
    assert "2" not in (read(document, definitions=DEFINITIONS).prompt or {})


SUBGRAPH = {
    "id": "0b0b0b0b-1111-4222-8333-444455556666",
    "name": "Twice",
    "inputNode": {"id": -10},
    "outputNode": {"id": -20},
    "inputs": [{"name": "picture", "type": "IMAGE"}, {"name": "radius", "type": "INT"}],
    "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
    "nodes": [
        node(1, "Blur", [("image", "IMAGE", 1), ("radius", "INT", 2, True)], "IMAGE", [3, 0.5], order=0),
        node(2, "Blur", [("image", "IMAGE", 3)], "IMAGE", [4, 0.6], order=1),
    ],
    "links": [
        {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0, "type": "IMAGE"},
        {"id": 2, "origin_id": -10, "origin_slot": 1, "target_id": 1, "target_slot": 1, "type": "INT"},
        {"id": 3, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "IMAGE"},
        {"id": 4, "origin_id": 2, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "IMAGE"},
    ],
}


def instance(node_id: int, link: int, values: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    inputs = [("picture", "IMAGE", link), ("radius", "INT", None, True)]
    return node(node_id, SUBGRAPH["id"], inputs, "IMAGE", values, **more)


def test_two_instances_of_a_subgraph_are_flattened_with_their_own_values():
    document = drawing(
        CAMERA,
        instance(5, 1, [11]),
        instance(6, 2, [5, 0.9], properties={"proxyWidgets": [["-1", "radius"], ["2", "sigma"]]}),
        viewers(3),
        links=[[1, 1, 0, 5, 0, "IMAGE"], [2, 5, 0, 6, 0, "IMAGE"], [3, 6, 0, 9, 0, "IMAGE"]],
        definitions={"subgraphs": [SUBGRAPH]},
    )
    given = converted(document)
    assert given == {
        "1": {},
        "5:1": {"image": ["1", 0], "radius": 11, "sigma": 0.5},
        "5:2": {"image": ["5:1", 0], "radius": 4, "sigma": 0.6},
        "6:1": {"image": ["5:2", 0], "radius": 5, "sigma": 0.5},
        "6:2": {"image": ["6:1", 0], "radius": 4, "sigma": 0.9},
        "9": {"images": ["6:2", 0], "filename_prefix": "out"},
    }


def test_a_bypassed_subgraph_hands_its_picture_on():
    document = drawing(
        CAMERA, instance(5, 1, [11], mode=4), viewers(2),
        links=[[1, 1, 0, 5, 0, "IMAGE"], [2, 5, 0, 9, 0, "IMAGE"]], definitions={"subgraphs": [SUBGRAPH]},
    )  # fmt: skip
    assert converted(document) == {"1": {}, "9": {"images": ["1", 0], "filename_prefix": "out"}}


def test_a_subgraph_that_contains_itself_ends():
    inner = copy.deepcopy(SUBGRAPH)
    inner["nodes"][1] = instance(2, 3, None)
    document = drawing(
        CAMERA, instance(5, 1), viewers(2),
        links=[[1, 1, 0, 5, 0, "IMAGE"], [2, 5, 0, 9, 0, "IMAGE"]], definitions={"subgraphs": [inner]},
    )  # fmt: skip
    assert "subgraph_depth" in {code for code, _ in found(document)}


def test_doubling_subgraphs_end_at_the_limit():
    levels = []
    for level in range(14):
        kind = f"level-{level + 1}" if level < 13 else "Model"
        levels.append({"id": f"level-{level}", "nodes": [node(1, kind), node(2, kind)], "links": []})
    document = drawing(CAMERA, node(2, "level-0"), links=[], definitions={"subgraphs": levels})
    reading = read(document, definitions=DEFINITIONS, max_nodes=50)
    assert ("too_many_nodes", "") in [(item.code, item.path) for item in reading.findings]


def test_a_group_node_is_flattened_with_its_values():
    group = {
        "nodes": [
            {"type": "Blur", "inputs": [{"name": "image", "type": "IMAGE", "link": None}],
             "outputs": [{"type": "IMAGE"}], "widgets_values": [1, 1.0]},
            {"type": "Blur", "inputs": [{"name": "image", "type": "IMAGE", "link": None}],
             "outputs": [{"type": "IMAGE"}], "widgets_values": [2, 2.0]},
        ],
        "links": [[0, 0, 1, 0, "IMAGE"]],
        "external": [],
    }  # fmt: skip
    document = drawing(
        CAMERA,
        node(5, "workflow>Pair", [("image", "IMAGE", 1)], "IMAGE", [5, 0.5, 6, 0.6]),
        viewers(2),
        links=[[1, 1, 0, 5, 0, "IMAGE"], [2, 5, 0, 9, 0, "IMAGE"]],
        extra={"groupNodes": {"Pair": group}},
    )
    assert converted(document) == {
        "1": {},
        "5:0": {"image": ["1", 0], "radius": 5, "sigma": 0.5},
        "5:1": {"image": ["5:0", 0], "radius": 6, "sigma": 0.6},
        "9": {"images": ["5:1", 0], "filename_prefix": "out"},
    }


def test_nothing_that_runs_is_said():
    assert found(drawing(node(1, "Note", values=["x"]), links=[])) == [("empty_workflow", "")]


def test_without_definitions_a_drawing_is_refused_with_a_remedy():
    document = drawing(CAMERA, viewers(1), links=[[1, 1, 0, 9, 0, "IMAGE"]])
    assert is_drawing(document)
    with pytest.raises(WorkflowError) as caught:
        parse(document)
    (finding,) = caught.value.findings
    assert finding.code == "ui_format"
    assert "Export (API)" in finding.remedy


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-30, 30) | st.floats() | st.sampled_from(["", "IMAGE", "Blur", "a:b"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "type", "link"]), inner),
    max_leaves=6,
)
KINDS = st.sampled_from(
    ["Blur", "Both", "Sampler", "LoadImage", "SaveImage", "Reroute", "PrimitiveNode", "GetNode", "SetNode", "sub",
     "workflow/group", "Unknown"]
)  # fmt: skip
SLOT = st.fixed_dictionaries(
    {"name": JSON, "type": JSON, "link": st.integers(1, 8) | JSON}, optional={"widget": JSON}
)
NODE = st.fixed_dictionaries(
    {"id": st.integers(1, 5) | JSON, "type": KINDS | JSON},
    optional={
        "mode": st.sampled_from([0, 2, 4]) | JSON, "inputs": st.lists(SLOT, max_size=3) | JSON,
        "outputs": st.lists(SLOT, max_size=2) | JSON, "widgets_values": JSON, "order": JSON, "properties": JSON,
        "title": JSON,
    },
)  # fmt: skip
END = st.integers(1, 5) | st.sampled_from([-10, -20])
LINK = st.tuples(st.integers(1, 8), END, st.integers(0, 2), END, st.integers(0, 2)).map(list) | JSON
GRAPH = {"nodes": st.lists(NODE, max_size=5), "links": st.lists(LINK, max_size=8) | JSON}
DRAWING = st.fixed_dictionaries(
    GRAPH,
    optional={
        "definitions": st.fixed_dictionaries(
            {"subgraphs": st.lists(st.fixed_dictionaries(GRAPH | {"id": st.just("sub"), "inputs": JSON}), max_size=1)}
        ) | JSON,
        "extra": st.fixed_dictionaries(
            {"groupNodes": st.fixed_dictionaries({"group": st.fixed_dictionaries(GRAPH | {"external": JSON})}) | JSON}
        ) | JSON,
    },
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(DRAWING)
def test_no_drawing_makes_it_raise_and_what_comes_out_is_a_prompt_or_a_finding(document):
    reading = read(document, definitions=DEFINITIONS, max_nodes=60)
    if reading.is_sound and reading.prompt is not None:
        assert parse(json.dumps(reading.prompt)).prompt == reading.prompt
    else:
        assert any(item.severity is Severity.ERROR for item in reading.findings)
    for item in reading.findings:
        assert item.message
        assert item.remedy
