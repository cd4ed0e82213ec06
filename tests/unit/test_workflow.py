"""What is accepted as a workflow, what becomes live in it, and how a refusal reads."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.graph.runner import PassThroughRunner, TickInput
from engine.graph.workflow import (
    MAX_NODE_ID,
    MAX_NODES,
    PASS_THROUGH,
    Finding,
    Severity,
    Workflow,
    WorkflowError,
    parse,
)
from gateway_shim import keys

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "workflows").glob("*.json"))


def node(class_type: str, title: str = "", **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs} | ({"_meta": {"title": title}} if title else {})


def refused(source: Any) -> dict[str, Any]:
    """The findings by code."""
    with pytest.raises(WorkflowError) as caught:
        parse(source)
    return {finding.code: finding for finding in caught.value.findings}


@pytest.mark.parametrize("source", [None, "", "  \n", b""])
def test_nothing_means_pass_through(source):
    workflow = parse(source)
    assert workflow.prompt == PASS_THROUGH
    assert workflow.is_pass_through


def test_pass_through_is_a_copy_each_time():
    parse(None).prompt["1"]["inputs"]["x"] = 1
    assert PASS_THROUGH["1"]["inputs"] == {}


def test_load_and_preview_become_live_and_keep_ids_titles_and_links():
    document = {
        "7": node("LoadImage", "Camera", image="example.png"),
        "9": node("SaveImage", "Out", images=["7", 0], filename_prefix="x"),
    }
    before = copy.deepcopy(document)
    workflow = parse(json.dumps(document))
    assert workflow.prompt["7"] == node("LoadTensor", "Camera")
    assert workflow.prompt["9"] == node("SaveTensor", "Out", images=["7", 0], filename_prefix="x")
    assert (workflow.image_inputs, workflow.image_outputs) == (("7",), ("9",))
    assert workflow.is_pass_through
    assert parse(document).prompt == workflow.prompt
    assert document == before, "the caller's document was written to"


def test_primary_input_is_live_and_other_files_stay_files():
    workflow = parse(
        {
            "1": node("PrimaryInputLoadImage", image="a.png"),
            "2": node("LoadImage", image="logo.png"),
            "3": node("LoadImage", image="mask.png"),
            "4": node("ImageBlend", image1=["1", 0], image2=["2", 0]),
            "5": node("PreviewImage", images=["4", 0]),
        }
    )
    assert workflow.image_inputs == ("1",)
    assert workflow.prompt["2"] == node("LoadImage", image="logo.png")
    assert not workflow.is_pass_through


def test_a_mask_output_is_not_pass_through():
    assert not parse({"1": node("LoadTensor"), "2": node("SaveTensor", images=["1", 1])}).is_pass_through


def test_foreign_fields_of_a_node_do_not_travel():
    document = {"1": node("LoadTensor") | {"is_changed": 1}, "2": node("SaveTensor", images=["1", 0])}
    assert "is_changed" not in parse(document).prompt["1"]


def test_every_violation_comes_at_once_with_its_place():
    findings = refused(
        {
            "1": node("LoadTensor", "In"),
            "2": node("ImageBlend", "Mix", image1=["11", 0], image2=["1", True], factor=[1, 0]),
            "3": node("Loop", a=["4", 0]),
            "4": node("Loop", a=["3", 0]),
            "5": node("PrimaryInputLoadImage"),
            "6": node("PrimaryInputLoadImage"),
        }
    )
    assert set(findings) == {"unknown_link", "bad_link", "cycle", "too_many_primary_inputs", "missing_output"}
    link = findings["unknown_link"]
    assert (link.path, link.node_id, link.class_type, link.title, link.input) == (
        "nodes.2.inputs.image1", "2", "ImageBlend", "Mix", "image1",
    )  # fmt: skip
    assert "'1'" in link.remedy
    assert all(finding.message and finding.remedy for finding in findings.values())


@pytest.mark.parametrize(
    ("classes", "code", "words"),
    [
        (["LoadTensor"], "missing_output", "missing output"),
        (
            ["LoadTensor", "LoadTensor", "LoadAudioTensor", "SaveTensor"],
            "too_many_inputs",
            "too many inputs in prompt",
        ),
        (["LoadTensor"] + ["SaveTextTensor"] * 4, "too_many_outputs", "too many outputs in prompt"),
        (
            ["PrimaryInputLoadImage"] * 2 + ["SaveTensor"],
            "too_many_primary_inputs",
            "too many primary inputs in prompt",
        ),
        (["LoadImage", "LoadImage", "SaveTensor"], "ambiguous_input", "which is live"),
    ],
)
def test_limits_of_comfystream(classes, code, words):
    findings = refused({str(index): node(name) for index, name in enumerate(classes)})
    assert words in findings[code].message


def test_the_limits_themselves_are_allowed():
    document = {str(index): node(name) for index, name in enumerate(["LoadTensor", "LoadAudioTensor"])}
    document |= {str(index + 2): node("SaveTextTensor") for index in range(3)}
    workflow = parse(document)
    assert workflow.audio_inputs == ("1",)
    assert workflow.text_outputs == ("2", "3", "4")


@pytest.mark.parametrize(
    ("classes", "code"),
    [(["SaveTensor"], "missing_input"), (["LoadTensor", "SaveAudioTensor"], "missing_audio_input")],
)
def test_what_depends_on_nothing_live_is_a_warning(classes, code):
    workflow = parse({str(index): node(name) for index, name in enumerate(classes)})
    assert [(item.severity, item.code) for item in workflow.warnings] == [(Severity.WARNING, code)]


def test_several_pictures_are_a_warning_that_says_which_one_is_seen():
    workflow = parse({"1": node("LoadTensor"), "2": node("SaveTensor", images=["1", 0]), "3": node("PreviewImage")})
    assert [(item.severity, item.code) for item in workflow.warnings] == [(Severity.WARNING, "several_outputs")]
    assert "node 2" in workflow.warnings[0].message


def test_the_editors_own_format_is_recognised():
    finding = refused({"last_node_id": 3, "nodes": [{"id": 1}], "links": [], "version": 0.4})["ui_format"]
    assert "export it in API format" in finding.remedy


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("{", "not_json"),
        ('{"1": {"class_type": "A", "inputs": {"x": NaN}}}', "not_json"),
        (b"\xff\xfe\x00", "not_json"),
        ("[" * 100_000, "not_json"),
        ("[]", "not_a_workflow"),
        ("3", "not_a_workflow"),
        ({}, "empty_workflow"),
        ({"prompt": {"1": {}}}, "missing_class_type"),
        ({"1": "LoadImage"}, "not_a_node"),
        ({"1": {"class_type": 5}}, "missing_class_type"),
        ({"1": {"class_type": "A", "inputs": []}}, "bad_inputs"),
        ({1: {"class_type": "A"}}, "bad_node_id"),
        ({"n" * (MAX_NODE_ID + 1): node("LoadTensor")}, "bad_node_id"),
        ({str(index): node("A") for index in range(MAX_NODES + 1)}, "too_many_nodes"),
    ],
)
def test_what_is_no_workflow_is_refused_with_a_sentence(source, code):
    finding = refused(source)[code]
    assert finding.message
    assert finding.remedy


def test_a_node_id_that_is_too_long_is_named_in_a_path_that_is_not():
    document = {"n" * MAX_NODE_ID: node("LoadTensor"), "2": node("SaveTensor", images=["n" * MAX_NODE_ID, 0])}
    assert parse(document).is_pass_through
    finding = refused(document | {"n" * 64_500: node("LoadTensor")})["bad_node_id"]
    assert finding.path == f"nodes.{'n' * 77}..."
    assert "64500 characters" in finding.message
    assert finding.remedy == "give it at most 256"


def test_both_programs_take_the_same_node_ids():
    assert MAX_NODE_ID == keys.MAX_NODE_ID


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
NODE = st.fixed_dictionaries(
    {"class_type": st.sampled_from(["LoadTensor", "SaveTensor", "LoadImage", "X"]), "inputs": JSON | st.just({})}
)


@given(JSON | st.dictionaries(st.sampled_from("123"), NODE | JSON, max_size=3))
def test_any_json_gives_a_workflow_or_findings(document):
    findings: tuple[Finding, ...] = ()
    try:
        parse(document)
    except WorkflowError as refusal:
        findings = refusal.findings
        assert str(refusal)  # noqa: PT017 - it has one in every case
    assert not findings or any(item.severity is Severity.ERROR for item in findings)


def test_without_comfyui_only_pass_through_runs():
    runner = PassThroughRunner()
    runner.load(parse(None).prompt)
    picture: Any = object()
    assert runner.tick(TickInput(picture)).images is picture
    with pytest.raises(WorkflowError, match="make comfyui"):
        runner.load({"1": node("LoadTensor"), "2": node("ImageInvert", image=["1", 0])})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_have_titles_and_live_ends(path):
    workflow = parse(path.read_text())
    assert workflow.image_inputs
    assert workflow.image_outputs
    assert not workflow.warnings
    titles = [item.get("_meta", {}).get("title") for item in workflow.prompt.values()]
    assert all(titles)
    assert len(set(titles)) == len(titles), "titles are aliases in updates, so they differ"


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("taken", [True, False])
def test_the_mask_of_the_live_picture_is_memory_only_where_it_is_taken(taken: bool) -> None:
    torch = pytest.importorskip("torch")
    from engine.graph.io_nodes import LoadTensor, exchange_of
    from engine.graph.runner import TickInput

    prompt = {
        "live": {"class_type": "LoadTensor", "inputs": {}},
        "mask": {"class_type": "MaskToImage", "inputs": {"mask": ["live", 1] if taken else ["other", 1]}},
        "other": {"class_type": "Other", "inputs": {"image": ["live", 0]}},
    }
    assert Workflow(prompt).takes_mask is taken
    with exchange_of(TickInput(torch.ones(2, 4, 6, 3), takes_mask=taken)):
        _, mask = LoadTensor().load()
    assert torch.equal(mask, torch.zeros(2, 4, 6))
    assert mask.is_contiguous() is taken


@pytest.mark.parametrize("value", [5, "text", {"a": 1}, [1, 2, 3], ["a", "b"], [["1", 0]]])
def test_a_wrapped_value_is_read_as_nodes_get_it(value: Any) -> None:
    wrapped = {"__value__": {"__value__": value}}
    prompt = parse({"1": node("LoadTensor"), "2": node("SaveTensor", images=["1", 0], x=wrapped)}).prompt
    assert prompt["2"]["inputs"]["x"] == ({"__value__": value} if isinstance(value, list) else value)


@pytest.mark.parametrize("value", [["1", 0], ["nope", 3], ["2", 0], ["1", 0.5], ["1", True]])
def test_a_wrapped_list_that_comfyui_would_follow_is_no_value(value: list[Any]) -> None:
    document = {"1": node("LoadTensor"), "2": node("SaveTensor", images={"__value__": value})}
    assert refused(document)["bad_value"].path == "nodes.2.inputs.images"


@pytest.mark.parametrize("number", ["1e999", "-1e400"])
def test_a_number_that_no_double_holds_is_not_json(number: str) -> None:
    document = json.dumps({"1": node("LoadTensor"), "2": node("SaveTensor", images=["1", 0])})
    found = refused(document.replace('"images"', f'"x": {number}, "images"'))
    assert number in found["not_json"].message


def test_the_engines_own_prompt_reads_the_same_again() -> None:
    """DescribeSession gives it, and clients open the next session with it."""
    file_beside_the_primary_one = {
        "1": node("PrimaryInputLoadImage", "Camera"),
        "2": node("LoadImage", image="logo.png"),
        "3": node("SaveImage", images=["2", 0]),
    }
    more_than_two_inputs = {
        "1": node("PrimaryInputLoadImage"),
        "2": node("LoadTensor"),
        "3": node("LoadAudioTensor"),
        "4": node("SaveTensor", images=["1", 0]),
    }
    for document in (file_beside_the_primary_one, more_than_two_inputs):
        first = parse(document)
        again = parse(json.dumps(first.prompt))
        assert again.prompt == first.prompt
        assert [item.code for item in again.warnings] == [item.code for item in first.warnings]
        assert first.image_inputs[0] == "1"
