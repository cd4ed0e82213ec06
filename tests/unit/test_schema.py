"""Node definitions from V1 classes; V3 is tested with the real ComfyUI."""

import json
from typing import Any

import pytest

from engine.graph.io_nodes import DEFINITIONS
from engine.graph.schema import definition_of
from tests.fakes.nodes import EveryInput


@pytest.fixture
def definition():
    return definition_of(EveryInput)


def test_every_kind_of_input_is_read(definition):
    inputs = {item.name: item for item in definition.inputs}
    assert [inputs["count"].minimum, inputs["count"].maximum, inputs["count"].step] == [0, 10, 2]
    assert inputs["count"].default_json == "1"
    assert inputs["text"].multiline
    assert inputs["text"].default_json == '"hello"'
    assert inputs["flag"].default_json == "false"
    assert inputs["image"].tooltip == "what to change"
    assert inputs["image"].default_json == ""
    assert inputs["mask"].lazy
    assert inputs["seed"].force_input
    assert inputs["either"].types == {"INT", "FLOAT"}


def test_required_and_optional_are_told_apart_and_hidden_is_no_input(definition):
    assert [item.name for item in definition.inputs if not item.required] == [
        "mask", "seed", "either", "anything", "colour"
    ]  # fmt: skip
    assert definition.hidden == ("unique_id",)
    assert definition.input("unique_id") is None


def test_choices_keep_their_type(definition):
    assert definition.input("mode").type == "COMBO"
    assert definition.input("size").choices == (64, 128)
    assert definition.input("mode").choices_json == ('"nearest"', '"area"')


def test_outputs_take_names_from_the_class_and_types_where_there_are_none(definition):
    described = [(item.name, item.type, item.is_list) for item in definition.outputs]
    assert described == [("picture", "IMAGE", False), ("choice", "COMBO", True), ("INT", "INT", False)]


def test_the_largest_seed_stays_exact(definition):
    assert definition.input("seed").maximum == 2**64 - 1


def test_a_default_that_json_cannot_carry_becomes_text(definition):
    assert json.loads(definition.input("colour").default_json) == {"r": 1, "bad": "nan"}


def test_a_combo_as_v3_writes_it():
    class Node:
        RETURN_TYPES = ()

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"mode": ("COMBO", {"options": ["x", "y"], "default": "y"})}}

    mode = definition_of(Node, "Named", "Shown").input("mode")
    assert (mode.type, mode.choices, mode.default_json) == ("COMBO", ("x", "y"), '"y"')
    assert definition_of(Node, "Named", "Shown").display_name == "Shown"


def test_a_type_that_equals_everything_is_read_as_its_text():
    class Wildcard(str):
        def __ne__(self, other: object) -> bool:
            return False

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    class Node:
        RETURN_TYPES = (Wildcard("*"),)

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"value": (Wildcard("*"),)}}

    definition = definition_of(Node)
    assert definition.input("value").type == "*"
    assert definition.input("value").choices == ()
    assert type(definition.outputs[0].type) is str


def test_live_nodes_are_known_without_a_comfyui():
    assert DEFINITIONS["SaveTensor"].output_node
    assert [item.type for item in DEFINITIONS["LoadTensor"].outputs] == ["IMAGE", "MASK"]
    assert DEFINITIONS["SaveTensor"].input("unique_id") is None
