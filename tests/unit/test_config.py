"""Settings: which source wins, what is refused and how, what is never shown."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from gateway_shim.config import SettingsError, add_arguments, describe, load
from gateway_shim.settings import Settings, options
from proto import engine_address


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(arguments: dict[str, str] | None = None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(arguments or {}, environ or {})
    assert all(sentence.endswith((".", "?")) for sentence in caught.value.sentences)
    return str(caught.value)


def test_defaults_are_loopback_8188_and_no_orchestrator() -> None:
    settings = load({}, {})
    assert settings == Settings()
    assert (settings.listen_host, settings.listen_port, settings.orch_url) == ("127.0.0.1", 8188, "")
    assert settings.body_limit_bytes >= 10 * 2**20
    assert settings.engine_address == engine_address()
    assert all(row.source == "default" for row in describe(settings))


def test_command_line_then_environment_then_file_then_default() -> None:
    Path("headrace.toml").write_text('[shim]\ncapacity = 2\nlisten_port = 1002\npipeline = "p"\n[engine]\nx = 1\n')
    environ = {"HEADRACE_CAPACITY": "3", "HEADRACE_LISTEN_PORT": "1003"}
    settings = load({"capacity": "4"}, environ)
    assert (settings.capacity, settings.listen_port, settings.pipeline) == (4, 1003, "p")
    assert {row.name: row.source for row in describe(settings) if row.source != "default"} == {
        "capacity": "command line --capacity",
        "listen_port": "environment HEADRACE_LISTEN_PORT",
        "pipeline": "pipeline in headrace.toml",
    }


def test_the_ecosystems_own_variables_are_read() -> None:
    settings = load(
        {},
        {
            "ORCH_URL": "https://orch:8935/",
            "ORCH_SECRET": "hush",
            "CAPABILITY_NAME": "blur",
            "CAPABILITY_DESCRIPTION": "blurs",
            "CAPABILITY_URL": "http://10.0.0.5:8188/",
            "CAPABILITY_PRICE_PER_UNIT": "5",
            "CAPABILITY_PRICE_SCALING": "10",
            "CAPABILITY_CURRENCY": "eth",
            "CAPABILITY_CAPACITY": "3",
            "AUTH_TOKEN": "tok",
            "PIPELINE": "byoc",
            "HEADRACE_TRICKLE_HOSTS": "Media.example:8935, 10.0.0.9",
        },
    )
    assert (settings.orch_url, settings.public_url()) == ("https://orch:8935", "http://10.0.0.5:8188")
    assert (settings.capability_price_per_unit, settings.capability_price_scaling) == (5, 10)
    assert (settings.capacity, settings.capability_currency, settings.pipeline) == (3, "eth", "byoc")
    assert (settings.orch_secret, settings.auth_token) == ("hush", "tok")
    assert settings.model_id == "blur"
    assert settings.channel_hosts == ("media.example:8935", "10.0.0.9", "orch")


def test_an_empty_variable_is_not_set() -> None:
    assert load({}, {"ORCH_URL": "", "HEADRACE_CAPACITY": " "}) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HEADRACE_LISTEN_PORT", "70000"),
        ("HEADRACE_LISTEN_PORT", "http"),
        ("CAPABILITY_CAPACITY", "0"),
        ("CAPABILITY_CAPACITY", "1.5"),
        ("ORCH_URL", "orch:8935"),
        ("ORCH_URL", "https://orch:99999"),
        ("CAPABILITY_PRICE_SCALING", "0"),
        ("CAPABILITY_CURRENCY", "12"),
        ("CAPABILITY_NAME", "two words"),
        ("MODEL_ID", "comfyui"),
        ("MODEL_ID", "streamdiffusion-sdxl"),
        ("HEADRACE_DRAIN_S", "nan"),
        ("HEADRACE_LOG_FORMAT", "xml"),
        ("HEADRACE_VERIFY_TLS", "perhaps"),
        ("HEADRACE_TRICKLE_HOSTS", "https://x/"),
        ("HEADRACE_DEFAULT_WORKFLOW", "/no/such/file.json"),
        ("ORCH_SECRET_FILE", "/no/such/file"),
        ("HEADRACE_CONFIG", "/no/such/file.toml"),
    ],
)
def test_nonsense_is_refused_with_its_source_and_what_is_allowed(name: str, value: str) -> None:
    sentence = refusal({}, {name: value})
    assert value in sentence
    assert name in sentence or name == "HEADRACE_CONFIG"


def test_everything_wrong_is_said_at_once() -> None:
    Path("headrace.toml").write_text("[shim]\nlisten_prt = 1\ncapacity = true\n")
    sentences = refusal({"log_level": "loud"}, {"PIPELINE": "a b"}).splitlines()
    assert len(sentences) == 4
    assert "listen_prt in [shim] of headrace.toml is not a setting. Did you mean listen_port?" in sentences


def test_a_broken_file_is_refused() -> None:
    Path("headrace.toml").write_text("[shim\n")
    assert "headrace.toml" in refusal()
    Path("headrace.toml").write_text("shim = 3\n")
    assert "[shim]" in refusal()


@pytest.mark.parametrize("source", ["ORCH_SECRET_FILE", "HEADRACE_ORCH_SECRET_FILE", "argument", "toml"])
def test_secrets_come_from_files_and_are_never_shown(source: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("hush-hush\n")
    if source == "toml":
        Path("headrace.toml").write_text(f'[shim]\norch_secret_file = "{file}"\n')
    settings = load(
        {"orch_secret_file": str(file)} if source == "argument" else {},
        {source: str(file)} if source.isupper() else {},
    )
    assert settings.orch_secret == "hush-hush"
    assert "hush" not in repr(settings)
    assert not any("hush" in row.value + row.source for row in describe(settings))
    assert next(row for row in describe(settings) if row.name == "orch_secret").value == "(set, hidden)"


def test_a_secret_with_two_lines_is_refused_without_showing_it() -> None:
    sentence = refusal({}, {"AUTH_TOKEN": "hush\nhush"})
    assert "auth_token" in sentence
    assert "hush" not in sentence


def test_secrets_are_no_arguments() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert "--auth-token-file" in flags
    assert "--auth-token" not in flags
    assert {f"--{name.replace('_', '-')}" for name, how in options().items() if not how.secret} <= flags
    assert load(vars(parser.parse_args(["--capacity", "2"])), {}).capacity == 2


def test_an_orchestrator_needs_an_address_to_call_back() -> None:
    assert "CAPABILITY_URL" in refusal({}, {"ORCH_URL": "https://o:1", "HEADRACE_LISTEN_HOST": "0.0.0.0"})
    settings = load({}, {"ORCH_URL": "https://o:1"})
    assert settings.public_url(4711) == "http://127.0.0.1:4711"
    assert Settings(listen_host="::1").public_url() == "http://[::1]:8188"
    assert Settings(listen_host="0.0.0.0").local_url(1) == "http://127.0.0.1:1"


def test_without_orchestrator_and_allow_list_any_channel_host_is_allowed() -> None:
    assert Settings().channel_hosts == ()
    assert Settings(trickle_hosts=("a",)).channel_hosts == ("a",)
    assert Settings(trickle_hosts=("a", "*"), orch_url="http://o:1").channel_hosts == ()


def test_several_engines_are_numbered_sockets_or_a_list(tmp_path: Path) -> None:
    many = load({}, {"HEADRACE_ENGINES": "2", "HEADRACE_RUN_DIR": str(tmp_path)})
    assert many.engine_addresses == (f"unix:{tmp_path}/engine-0.sock", f"unix:{tmp_path}/engine-1.sock")
    assert Settings(engine_address="a:1, dns:///b:2").engine_addresses == ("a:1", "dns:///b:2")
    assert len(Settings().engine_addresses) == 1


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().capacity = 3  # type: ignore[misc]
