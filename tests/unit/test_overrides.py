"""Overrides: what changes, what is refused, and that a refusal changes nothing."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.graph.io_nodes import DEFINITIONS
from engine.graph.overrides import OverrideError, Violation, apply
from engine.graph.schema import definition_of
from tests.fakes.nodes import CLASSES

KNOWN = {**DEFINITIONS, **{name: definition_of(cls) for name, cls in CLASSES.items()}}
PROMPT: Any = {
    "1": {"class_type": "LoadTensor", "inputs": {}, "_meta": {"title": "Camera"}},
    "5": {
        "class_type": "EveryInput",
        "inputs": {"image": ["1", 0], "strength": 1.0, "seed": ["5b", 2], "colour": {"r": 1}},
        "_meta": {"title": "Effect"},
    },
    "5b": {"class_type": "EveryInput", "inputs": {"image": ["1", 0]}},
    "6": {"class_type": "SaveTensor", "inputs": {"images": ["5", 0]}},
    "7": {"class_type": "FromNowhere", "inputs": {}},
}


def applied(value: Any, name: str = "strength", node_id: str = "5") -> Any:
    return apply(PROMPT, {node_id: {name: value}}, KNOWN)[node_id]["inputs"][name]


def refused(overrides: Any, prompt: Any = PROMPT) -> list[Violation]:
    before = copy.deepcopy(prompt)
    with pytest.raises(OverrideError) as caught:
        apply(prompt, overrides, KNOWN)
    assert prompt == before
    return list(caught.value.violations)


def test_the_prompt_stays_and_untouched_nodes_are_shared():
    before = copy.deepcopy(PROMPT)
    result = apply(PROMPT, {"5": {"strength": 2.5, "count": 3}}, KNOWN)
    assert before == PROMPT
    assert result["5"]["inputs"] == {**before["5"]["inputs"], "strength": 2.5, "count": 3}
    assert result["5"]["_meta"] == {"title": "Effect"}
    assert result["6"] is PROMPT["6"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("strength", 2, 2.0),
        ("strength", 0.0, 0.0),
        ("strength", 10, 10.0),
        ("count", 3, 3),
        ("count", 3.0, 3),
        ("text", "", ""),
        ("flag", True, True),
        ("mode", "area", "area"),
        ("size", 64, 64),
        ("either", 2, 2),
        ("either", 2.5, 2.5),
        ("anything", {"x": 1}, {"x": 1}),
        ("anything", {"__value__": {"__value__": 7}}, 7),
        ("anything", {"__value__": ["a", "b"]}, {"__value__": ["a", "b"]}),
        ("strength", {"__value__": 2}, 2.0),
        ("colour", {"r": 2}, {"r": 2}),
    ],
)
def test_values_that_fit_arrive_in_the_type_that_nodes_expect(name, value, expected):
    result = applied(value, name)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("strength", 10.1, "a number from 0.0 to 10.0"),
        ("strength", {"__value__": 10.1}, "a number from 0.0 to 10.0"),
        ("anything", {"__value__": ["6", 0]}, ""),
        ("anything", {"__value__": ["6", 0.5]}, ""),
        ("strength", -1, "a number from 0.0 to 10.0"),
        ("strength", "2", "a number from 0.0 to 10.0"),
        ("strength", True, "a number from 0.0 to 10.0"),
        ("strength", None, "a number from 0.0 to 10.0"),
        ("strength", float("inf"), "a number from 0.0 to 10.0"),
        ("strength", 10**400, "a number from 0.0 to 10.0"),
        ("count", 2.5, "an integer from 0 to 10"),
        ("count", True, "an integer from 0 to 10"),
        ("count", 11, "an integer from 0 to 10"),
        ("either", -1, "a number of 0 or more"),
        ("text", 5, "text"),
        ("flag", 1, "true or false"),
        ("flag", "true", "true or false"),
        ("mode", "Area", 'one of "nearest", "area"'),
        ("size", "64", "one of 64, 128"),
        ("size", True, "one of 64, 128"),
        ("colour", "red", 'a link ["node id", output index] to an output of type COLOUR_PICKER'),
        ("mask", 1, 'a link ["node id", output index] to an output of type MASK'),
    ],
)
def test_values_that_do_not_fit_are_refused_with_what_would(name, value, allowed):
    (violation,) = refused({"5": {name: value}})
    assert violation.path == f"nodes.5.inputs.{name}"
    assert violation.allowed == allowed
    assert violation.message


def test_everything_wrong_is_said_at_once_and_nothing_is_applied():
    violations = refused({"5": {"strength": 2.0, "cuont": 1, "count": "x"}, "6": 7, "99": {"a": 1}, "7": {"b": 1}})
    assert [item.path for item in violations] == [
        "nodes.5.inputs.cuont", "nodes.5.inputs.count", "nodes.6", "nodes.99", "nodes.7",
    ]  # fmt: skip


def test_misspelt_names_come_with_suggestions():
    (violation,) = refused({"5": {"strenght": 2}})
    assert violation.suggestions == ("strength",)
    assert "did you mean 'strength'?" in violation.message
    (violation,) = refused({"effect": {"strength": 2}})
    assert violation.suggestions == ("5",)
    assert "5 (Effect)" in violation.allowed


def test_hidden_inputs_cannot_be_set():
    (violation,) = refused({"5": {"unique_id": "6"}})
    assert "no input" in violation.message


def test_a_value_does_not_replace_a_link_and_says_who_feeds_it():
    (violation,) = refused({"5": {"seed": 3}})
    assert "node 5b" in violation.message
    (violation,) = refused({"5": {"image": "x"}})
    assert "Camera" in violation.message


def test_a_link_replaces_a_value_and_a_link():
    result = apply(PROMPT, {"5": {"count": ["5b", 2], "image": ["5b", 0]}}, KNOWN)
    assert result["5"]["inputs"]["count"] == ["5b", 2]
    assert result["5"]["inputs"]["image"] == ["5b", 0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["5B", 0], "did you mean '5b'"),
        (["5b", 7], "has no output 7"),
        (["5b", -1], "is not a link"),
        ([5, 0], "is not a link"),
        (["5b"], "is not a link"),
        ([], "is not a link"),
        (["1", 1], "gives MASK, IMAGE is wanted"),
        (["6", 0], "has no output 0"),
        (["7", 0], "this engine has not"),
    ],
)
def test_links_are_checked(value, words):
    (violation,) = refused({"5": {"image": value}})
    assert violation.path == "nodes.5.inputs.image"
    assert words in violation.message


def test_a_link_that_closes_a_circle_is_refused():
    (violation,) = refused({"5b": {"image": ["5", 0]}})
    assert "circle" in violation.message
    assert violation.path == "nodes.5b.inputs.image"
    (violation,) = refused({"5b": {"image": ["5b", 0]}})
    assert "circle" in violation.message


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.lists(st.integers(), max_size=2)
)
NAMES = st.sampled_from([item.name for item in KNOWN["EveryInput"].inputs]) | st.text(max_size=6)
NODE_IDS = st.sampled_from(["1", "5", "5b", "6", "7", "x"])


@given(st.dictionaries(NODE_IDS, st.dictionaries(NAMES, VALUES, max_size=3) | VALUES))
def test_any_json_is_applied_or_refused_and_the_prompt_stays(overrides):
    before = copy.deepcopy(PROMPT)
    violations: tuple[Violation, ...] = ()
    result = None
    try:
        result = apply(PROMPT, overrides, KNOWN)
    except OverrideError as refusal:
        violations = refusal.violations
    assert (result is None) == bool(violations)
    assert result is None or apply(result, overrides, KNOWN) == result
    assert before == PROMPT
