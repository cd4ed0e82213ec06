"""What the README and docs/settings.md claim about settings, routes and statuses is what the code does."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web

from gateway_shim import config as shim_config
from gateway_shim import errors
from gateway_shim import settings as shim_settings
from gateway_shim.routes import byoc, live_video, params, system

from . import readme

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")

#: What a block may ask for, and test_readme_commands.py provides.
NEEDS = ("make", "files", "clone", "up", "byoc", "live")


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables in a text, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_settings_page_is_what_the_code_says():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == readme.settings_page(), "run `make settings`"


def test_settings_of_the_readme_exist_with_that_variable_and_default():
    known = {one.name: one for one in reversed(list(readme.settings()))}
    table = [row for row in rows(section("Settings")) if row[0] != "setting"]
    assert len(table) > 8
    for name, variable, default, _ in table:
        one = known[name.strip("`")]
        assert variable.strip("`") in one.variables, name
        words = one.default.startswith("`") or not one.default
        assert default == (one.default if words else ""), name


def test_variables_that_the_readme_names_are_read():
    known = {variable for one in readme.settings() for variable in one.variables} | {"HEADRACE_CONFIG"}
    secrets = {name for name, how in shim_settings.options().items() if how.secret}
    known |= {f"{variable}_FILE" for one in readme.settings() if one.name in secrets for variable in one.variables}
    prefixes = "HEADRACE|ORCH|CAPABILITY|AUTH|COMFYUI|MODEL"
    for file in (README, ROOT / "deploy" / "headrace.service"):
        for name in re.findall(rf"\b(?:{prefixes})_[A-Z_]+\b", file.read_text(encoding="utf-8")):
            assert name in known, f"{name} in {file.name}"


def test_settings_file_of_the_readme_is_accepted(tmp_path, monkeypatch):
    from engine import config as engine_config

    (block,) = (block for block in readme.blocks(README) if block.language == "toml")
    (tmp_path / "headrace.toml").write_text(block.text)
    monkeypatch.chdir(tmp_path)
    settings = shim_config.load({}, {})
    assert (settings.listen_host, settings.capacity) == ("0.0.0.0", 2)
    assert engine_config.read([], {}).device == "cuda:1"


def test_routes_of_the_readme_are_served():
    app = web.Application()
    for module in (byoc, live_video, params, system):
        module.add_routes(app.router)
    served = {resource.canonical for resource in app.router.resources()}
    named = set(re.findall(r"/[a-z][^`\s?,;]*", " ".join(row[0] for row in rows(section("HTTP API"))[1:])))
    assert len(named) > 8
    assert named <= served
    assert {"/api/stream/start", "/api/stream/params", "/api/stream/update"} <= served


def test_statuses_of_the_readme_are_those_of_the_errors():
    def below(kind: type) -> set[int]:
        return {kind.http_status}.union(*(below(child) for child in kind.__subclasses__()))

    sentence = section("HTTP API").partition("Statuses:")[2].partition("`POST")[0]
    assert {int(number) for number in re.findall(r"\b[45]\d\d\b", sentence)} == below(errors.HeadraceError)


def test_every_shell_block_of_the_readme_is_run():
    for block in readme.blocks(README):
        if block.language == "sh":
            assert block.marks in [{"test"}, *({"test", need} for need in NEEDS)], f"line {block.line}"
        assert block.language or not re.search(r"^(curl|make|git|pip|\.venv|export)\b", block.text, re.MULTILINE)


def test_update_of_the_readme_names_a_node_of_the_demo():
    prompt = json.loads((ROOT / "examples" / "workflows" / "demo.json").read_text())
    assert prompt["4"]["_meta"]["title"] == "Mix"
    assert "blend_factor" in prompt["4"]["inputs"]


@pytest.mark.parametrize("block", readme.commands(README), ids=lambda block: f"line {block.line}")
def test_commands_that_need_nothing_give_the_answer_of_the_readme(block, tmp_path):
    text = block.text.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    done = subprocess.run(
        ["bash", "-euc", text],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    if (wanted := readme.answer(README, block)) is not None:
        assert json.loads(done.stdout) == json.loads(wanted.text)
