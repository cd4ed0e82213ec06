"""The policy's table against the classes of the loaded ComfyUI: what touches files is there, no model loader is."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

from engine.graph.io_nodes import NODE_CLASSES
from engine.graph.policy import Policy

#: What reads or writes in the folders of ComfyUI, by the names of its own functions, or a file directly.
TOUCHES = re.compile(
    r"get_(input|output|temp)_directory|get_save_image_path|get_annotated_filepath|get_input_subfolders"
    r"|\bopen\(|urlopen|requests\.|subprocess|os\.system|(?<!\.)\b(eval|exec)\("
)
#: Always a live output.
HARMLESS = {"PreviewImage"}


@functools.cache
def classes_of(file: str) -> dict[str, str]:
    """Source of every class of a module, by name; ``inspect.getsource`` would parse the file for each."""
    text = Path(file).read_text(encoding="utf-8")
    lines = text.splitlines()
    tree = ast.parse(text)
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def source_of(kind: type) -> str:
    """Of a class of ComfyUI's own node modules; nothing of others."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return classes_of(file).get(kind.__name__, "") if re.search(r"/(nodes|comfy_extras/\w+)\.py$", file) else ""


def test_every_core_class_that_touches_files_is_refused(host):
    nodes = sys.modules["nodes"]
    touching = set()
    for class_type in host.definitions.keys() - NODE_CLASSES.keys():
        bases = nodes.NODE_CLASS_MAPPINGS[class_type].__mro__
        if any(TOUCHES.search(source_of(base)) for base in bases):
            touching.add(class_type)
    assert {"SaveImage", "LoadImage", "LoadLatent", "SaveVideo", "SaveTrainingDataset"} <= touching
    allowed = {name for name in touching if not Policy().reason(name, host.definitions[name].category)}
    assert allowed - HARMLESS == set()


def test_every_output_of_core_is_ours_or_refused_or_shows_a_value(host):
    mine = {name for name, item in host.definitions.items() if item.output_node and not Policy().reason(name)}
    # Every PreviewImage becomes a live output before the policy sees it.
    assert mine - NODE_CLASSES.keys() == {"PreviewAny", "SaveImageWebsocket", "PreviewImage"}


def test_no_model_loader_is_refused(host):
    loaders = [name for name, item in host.definitions.items() if any(field.folder for field in item.inputs)]
    assert len(loaders) > 20
    assert {"CheckpointLoaderSimple", "UpscaleModelLoader", "TripleCLIPLoader", "VAELoader"} <= set(loaders)
    assert [name for name in loaders if Policy().reason(name)] == []


def test_an_allowed_file_has_to_be_one_that_the_class_lists(host, monkeypatch):
    monkeypatch.setattr(host, "policy", Policy(allow=("LoadImage",)))
    prompt = {
        "1": {"class_type": "LoadTensor", "inputs": {}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "../../../../../etc/hostname"}},
        "3": {"class_type": "ImageBatch", "inputs": {"image1": ["1", 0], "image2": ["2", 0]}},
        "4": {"class_type": "SaveTensor", "inputs": {"images": ["3", 0]}},
    }
    assert [(item.code, item.path) for item in host.validate(prompt)] == [("missing_file", "nodes.2.inputs.image")]
    prompt["2"]["inputs"]["image"] = next(iter(host.definitions["LoadImage"].input("image").choices))
    assert host.validate(prompt) == []


def test_a_model_that_came_after_the_start_is_there(host, tmp_path):
    folder_paths = sys.modules["folder_paths"]
    prompt = {
        "1": {"class_type": "LoadTensor", "inputs": {}},
        "2": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "late.pth"}},
        "3": {"class_type": "ImageUpscaleWithModel", "inputs": {"upscale_model": ["2", 0], "image": ["1", 0]}},
        "4": {"class_type": "SaveTensor", "inputs": {"images": ["3", 0]}},
    }
    (finding,) = host.validate(prompt)
    assert finding.code == "missing_model"
    assert "models/upscale_models" in finding.remedy
    folder_paths.add_model_folder_path("upscale_models", str(tmp_path))
    try:
        (tmp_path / "late.pth").touch()
        host.look_for_models(["UpscaleModelLoader", "Nobody"])
        assert host.validate(prompt) == []
        (tmp_path / "late.pth").rename(tmp_path / "Late2.pth")
        host.look_for_models(["UpscaleModelLoader"])
        (finding,) = host.validate(prompt)
        assert "did you mean 'Late2.pth'?" in finding.remedy
    finally:
        folder_paths.folder_names_and_paths["upscale_models"][0].remove(str(tmp_path))
        folder_paths.filename_list_cache.pop("upscale_models", None)
