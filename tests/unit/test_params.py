"""Every shape of start and update requests (protocol.md 3.3, 4.4, 5.2, 5.5), and what is said about wrong ones."""

import difflib
import json
from difflib import get_close_matches
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_shim.errors import InvalidRequest, MalformedRequest, Violation
from gateway_shim.json_text import read_json
from gateway_shim.keys import MAX_NODE_ID, POLICIES
from gateway_shim.params import Update, check_hosts, nodes_of, parse_start, parse_update
from gateway_shim.stream.fallback import Policy

WORKFLOW: dict[str, Any] = {
    "1": {"class_type": "LoadTensor", "inputs": {}},
    "5": {"class_type": "KSampler", "inputs": {"seed": 1, "image": ["1", 0]}, "_meta": {"title": "Sampler"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "cat"}, "_meta": {"title": "Text"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "dog"}, "_meta": {"title": "Text"}},
}
OTHER = {"40": {"class_type": "SaveTensor", "inputs": {}, "_meta": {"title": "Out"}}}
DOCUMENT = {"nodes": [{"id": 12, "type": "KSampler", "title": "Mine"}], "links": [], "version": 0.4}


def violations(body: Any, **expected: Any) -> list[Violation]:
    with pytest.raises(InvalidRequest) as caught:
        parse_update(body, WORKFLOW)
    return list(caught.value.violations)


def paths(body: Any) -> list[str]:
    return [violation.path for violation in violations(body)]


def start(params: Any, **more: Any) -> Any:
    return parse_start({"gateway_request_id": "a", "params": params} | more, require_id=True)


# ---- workflows


@pytest.mark.parametrize("key", ["prompts", "prompt"])
@pytest.mark.parametrize(
    "value", [OTHER, [OTHER], ["noise", OTHER, WORKFLOW], json.dumps(OTHER), json.dumps([OTHER])]
)
def test_a_workflow_comes_as_object_list_or_text(key: str, value: Any) -> None:
    assert start({key: value}).workflow == OTHER
    assert parse_update({key: value}, WORKFLOW) == Update(workflow=OTHER)


def test_a_bare_workflow_is_one_whole_workflow() -> None:
    assert start(OTHER).workflow == OTHER
    assert parse_update(OTHER, WORKFLOW) == Update(workflow=OTHER)
    assert parse_update(OTHER | {"width": 512, "height": 256}, WORKFLOW) == Update(OTHER, width=512, height=256)


def test_prompts_goes_before_prompt() -> None:
    assert parse_update({"prompt": WORKFLOW, "prompts": OTHER}, WORKFLOW).workflow == OTHER


@pytest.mark.parametrize("nothing", [None, "", "  ", {}, []])
def test_no_workflow_at_start_is_none(nothing: Any) -> None:
    assert start({"prompts": nothing}).workflow is None


@pytest.mark.parametrize("nothing", ["", {}, []])
def test_a_workflow_without_nodes_is_no_update(nothing: Any) -> None:
    assert paths({"prompts": nothing}) == ["prompts"]


@pytest.mark.parametrize("wrong", [3, True, "{", "3", ["a", 3], json.dumps("text")])
def test_what_is_no_workflow_is_refused_and_not_dropped(wrong: Any) -> None:
    assert paths({"prompts": wrong}) == ["prompts"]
    with pytest.raises(InvalidRequest) as caught:
        start({"prompts": wrong})
    assert caught.value.violations[0].path == "params.prompts"


def test_the_document_that_comfyuis_page_saves_passes_to_the_engine_as_it_is() -> None:
    assert start({"prompts": DOCUMENT}).workflow == DOCUMENT
    assert parse_update({"prompts": DOCUMENT, "Mine": {"seed": 3}}, WORKFLOW).overrides == {"12": {"seed": 3}}


def test_every_broken_node_is_named() -> None:
    broken = {"1": 3, "2": {"inputs": {}}, "3": {"class_type": "A", "inputs": []}, "4": {"class_type": ""}}
    assert paths({"prompts": broken}) == ["nodes.1", "nodes.2.class_type", "nodes.3.inputs", "nodes.4.class_type"]


def test_a_node_id_longer_than_any_line_that_names_it_is_refused() -> None:
    longest = "n" * MAX_NODE_ID
    assert parse_update({"prompts": {longest: OTHER["40"]}}, WORKFLOW).workflow == {longest: OTHER["40"]}
    (violation,) = violations({"prompts": {"n" * 64_500: OTHER["40"]}})
    assert violation == Violation(
        f"nodes.{'n' * 77}...", "the node id has 64500 characters", "at most 256 characters"
    )


# ---- overrides


@pytest.mark.parametrize(
    "body",
    [
        {"5": {"inputs": {"seed": 2**64 - 1}}},
        {"5": {"seed": 2**64 - 1}},
        {"Sampler": {"seed": 2**64 - 1}},
        {"Sampler": {"inputs": {"seed": 2**64 - 1}}},
        {"5": {"class_type": "KSampler", "inputs": {"seed": 2**64 - 1}, "_meta": {}}, "6": {"inputs": {}}},
        {"params": {"5": {"seed": 2**64 - 1}}},
        {"params": '{"5": {"seed": 18446744073709551615}}'},
        {"stream_id": "a", "params": {"5": {"seed": 2**64 - 1}}},
    ],
)
def test_an_override_names_its_node_by_id_or_title(body: Any) -> None:
    assert parse_update(body, WORKFLOW) == Update(overrides={"5": {"seed": 18446744073709551615}})


def test_a_copied_node_of_the_same_class_is_an_override_when_others_are() -> None:
    body: dict[str, Any] = {"5": {"class_type": "KSampler", "inputs": {"seed": 2}, "_meta": {}}, "6": {"text": "x"}}
    assert parse_update(body, WORKFLOW).overrides == {"5": {"seed": 2}, "6": {"text": "x"}}
    body["5"]["class_type"] = "Other"
    assert paths(body) == ["nodes.5.class_type"]


def test_keys_of_all_kinds_may_stand_together() -> None:
    body = {"5": {"seed": 1}, "Sampler": {"steps": 4}, "max_framerate": "30", "show_loading": "TRUE", "load_model": 1}
    assert parse_update(body, WORKFLOW) == Update(
        overrides={"5": {"seed": 1, "steps": 4}}, max_framerate=30, show_loading=True, load_model=True
    )


def test_overrides_beside_a_workflow_mean_that_workflow() -> None:
    assert parse_update({"prompts": OTHER, "Out": {"quality": 3}}, WORKFLOW) == Update(OTHER, {"40": {"quality": 3}})
    assert paths({"prompts": OTHER, "5": {"seed": 3}}) == ["nodes.5"]


def test_a_title_that_two_nodes_have_is_refused_with_their_ids() -> None:
    (violation,) = violations({"Text": {"text": "x"}})
    assert (violation.path, violation.allowed) == ("nodes.Text", "node ids 6, 7")


def test_an_id_goes_before_a_title() -> None:
    prompt = {"1": {"class_type": "A", "inputs": {}}, "2": {"class_type": "B", "_meta": {"title": "1"}}}
    assert parse_update({"1": {"x": 1}}, prompt).overrides == {"1": {"x": 1}}


@pytest.mark.parametrize(
    ("key", "meant"), [("55", "5"), ("Sampeler", "Sampler"), ("widht", "width"), ("promt", "prompt")]
)
def test_an_unknown_key_in_an_update_is_refused_with_what_was_meant(key: str, meant: str) -> None:
    (violation,) = violations({key: {"seed": 1}})
    assert violation.path == f"nodes.{key}"
    assert f"did you mean {meant!r}?" in violation.message


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Characters of each key that was looked for among the known ones, times the characters of those."""
    costs: list[int] = []

    def count(word: str, among: list[str], n: int) -> list[str]:
        costs.append(len(word) * sum(map(len, among)))
        return get_close_matches(word, among, n)

    monkeypatch.setattr(difflib, "get_close_matches", count)
    return costs


def prompt_of(nodes: int, title: str = "") -> dict[str, Any]:
    return {str(at): {"class_type": "A", "_meta": {"title": title and f"{title} {at}"}} for at in range(nodes)}


def test_a_thousand_unknown_keys_of_a_thousand_nodes_are_not_compared_a_million_times(compared: list[int]) -> None:
    body = {f"Unknown {number}": {"seed": 1} for number in range(1000)}
    with pytest.raises(InvalidRequest) as caught:
        parse_update(body, prompt_of(1000, "Some node"))
    assert 1 <= len(compared) <= 5
    assert sum(compared) <= 500_000
    assert len(caught.value.violations) == 100
    assert "(at least 99 more)" in caught.value.message


def test_every_key_of_a_workflow_that_people_draw_is_compared(compared: list[int]) -> None:
    body = {f"Somme node {number}": {"seed": 1} for number in range(26)}
    with pytest.raises(InvalidRequest) as caught:
        parse_update(body, prompt_of(26, "Some node"))
    assert len(compared) == 26
    assert ["did you mean" in violation.message for violation in caught.value.violations] == [True] * 26


@pytest.mark.parametrize("key", ["n" * 101, "n" * 10_000_000])
def test_a_key_longer_than_any_name_is_not_compared(compared: list[int], key: str) -> None:
    (violation,) = violations({key: {"seed": 1}})
    assert len(violation.path) <= 110
    (violation,) = violations({key: 1})
    assert len(violation.path) <= 110
    assert not compared


def test_a_workflow_of_too_many_nodes_is_not_searched_for_what_was_meant(compared: list[int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_update({"prompts": prompt_of(30_000), "x": {}, "Unknown": {}}, WORKFLOW)
    assert not compared
    assert "and 29980 more" in caught.value.violations[0].allowed


@pytest.mark.parametrize(
    "body",
    [
        {str(number): number for number in range(10, 100_000)},
        {"prompts": {str(number): number for number in range(100_000)}},
        {"5": {"inputs": {}} | {f"x{number}": 1 for number in range(100_000)}},
        {"5": (many := {f"x{number}": 1 for number in range(100_000)}), "Sampler": many},
        {"params": many} | many,
        {"prompts": {"9" * 1_000_000: {"class_type": "A", "_meta": {"title": "T"}}}, "T": {"inputs": {}} | many},
        {"prompts": prompt_of(3) | {"9": {"class_type": "A", "_meta": {"title": "T" * 100_000}}}} | many,
    ],
)
def test_the_answer_to_a_body_that_is_all_wrong_is_short(body: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_update(body, WORKFLOW)
    assert len(caught.value.violations) == 100
    assert len(json.dumps(caught.value.as_json())) < 100_000


def test_an_unknown_key_at_start_is_ignored() -> None:
    assert start({"enable_video_ingress": True, "55": {"x": 1}, "5": 3}).workflow is None


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"5": 3}, "nodes.5"),
        ({"5": None}, "nodes.5"),
        ({"5": [1]}, "nodes.5"),
        ({"5": {"inputs": {"seed": 1}, "steps": 2}}, "nodes.5.steps"),
        ({"5": {"seed": 1}, "Sampler": {"seed": 2}}, "nodes.5.inputs.seed"),
        ({"nonsense": 1}, "nonsense"),
        ({"params": 3}, "params"),
        ({"params": "{"}, "params"),
        ({"params": {"params": {"5": {"seed": 1}}}}, "nodes.params"),
        ({"5": {"seed": 1}, "params": {"5": {"seed": 2}}}, "5"),
    ],
)
def test_a_wrong_override_is_named(body: Any, path: str) -> None:
    assert paths(body) == [path]


@pytest.mark.parametrize("body", [{}, {"params": {}}, {"params": None}, {"5": {}}, {"detect_out_resolution": "x"}])
def test_an_update_may_be_empty(body: Any) -> None:
    assert parse_update(body, WORKFLOW).is_empty


# ---- the common keys


@pytest.mark.parametrize(("width", "height"), [(640, 480), ("640", "480"), (640.0, "480")])
def test_sizes_come_as_number_or_text(width: Any, height: Any) -> None:
    request = start({"width": width, "height": height})
    assert (request.width, request.height) == (640, 480)
    update = parse_update({"width": width, "height": height}, WORKFLOW)
    assert (update.width, update.height) == (640, 480)


@pytest.mark.parametrize("wrong", [0, -2, 513, 10_000, 640.5, "wide", True, [640], {}, float("1e300"), "", "1e3"])
def test_wrong_sizes_are_named(wrong: Any) -> None:
    assert paths({"width": wrong, "height": 480}) == ["width"]


def test_width_and_height_come_together() -> None:
    assert paths({"width": 640}) == ["height"]
    assert paths({"height": 640}) == ["width"]
    assert start({"width": None, "height": None}).width is None


@pytest.mark.parametrize("value", [1, 60, "30", 24.0])
def test_frame_rates(value: Any) -> None:
    assert start({"max_framerate": value}).max_framerate == int(float(value))


@pytest.mark.parametrize("wrong", [0, 61, -1, 29.97, "x", True, [], 10**400])
def test_wrong_frame_rates_are_named(wrong: Any) -> None:
    assert paths({"max_framerate": wrong}) == ["max_framerate"]


@pytest.mark.parametrize("value", [20, 30_000, "400", 1e3])
def test_latency_budgets(value: Any) -> None:
    assert start({"latency_budget_ms": value}).latency_budget_ms == int(float(value))
    assert parse_update({"latency_budget_ms": value}, WORKFLOW).latency_budget_ms == int(float(value))


@pytest.mark.parametrize("wrong", [0, 19, 30_001, -400, 0.4, "fast", True, []])
def test_wrong_latency_budgets_are_named(wrong: Any) -> None:
    assert paths({"latency_budget_ms": wrong}) == ["latency_budget_ms"]


def test_fallback_policies_are_four_and_the_same_everywhere() -> None:
    assert [policy.value for policy in Policy] == list(POLICIES)
    for policy in POLICIES:
        assert start({"fallback": policy}).fallback == policy
        assert parse_update({"fallback": policy}, WORKFLOW).fallback == policy
    for wrong in ("black", "HOLD", 1, True, ["hold"], {}, ""):
        assert paths({"fallback": wrong}) == ["fallback"]


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (True, True),
        ("true", True),
        ("Yes", True),
        (1, True),
        ("1", True),
        (False, False),
        ("false", False),
        (0, False),
    ],
)
def test_booleans_also_come_as_text(value: Any, meaning: bool) -> None:
    assert parse_update({"show_loading": value}, WORKFLOW).show_loading is meaning
    assert parse_update({"load_model": value}, WORKFLOW).load_model is meaning
    assert start({"detect_out_resolution": value}).detect_out_resolution is meaning


def test_everything_wrong_is_found_at_once() -> None:
    body = {"width": 1, "max_framerate": 0, "show_loading": "maybe", "load_model": {}, "nope": 1, "6": 1}
    assert sorted(paths(body)) == [
        "height",
        "load_model",
        "max_framerate",
        "nodes.6",
        "nope",
        "show_loading",
        "width",
    ]


# ---- start


@pytest.mark.parametrize("value", [None, "", {}, "{}"])
def test_start_params_may_be_missing(value: Any) -> None:
    assert start(value).params == {}


def test_start_params_may_be_text() -> None:
    assert start('{"max_framerate": 12}').max_framerate == 12


@pytest.mark.parametrize("wrong", [3, [], "{", "[1]", True])
def test_wrong_start_params_are_named(wrong: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        start(wrong)
    assert [violation.path for violation in caught.value.violations] == ["params"]


@pytest.mark.parametrize(
    "wrong",
    [3, "x", "ftp://h/x", "http://", "http://h:99999/x", "http://h/a b", "file:///etc/passwd", "http://[::1/x", {}],
)
def test_wrong_channels_are_named(wrong: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        start(None, control_url=wrong)
    assert [violation.path for violation in caught.value.violations] == ["control_url"]


def test_absent_and_empty_channels_are_none() -> None:
    request = start(None, control_url="", events_url=None, publish_url="http://o/x")
    assert request.channels == {"publish_url": "http://o/x"}


def test_the_id_is_the_first_of_the_names_and_the_others_are_aliases() -> None:
    body = {"gateway_request_id": "g", "manifest_id": "m", "stream_id": "s"}
    assert parse_start(body, require_id=False).aliases == ("m", "s")
    assert parse_start({"stream_id": "s"}, require_id=False, default_id="h").stream_id == "s"
    assert parse_start({}, require_id=True, default_id="h").stream_id == "h"
    assert parse_start(body, require_id=True, default_id="g").aliases == ("m", "s")


def test_without_any_name_the_channels_make_the_id() -> None:
    first = parse_start({"subscribe_url": "http://o/a"}, require_id=False).stream_id
    assert first == parse_start({"subscribe_url": "http://o/a"}, require_id=False).stream_id
    assert first != parse_start({"subscribe_url": "http://o/b"}, require_id=False).stream_id
    with pytest.raises(InvalidRequest):
        parse_start({"subscribe_url": "http://o/a"}, require_id=True)


@pytest.mark.parametrize("wrong", [3, "a\nb", "x" * 300, {}])
def test_wrong_ids_are_named(wrong: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_start({"gateway_request_id": wrong}, require_id=True)
    assert [violation.path for violation in caught.value.violations] == ["gateway_request_id"]


def test_channels_must_be_on_known_hosts() -> None:
    request = start(None, subscribe_url="https://Orch:8935/a", publish_url="http://u:p@10.0.0.5:9/b")
    check_hosts(request, ())
    check_hosts(request, ("orch", "10.0.0.5"))
    check_hosts(request, ("orch:8935", "10.0.0.5:9"))
    with pytest.raises(InvalidRequest) as caught:
        check_hosts(request, ("orch:1", "10.0.0.50"))
    assert [violation.path for violation in caught.value.violations] == ["subscribe_url", "publish_url"]


@pytest.mark.parametrize("body", [None, [], "text", 3, True])
def test_bodies_that_are_no_object_are_malformed(body: Any) -> None:
    with pytest.raises(MalformedRequest):
        parse_start(body, require_id=True)
    with pytest.raises(MalformedRequest):
        parse_update(body, WORKFLOW)


# ---- JSON


def test_numbers_stay_exact() -> None:
    assert read_json(b'{"seed": 18446744073709551615, "x": 0.1}') == {"seed": 18446744073709551615, "x": 0.1}


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-Infinity", "1e999", "", "{", "[" * 100_000, b"\xff"])
def test_what_json_does_not_know_is_malformed(text: Any) -> None:
    with pytest.raises(MalformedRequest):
        read_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["5", "Text", "prompts", "width", "params", "inputs", "class_type", "nodes", "x"]), inner
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_no_json_value_does_anything_but_parse_or_be_refused(body: Any) -> None:
    for parse in (
        lambda: parse_update(body, WORKFLOW),
        lambda: parse_start(body, require_id=False),
        lambda: start(body),
    ):
        try:
            parse()
        except (InvalidRequest, MalformedRequest) as exc:
            json.dumps(exc.as_json())


def test_nodes_of_a_document_and_of_a_prompt() -> None:
    assert {key: (node.title, node.class_type) for key, node in nodes_of(DOCUMENT).items()} == {
        "12": ("Mine", "KSampler")
    }
    assert nodes_of(WORKFLOW)["5"].title == "Sampler"
