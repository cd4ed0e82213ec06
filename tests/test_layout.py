"""The house: what lies where, who imports whom, and how fast the small programs start."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cext
import engine
import gateway_shim
import proto

from . import readme

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("proto", "gateway_shim", "engine", "cext")

#: Top-level names of ComfyUI: a module of ours with one of these names would hide its, or be hidden (comfyui.md 1.3).
COMFYUI_OWNS = {
    "nodes", "execution", "server", "folder_paths", "utils", "app", "protocol", "middleware", "api_server",
    "node_helpers", "latent_preview", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_api_nodes",
    "comfy_config",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "pyproject.toml",
        "setup.py",
        "gateway_shim",
        "engine",
        "proto",
        "cext",
        "tests",
        "supervisord.conf",
        "README.md",
    ],
)
def test_names_that_others_rely_on_exist(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("package", [proto, gateway_shim, engine, cext])
def test_packages_come_from_this_checkout(package):
    # "proto" is also a common third-party package, "engine" is anybody's name.
    assert Path(package.__file__).resolve().parent == ROOT / package.__name__


def test_no_top_level_name_is_one_of_comfyui():
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not ours & COMFYUI_OWNS


def test_import_contracts_hold():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def modules(package: str) -> list[Path]:
    return [path for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name]


def names_used(path: Path) -> set[str]:
    """Dotted names that a module reads, such as os.environ."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_environment_is_read_by_the_two_config_modules_and_handed_on_by_the_command_line():
    readers = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in modules(package)
        if {"os.environ", "os.getenv"} & names_used(path)
    }
    allowed = {"gateway_shim/config.py", "engine/config.py", "gateway_shim/cli.py", "proto/__init__.py"}
    allowed.add("proto/polling.py")  # sets what gRPC reads there, reads nothing
    assert readers <= allowed, readers - allowed


def test_nobody_ends_a_task_by_swallowing_cancellations():
    """``suppress(CancelledError)`` around an await also swallows the caller's own: ``proto.tasks.ended`` does not."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for package in PACKAGES
        for path in modules(package)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if ("suppress(" in line and "CancelledError" in line) or "asyncio.wait_for(" in line
    ]
    assert not found, found


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("library", "packages"),
    [
        ("torch", ("engine/graph", "engine")),
        ("av", ("gateway_shim/media", "gateway_shim/localnet", "gateway_shim/stream")),
        ("aiohttp", ("gateway_shim",)),
        ("supervisor", ("gateway_shim/localnet",)),
    ],
)
def test_heavy_libraries_stay_in_their_rooms(library, packages):
    users = {
        str(path.parent.relative_to(ROOT)) for name in PACKAGES for path in modules(name) if library in imported(path)
    }
    outside = {user for user in users if not any(user == room or user.startswith(room + "/") for room in packages)}
    assert not outside


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shim_never_imports_torch_the_engine_or_the_kernels():
    code = """
import json, sys
import gateway_shim.__main__, gateway_shim.shim, gateway_shim.cli, gateway_shim.localnet.demo
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    assert not {"torch", "engine", "cext", "comfy"} & set(json.loads(python(code)))


def test_engine_never_imports_the_shim_or_an_http_server():
    code = """
import json, sys
import engine.__main__, engine.service, engine.core
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    assert not {"gateway_shim", "aiohttp", "av"} & set(json.loads(python(code)))


def test_shim_is_imported_in_under_a_second():
    # Processor time of the child: what a quiet machine's clock would show. On a slower one it is the libraries'.
    libraries = "import time, aiohttp.web, av, grpc.aio, grpc_health.v1.health_pb2_grpc, numpy"
    code = f"{libraries}; theirs = time.process_time(); import gateway_shim.__main__, gateway_shim.shim; "
    code += "print(theirs, time.process_time() - theirs)"
    theirs, ours = min([float(each) for each in python(code).split()] for _ in range(3))
    assert theirs + ours < 1.0 or ours < 0.8 * theirs


def test_command_line_answers_before_anyone_waits():
    code = "import time; from gateway_shim import cli; cli.main(['version']); print(time.process_time())"
    assert min(float(python(code).split()[-1]) for _ in range(3)) < 0.3


def test_client_of_the_engine_needs_no_codecs():
    assert python("import sys, gateway_shim.engine_client; print('av' in sys.modules)").split() == ["False"]


def test_command_line_help_imports_no_server():
    code = """
import sys
from gateway_shim import cli
cli.main(["config"])
print([name for name in ("aiohttp", "av", "grpc", "numpy") if name in sys.modules])
"""
    assert python(code).rstrip().endswith("[]")


def test_generated_and_downloaded_things_are_ignored():
    names = ["proto/engine_pb2.py", "cext/_pixels.c", "cext/_pixels.abi.so"]
    names += [".venv/x", ".comfyui/x", ".demo/x", "demo-out/x"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == names


def test_makefile_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test", "lint", "bench", "comfyui", "install"} <= targets
    assert used <= targets


def test_readme_names_only_files_and_subcommands_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / target).exists(), target
    from gateway_shim.cli import _parser

    (commands,) = (action.choices for action in _parser()._actions if action.choices)
    for name in re.findall(r"(?:bin/|`)headrace ([a-z][a-z-]*)", text):
        assert name in commands, name


@pytest.mark.parametrize("block", readme.commands(ROOT / "README.md"), ids=lambda block: f"line {block.line}")
def test_readme_commands_run(block, tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    assert time.monotonic() - began < 60
