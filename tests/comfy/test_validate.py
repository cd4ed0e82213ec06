"""What the real ComfyUI says about a prompt, in findings with paths."""

import copy

import pytest

from engine.graph.policy import Policy
from engine.graph.workflow import Severity, read

from .conftest import graph

GOOD = graph(
    blend=(
        "ImageBlend",
        {"image1": ["live", 0], "image2": ["live", 0], "blend_factor": 0.5, "blend_mode": "normal"},
    ),
    save=("SaveTensor", {"images": ["blend", 0]}),
)


def found(host, prompt):
    return {item.code: item for item in host.validate(prompt)}


def changed(**inputs):
    prompt = copy.deepcopy(GOOD)
    prompt["blend"]["inputs"].update(inputs)
    return prompt


def test_a_good_prompt_has_no_finding_and_stays_untouched(host):
    before = copy.deepcopy(GOOD)
    assert host.validate(GOOD) == []
    assert before == GOOD


def test_every_unknown_class_is_found_and_the_near_one_is_named(host):
    prompt = graph(a=("ImageBlendd", {}), b=("NobodyHasThis", {}), save=("SaveTensor", {"images": ["a", 0]}))
    findings = host.validate(prompt)
    assert [(item.code, item.path) for item in findings] == [("unknown_node", "nodes.a"), ("unknown_node", "nodes.b")]
    assert "ImageBlend" in findings[0].remedy
    assert "node pack" in findings[1].remedy


@pytest.mark.parametrize(
    ("inputs", "code", "remedy"),
    [
        ({"blend_factor": 2.0}, "out_of_range", "a number from 0.0 to 1.0"),
        ({"blend_factor": -1.0}, "out_of_range", "a number from 0.0 to 1.0"),
        ({"blend_factor": "much"}, "wrong_type", "a number from 0.0 to 1.0"),
        ({"blend_mode": "nice"}, "unknown_choice", '"normal", "multiply"'),
        ({"image1": ["live", 1]}, "type_mismatch", "IMAGE"),
        ({"image1": ["live", 2]}, "unknown_output", "0 (IMAGE), 1 (MASK)"),
    ],
)
def test_a_wrong_input_is_found_with_its_path_and_what_is_allowed(host, inputs, code, remedy):
    finding = found(host, changed(**inputs))[code]
    (name,) = inputs
    assert finding.path == f"nodes.blend.inputs.{name}"
    assert (finding.node_id, finding.class_type, finding.input) == ("blend", "ImageBlend", name)
    assert remedy in finding.remedy


def test_a_missing_input_is_found(host):
    prompt = changed()
    del prompt["blend"]["inputs"]["image2"]
    finding = found(host, prompt)["missing_input"]
    assert finding.path == "nodes.blend.inputs.image2"
    assert "IMAGE" in finding.remedy


def test_several_outputs_are_all_checked(host):
    """ComfyUI runs what is valid and drops the rest; a live stream would lose an output without a word."""
    prompt = changed(blend_factor=5.0) | {"other": {"class_type": "SaveTensor", "inputs": {"images": ["live", 0]}}}
    assert found(host, prompt)["out_of_range"].node_id == "blend"


def test_values_are_taken_as_comfyui_converts_them(host):
    checked, findings = host.checked(changed(blend_factor="0.25"))
    assert findings == []
    assert checked["blend"]["inputs"]["blend_factor"] == 0.25


def test_a_node_that_runs_for_its_own_effect_is_a_warning(host):
    prompt = changed() | {"show": {"class_type": "PreviewAny", "inputs": {"source": ["live", 0]}}}
    (finding,) = host.validate(prompt)
    assert (finding.severity, finding.code, finding.node_id) == (Severity.WARNING, "foreign_output", "show")


class Checks:
    """A pack's node that looks at its own input, in the commonest shape."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "size": ("INT", {"default": 1}), "mode": (["a", "b"],)}}

    @classmethod
    def VALIDATE_INPUTS(cls, size):
        return True if size < 5 else "too large"

    def run(self, image, size, mode):
        return (image,)


@pytest.mark.parametrize(
    ("inputs", "code", "path", "says"),
    [
        ({"mode": "a"}, "missing_input", "nodes.it.inputs.size", "'size' is missing"),
        ({"mode": "a", "size": 9}, "custom_validation_failed", "nodes.it", "too large"),
        ({"mode": "a", "size": ["whole", 0]}, "check_failed", "nodes.it", "TypeError"),
    ],
)
def test_a_class_whose_own_check_raises_is_a_finding(host, inputs, code, path, says):
    class Whole:
        CATEGORY, RETURN_TYPES, FUNCTION = "fakes", ("INT",), "run"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def run(self):
            return (1,)

    assert not host.add_nodes({"Checks": Checks, "Whole": Whole})
    prompt = graph(
        whole=("Whole", {}),
        it=("Checks", {"image": ["live", 0], **inputs}),
        save=("SaveTensor", {"images": ["it", 0]}),
        other=("ImageBlend", {"image1": ["live", 0], "image2": ["live", 0], "blend_factor": 7.0, "blend_mode": "x"}),
        also=("SaveTensor", {"images": ["other", 0]}),
    )
    findings = found(host, prompt)
    assert findings[code].path.startswith(path)
    assert says in findings[code].message
    assert {"out_of_range", "unknown_choice"} <= findings.keys(), "what is wrong elsewhere is said all the same"


@pytest.mark.parametrize("class_type", ["LoadImage", "LoadImageMask"])
@pytest.mark.parametrize("way", ["path", "wrapped", "twice", "linked"])
def test_an_allowed_file_node_takes_the_files_that_it_lists_and_no_others(
    host, tmp_path, monkeypatch, class_type, way
):
    from PIL import Image

    class Anything:
        CATEGORY, RETURN_TYPES, FUNCTION = "fakes", ("*",), "run"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"text": ("STRING",)}}

        def run(self, text):
            return (text,)

    assert not host.add_nodes({"Anything": Anything})
    monkeypatch.setattr(host, "policy", Policy(allow=(class_type,)))
    secret = str(tmp_path / "secret.png")
    Image.new("RGB", (8, 8), (200, 10, 10)).save(secret)
    image = {
        "path": secret,
        "wrapped": {"__value__": secret},
        "twice": {"__value__": {"__value__": secret}},
        "linked": ["any", 0],
    }[way]
    document = {
        "1": {"class_type": "PrimaryInputLoadImage", "inputs": {}},
        "any": {"class_type": "Anything", "inputs": {"text": secret}},
        "2": {"class_type": class_type, "inputs": {"image": image, "channel": "red"}},
        "3": {"class_type": "MaskToImage", "inputs": {"mask": ["2", 0 if class_type == "LoadImageMask" else 1]}},
        "4": {"class_type": "SaveTensor", "inputs": {"images": ["3", 0]}},
    }
    reading = read(document)
    codes = {item.code for item in (*reading.findings, *host.validate(reading.prompt))}
    assert "missing_file" in codes
