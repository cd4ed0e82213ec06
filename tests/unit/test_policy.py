"""Which classes workflows from the network may use, and who brings the classes that are missing."""

from __future__ import annotations

import pytest

from engine.config import SettingsError, read
from engine.graph.models import Listing, with_folders
from engine.graph.packs import PACKS, pack_of
from engine.graph.policy import NETWORK, READS, RUNS, TABLE, WRITES, Policy, reads_files
from engine.graph.schema import InputDefinition, NodeDefinition


@pytest.mark.parametrize(
    ("class_type", "reason"),
    [
        ("LoadImage", READS), ("LoadImageMask", READS), ("LoadVideo", READS),
        ("LoadImageTextDataSetFromFolder", READS),
        ("SaveAnimatedWEBP", WRITES), ("SaveImageExtendedByAPack", WRITES), ("MaskPreview", WRITES),
        ("VHS_VideoCombine", WRITES), ("VHS_LoadImagesPath", READS), ("LoadImageFromUrl", NETWORK),
        ("ExecPythonCode", RUNS),
        ("LoadTensor", ""), ("SaveTensor", ""), ("SaveAudioTensor", ""), ("SaveTextTensor", ""),
        ("PrimaryInputLoadImage", ""), ("CheckpointLoaderSimple", ""), ("LoraLoader", ""), ("ImageBlur", ""),
        ("DownloadAndLoadFlorence2Model", ""), ("PreviewAny", ""), ("SaveImageWebsocket", ""), ("loadimage", ""),
    ],
)  # fmt: skip
def test_what_touches_this_machine_is_refused_and_models_are_not(class_type, reason):
    assert Policy().reason(class_type) == reason
    assert reads_files(class_type) == (reason == READS)


def test_nodes_of_services_are_refused_by_their_category():
    assert Policy().reason("Anything", "api node/image/Vendor") == NETWORK
    assert Policy().reason("Anything", "api/image") == ""


def test_the_operator_allows_and_denies_and_a_denial_wins():
    policy = Policy(allow=("LoadImage", "VHS_*", "Image*"), deny=("Image[BS]*",))
    assert policy.reason("LoadImage") == policy.reason("VHS_LoadVideo") == policy.reason("ImageFlip") == ""
    assert "deny_nodes" in policy.reason("ImageBlur")
    assert policy.reason("LoadImageMask") == READS
    assert Policy(deny=("*",)).reason("SaveTensor") == "", "the live ends are ours"


def test_a_refusal_says_how_to_allow_it():
    prompt = {"3": {"class_type": "LoadVideo", "inputs": {}, "_meta": {"title": "Film"}}}
    (finding,) = Policy().check(prompt, {})
    assert (finding.code, finding.path, finding.title) == ("refused_node", "nodes.3", "Film")
    assert "HEADRACE_ENGINE_ALLOW_NODES=LoadVideo" in finding.remedy
    assert "deny_nodes" in Policy(deny=("LoadVideo",)).check(prompt, {})[0].message


@pytest.mark.parametrize(
    ("given", "patterns"), [("LoadImage, VHS_* ,Image Save", ("LoadImage", "VHS_*", "Image Save")), (" ", ())]
)
def test_patterns_come_from_the_environment(given, patterns):
    assert read([], {"HEADRACE_ENGINE_ALLOW_NODES": given}).allow_nodes == patterns


def test_patterns_come_from_the_settings_file(tmp_path):
    file = tmp_path / "headrace.toml"
    file.write_text('[engine]\ndeny_nodes = ["KSampler", "*Loader"]\n')
    assert read(["--config", str(file)], {}).deny_nodes == ("KSampler", "*Loader")
    file.write_text("[engine]\ndeny_nodes = 3\n")
    with pytest.raises(SettingsError, match="deny_nodes"):
        read(["--config", str(file)], {})


@pytest.mark.parametrize(
    ("class_type", "pack"),
    [
        ("DepthAnythingTensorrt", "yuvraj108c/ComfyUI-Depth-Anything-Tensorrt"),
        ("STATIC_TRT_MODEL_CONVERSION", "yondonfu/ComfyUI_TensorRT"),
        ("ONNX_FP8_EXPORT", "yondonfu/ComfyUI_TensorRT"),
        ("MediaPipe-FaceMeshPreprocessor", "Fannovel16/comfyui_controlnet_aux"),
        ("MaskPreview+", "cubiq/ComfyUI_essentials"),
        ("ImageBlurr", ""),
    ],
)
def test_the_table_knows_who_brings_a_class(class_type, pack):
    assert pack_of(class_type) == pack


def test_tables_name_repositories_and_have_no_entry_twice():
    for table in (PACKS, TABLE):
        assert len({pattern for pattern, _ in table}) == len(table)
    assert all(pack.count("/") == 1 and " " not in pack for _, pack in PACKS)


def test_a_mark_travels_with_the_choices_through_what_loaders_do_to_them():
    listing = Listing(["a", "b"], "vae")
    for made in (["None"] + listing, listing + ["x"], listing[:1], listing):  # noqa: RUF005
        assert made.folder == "vae"
    assert listing[0] == "a"


def test_choices_that_lost_their_mark_get_their_folder_by_order():
    inputs = (
        InputDefinition("config", "COMBO", True, folder="configs"),
        InputDefinition("mode", "COMBO", True, choices=("fast", "good")),
        InputDefinition("one", "COMBO", True),
        InputDefinition("two", "COMBO", True, choices=("b",)),
        InputDefinition("other", "COMBO", True),
    )
    node = NodeDefinition("Loader", "", "", "", inputs, (), False, "")
    listings = [Listing([], "configs"), Listing([], "vae"), Listing(["b"], "loras")]
    assert [item.folder for item in with_folders(node, listings).inputs] == ["configs", "", "vae", "loras", ""]
