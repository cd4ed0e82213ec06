"""The two programs under a real supervisord: they come up in any order, come back, and leave nothing behind."""

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from gateway_shim import supervise
from gateway_shim.localnet.programs import Program, ProgramFailed, Programs, descendants, free_port, plain_environment

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

#: Generous: the machine may be busy with anything, and waiting ends with the event.
DEADLINE_S = 90


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r") / "d"


def launch(run_dir: Path, *, engines: int = 1, **environment: str) -> supervise.Launch:
    # Without ComfyUI the engine is up in a second, and all that is asked here is the same.
    base = plain_environment(os.environ) | {"COMFYUI_DIR": "none", "HEADRACE_LISTEN_PORT": str(free_port())}
    return supervise.plan(base | environment, run_dir, engines=engines)


async def until(programs: Programs, wanted) -> list[Program]:
    async with asyncio.timeout(DEADLINE_S):
        while not wanted(found := await programs.programs()):  # noqa: ASYNC110 another process's state
            await asyncio.sleep(0.1)
    return found


def alive(found: list[Program], count: int) -> bool:
    return len(found) == count and all(program.pid for program in found)


def get(port: str, path: str) -> dict:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": "Bearer s3cret-a"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


async def health(port: str, *wanted: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                if (await asyncio.to_thread(get, port, "/health"))["status"] in wanted:
                    return
            except OSError:
                pass
            await asyncio.sleep(0.1)


def gone(pids: set[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


async def test_both_programs_become_ready_and_stopping_leaves_no_process(run_dir):
    plan = launch(run_dir)
    async with Programs(plan) as programs:
        await until(programs, lambda found: alive(found, 3))
        await health(plan.environment["HEADRACE_LISTEN_PORT"], "IDLE")
        family = {programs.pid, *descendants(programs.pid)}
        assert len(family) >= 4
        assert await programs.stop() == 0
        assert gone(family)
    assert not (run_dir / "supervisord.pid").exists()
    assert not (run_dir / "supervisor.sock").exists()
    # An orderly end, not a killed one: the programs said goodbye and supervisord did not have to insist.
    account = (run_dir / "log" / "supervisord.log").read_text()
    assert "SIGKILL" not in account
    assert account.count("exit status 0") == 3, account


async def test_killed_engine_comes_back_and_the_shim_never_left(run_dir):
    plan = launch(run_dir)
    port = plan.environment["HEADRACE_LISTEN_PORT"]
    async with Programs(plan) as programs:
        found = {p.name: p.pid for p in await until(programs, lambda found: alive(found, 3))}
        await health(port, "IDLE")
        os.kill(found["engine:engine-0"], signal.SIGKILL)

        def back(now: list[Program]) -> bool:
            return alive(now, 3) and {p.name: p.pid for p in now}["engine:engine-0"] != found["engine:engine-0"]

        again = {p.name: p.pid for p in await until(programs, back)}
        assert again["shim"] == found["shim"]
        await health(port, "IDLE")


async def test_killed_shim_comes_back_and_the_engine_never_left(run_dir):
    plan = launch(run_dir)
    async with Programs(plan) as programs:
        found = {p.name: p.pid for p in await until(programs, lambda found: alive(found, 3))}
        os.kill(found["shim"], signal.SIGKILL)

        def back(now: list[Program]) -> bool:
            return alive(now, 3) and {p.name: p.pid for p in now}["shim"] != found["shim"]

        again = {p.name: p.pid for p in await until(programs, back)}
        assert again["engine:engine-0"] == found["engine:engine-0"]
        await health(plan.environment["HEADRACE_LISTEN_PORT"], "IDLE")


async def test_engine_has_no_secret_in_its_environment_and_the_shim_has(run_dir):
    secrets = {"ORCH_SECRET": "s3cret-o", "HEADRACE_AUTH_TOKEN": "s3cret-a"}
    plan = launch(run_dir, **secrets)
    async with Programs(plan) as programs:
        # Listening: between fork and exec a child still has the environment of supervisord.
        await health(plan.environment["HEADRACE_LISTEN_PORT"], "IDLE")
        found = {p.name: p.pid for p in await programs.programs()}
        shim = psutil.Process(found["shim"]).environ()
        engine = psutil.Process(found["engine:engine-0"]).environ()
    assert shim["ORCH_SECRET"] == "s3cret-o"
    assert not [name for name, value in engine.items() if "s3cret" in value]


async def test_sockets_and_logs_are_their_users_alone(run_dir):
    async with Programs(launch(run_dir)) as programs:
        await until(programs, lambda found: alive(found, 3))
        async with asyncio.timeout(DEADLINE_S):
            while not (run_dir / "engine-0.sock").exists():  # noqa: ASYNC110 another process's file
                await asyncio.sleep(0.1)
        for path in (run_dir, run_dir / "supervisor.sock", run_dir / "engine-0.sock"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


async def test_several_engines_get_a_socket_and_a_gpu_each(run_dir):
    base = {"CUDA_VISIBLE_DEVICES": ""}
    async with Programs(launch(run_dir, engines=2, **base)) as programs:
        found = {p.name: p.pid for p in await until(programs, lambda found: alive(found, 4))}
        async with asyncio.timeout(DEADLINE_S):
            while not all((run_dir / f"engine-{n}.sock").exists() for n in (0, 1)):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        environments = [psutil.Process(found[f"engine:engine-{n}"]).environ() for n in (0, 1)]
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0", "1"]
        assert [Path(e["HEADRACE_ENGINE_ADDRESS"]).name for e in environments] == ["engine-0.sock", "engine-1.sock"]


async def test_program_that_cannot_start_is_reported_with_its_own_words(run_dir):
    async with Programs(launch(run_dir, HEADRACE_ENGINE_DEVICE="toaster")) as programs:
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(ProgramFailed) as failed:
                while True:
                    await programs.check()
                    await asyncio.sleep(0.1)
    assert "engine" in str(failed.value)
    assert "toaster" in failed.value.log


def headrace(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gateway_shim.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_headrace_up_becomes_supervisord_prints_the_logs_and_ends_with_its_signal(run_dir, number):
    port = str(free_port())
    environment = plain_environment(os.environ) | {"COMFYUI_DIR": "none"}
    process = headrace("up", "--run-dir", str(run_dir), "--port", port, environment=environment)
    seen: list[str] = []
    try:
        # Lines of the shim's log come through our stdout, among those of supervisord.
        while not any("listening on" in line for line in seen):
            line = process.stdout.readline()
            assert line, "".join(seen)
            seen.append(line)
        assert int((run_dir / "supervisord.pid").read_text()) == process.pid  # exec'ed, not a child
        family = {process.pid, *descendants(process.pid)}
    finally:
        process.send_signal(number)
        seen += process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 0
    # tail notices within its interval that supervisord is gone.
    for pid in family - {process.pid}:
        if psutil.pid_exists(pid):
            psutil.Process(pid).wait(timeout=20)
    assert gone(family)


def test_second_headrace_in_the_same_run_directory_is_refused(run_dir):
    (run_dir / "log").mkdir(parents=True, mode=0o700)
    stand_in = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "supervisord"])
    try:
        (run_dir / "supervisord.pid").write_text(str(stand_in.pid))
        process = headrace("up", "--run-dir", str(run_dir))
        output, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        stand_in.kill()
        stand_in.wait()
    assert process.returncode == 1
    assert "runs already" in output
    assert str(stand_in.pid) in output


def test_run_directory_of_somebody_else_or_behind_a_link_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(supervise.CannotStart, match="not a folder of this user"):
        supervise.prepare(supervise.plan({}, tmp_path / "link"))


def test_run_directory_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(supervise.CannotStart, match="too long for a socket"):
        supervise.prepare(supervise.plan({}, tmp_path / ("x" * 100)))


def test_plan_sets_every_variable_that_the_configuration_names(run_dir):
    import re

    named = set(re.findall(r"%\(ENV_(\w+)\)s", supervise.configuration().read_text()))
    assert named
    assert named <= set(supervise.plan({}, run_dir).environment)


def test_supervisord_waits_for_a_shim_that_drains_for_long(run_dir):
    from gateway_shim.stream import manager

    assert supervise.plan({}, run_dir, drain_s=5).configuration == supervise.configuration()
    plan = supervise.plan({}, run_dir, drain_s=60)
    supervise.prepare(plan)
    shim, _, engine = plan.configuration.read_text().partition("[program:shim]")[2].partition("[program:engine]")
    assert f"\nstopwaitsecs={plan.stop_wait_s}\n" in shim
    assert plan.stop_wait_s > 60 + manager.END_S + manager.CUT_OFF_S
    assert f"\nstopwaitsecs={supervise.STOP_WAIT_S}\n" in engine
    plain = supervise.configuration().read_text()
    assert plain.count(f"\nstopwaitsecs={supervise.STOP_WAIT_S}\n") >= 2, "what is replaced is there"


def test_programs_of_the_demo_do_not_inherit_the_operators_own_worker():
    operators = {
        "PATH": "/bin",
        "ORCH_URL": "https://o",
        "ORCH_SECRET": "s",
        "CAPABILITY_NAME": "c",
        "HEADRACE_LISTEN_PORT": "1",
        "AUTH_TOKEN": "t",
        "HEADRACE_ENGINE_DEVICE": "cuda:1",
        "COMFYUI_DIR": "none",
    }
    assert plain_environment(operators) == {"PATH": "/bin", "HEADRACE_ENGINE_DEVICE": "cuda:1", "COMFYUI_DIR": "none"}
