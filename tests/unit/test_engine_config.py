"""Settings: which source wins, and what is refused with which words."""

from pathlib import Path

import pytest

from engine.config import MAX_SOCKET_PATH_BYTES, SettingsError, read
from proto import MAX_MESSAGE_BYTES

NONE = {"COMFYUI_DIR": "none"}


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "headrace.toml"
    path.write_text("[engine]\nmax_sessions = 3\nmax_width = 1920\nmax_height = 1080\n[shim]\nport = 1\n")
    return path


def test_command_line_beats_environment_beats_file_beats_default(toml: Path) -> None:
    environ = NONE | {"HEADRACE_ENGINE_MAX_SESSIONS": "4", "HEADRACE_ENGINE_MAX_WIDTH": "1280"}
    settings = read(["--config", str(toml), "--max-sessions", "5"], environ)
    assert (settings.max_sessions, settings.max_width, settings.max_height) == (5, 1280, 1080)
    assert settings.max_message_bytes == MAX_MESSAGE_BYTES
    assert read([], environ | {"HEADRACE_CONFIG": str(toml)}).max_height == 1080


def test_socket_lies_in_the_run_directory(tmp_path: Path) -> None:
    settings = read([], NONE | {"HEADRACE_RUN_DIR": str(tmp_path)})
    assert settings.socket_path == tmp_path / "engine-0.sock"
    assert read(["--address", "unix:/run/x.sock"], NONE).socket_path == Path("/run/x.sock")


def test_comfyui_is_a_directory_with_nodes(tmp_path: Path) -> None:
    (tmp_path / "nodes.py").touch()
    assert read([], {"COMFYUI_DIR": str(tmp_path)}).comfyui_dir == tmp_path
    assert read([], NONE).comfyui_dir is None


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        ([], {"HEADRACE_ENGINE_MAX_SESSIONS": "0"}, ["HEADRACE_ENGINE_MAX_SESSIONS is '0'", "from 1 to 1024"]),
        ([], {"HEADRACE_ENGINE_GRACE_S": "nan"}, ["HEADRACE_ENGINE_GRACE_S is 'nan'"]),
        (["--runner", "fastest"], {}, ["--runner is 'fastest'", "auto, plan, executor"]),
        (["--device", "tpu"], {}, ["--device is 'tpu'", "cuda:0"]),
        (["--log-level", "loud"], {}, ["--log-level is 'loud'"]),
        (["--address", "unix:relative.sock"], {}, ["--address", "absolute"]),
        (["--address", "unix:/" + "x" * MAX_SOCKET_PATH_BYTES], {}, ["--address", "107 bytes"]),
        (["--address", "localhost"], {}, ["--address is 'localhost'"]),
        ([], {"COMFYUI_DIR": "/nonexistent"}, ["COMFYUI_DIR is '/nonexistent'", "no ComfyUI"]),
        (["--address", "0.0.0.0:50051"], {}, ["0.0.0.0:50051", "--insecure-tcp"]),
        (["--address", "example.org:50051"], {}, ["example.org:50051", "--insecure-tcp"]),
        (["--config", "/nonexistent.toml"], {}, ["/nonexistent.toml cannot be read"]),
    ],
)
def test_nonsense_is_refused_with_its_source(argv: list[str], environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        read(argv, NONE | environ)
    for word in words:
        assert word in str(caught.value)


def test_misspelt_setting_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text("[engine]\nmax_sesions = 3\n")
    with pytest.raises(SettingsError, match="max_sesions"):
        read(["--config", str(path)], NONE)


def test_wrong_value_in_the_file_names_file_and_setting(tmp_path: Path) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text("[engine]\nmax_sessions = true\n")
    with pytest.raises(SettingsError, match=r"max_sessions in \[engine\] of .*headrace.toml is 'True'"):
        read(["--config", str(path)], NONE)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:50051", "localhost:50051"])
def test_loopback_needs_no_flag(address: str) -> None:
    assert read(["--address", address], NONE).address == address


def test_other_addresses_need_the_flag() -> None:
    assert read(["--address", "0.0.0.0:50051", "--insecure-tcp"], NONE).insecure_tcp
