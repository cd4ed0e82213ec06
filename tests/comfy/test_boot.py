"""Finding and booting ComfyUI."""

import logging
import sys
import threading

import pytest

from engine.graph.comfy import OLDEST_VERSION, ComfyHost, ComfyUnavailable, version_in


def test_every_pack_of_the_embedded_comfyui_loads(host):
    assert host.failed_packs == ()
    assert tuple(map(int, host.version.split("."))) >= OLDEST_VERSION
    assert len(host.definitions) > 300


def test_definitions_of_v1_and_v3_nodes(host):
    blend = host.definitions["ImageBlend"]
    factor = blend.input("blend_factor")
    assert (factor.type, factor.minimum, factor.maximum, factor.default_json) == ("FLOAT", 0.0, 1.0, "0.5")
    assert "multiply" in blend.input("blend_mode").choices
    flip = host.definitions["ImageFlip"]
    assert flip.input("flip_method").choices
    assert flip.inputs[0].type == "IMAGE"
    assert [item.type for item in flip.outputs] == ["IMAGE"]
    assert host.definitions["KSampler"].input("seed").maximum == 2**64 - 1
    assert host.definitions["SaveTensor"].pack.startswith("engine.")


def test_loading_again_gives_the_same_host(host):
    assert ComfyHost.load(host.directory) is host


def test_another_directory_in_the_same_process_is_refused(host, tmp_path):
    with pytest.raises(ComfyUnavailable, match="restart"):
        ComfyHost.load(tmp_path)


def test_another_thread_is_refused(host):
    errors = []

    def call() -> None:
        try:
            host.validate({})
        except RuntimeError as exc:
            errors.append(str(exc))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert errors == ["ComfyUI belongs to the thread that loaded it"]


def test_nothing_listens_and_nothing_is_printed(host):
    server = sys.modules["server"].PromptServer.instance
    server.send_sync("progress_state", {}, None)
    assert sys.modules["comfy.utils"].PROGRESS_BAR_ENABLED is False

    @server.routes.get("/some/page")
    def page() -> None: ...


def test_absent_packages_are_stood_in_for_until_they_are_called(host):
    if "torchaudio" not in host.stand_ins:
        pytest.skip("torchaudio is installed")
    import torchaudio

    with pytest.raises(RuntimeError, match="torchaudio is not installed"):
        torchaudio.functional.resample(1, 2, 3)
    assert not hasattr(torchaudio, "__version__")


def test_lines_of_comfyui_are_kept_to_one_a_second(host, caplog):
    def line(path: str) -> logging.LogRecord:
        return logging.LogRecord("root", logging.WARNING, str(host.directory / path), 7, "text", (), None)

    passes = [logging.getLogger().filter(line("comfy/sd.py")) for _ in range(30)]
    assert [bool(item) for item in passes] == [True] + [False] * 29
    assert not logging.getLogger().filter(line("execution.py"))
    assert logging.getLogger().filter(
        logging.LogRecord("root", logging.WARNING, "/elsewhere.py", 7, "text", (), None)
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "is not a ComfyUI, it has no nodes.py"),
        (["nodes.py", "execution.py", "comfy", "comfy_execution"], "is ComfyUI of unknown version"),
    ],
)
def test_what_is_no_comfyui_is_refused_with_a_sentence(tmp_path, files, words):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ComfyUnavailable, match=words):
        version_in(tmp_path)
    with pytest.raises(ComfyUnavailable, match="not a directory"):
        version_in(tmp_path / "nowhere")


def test_an_old_comfyui_is_refused(tmp_path):
    for name in ("nodes.py", "execution.py", "comfy", "comfy_execution"):
        (tmp_path / name).touch()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.3.40"\n')
    with pytest.raises(ComfyUnavailable, match=r"0\.3\.52 is the oldest"):
        version_in(tmp_path)
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.3.52"\n')
    assert version_in(tmp_path) == "0.3.52"
