"""The watchdog's judgement, its protocol with supervisord, and the notes on how engines ended."""

import io
import os
import subprocess
import sys
import time

import pytest

from gateway_shim import deaths
from gateway_shim.deaths import Death, last_words
from gateway_shim.watchdog.events import Event, events
from gateway_shim.watchdog.supervisor import Process
from gateway_shim.watchdog.verdict import DEAF_S, LOADING_SILENCE_S, Answer, Patience, Silence
from gateway_shim.watchdog.watchdog import REVIVE_S, Watchdog, is_stopped

QUIET, LOADING = Answer(), Answer(preparing=True)


def patience(*before: Answer) -> Patience:
    made = Patience(3.0)
    for answer in before:
        assert made.verdict(7, answer, 0.0, stopped=False) == ""
    return made


def test_engine_that_answers_may_stay():
    made = patience(QUIET)
    assert made.verdict(7, Answer(run_ms=3999, run_limit_ms=4000), 5.0, stopped=False) == ""
    assert made.verdict(7, Answer(run_ms=90_000, run_limit_ms=0), 10.0, stopped=False) == "", "without a limit"


def test_ready_engine_that_says_nothing_hangs_at_the_first_look():
    assert "3 s" in patience(QUIET).verdict(7, Silence.TIMEOUT, 5.0, stopped=False)


def test_graph_that_does_not_return_is_a_hang_but_not_while_something_loads():
    assert "4.0 s" in patience(QUIET).verdict(7, Answer(run_ms=4001, run_limit_ms=4000), 5.0, stopped=False)
    late = Answer(preparing=True, run_ms=4001, run_limit_ms=4000)
    assert patience(QUIET).verdict(7, late, 5.0, stopped=False) == ""
    late = Answer(preparing=True, run_ms=60_001, run_limit_ms=4000)
    assert "60.0 s" in patience(QUIET).verdict(7, late, 5.0, stopped=False)


def test_step_of_a_build_that_does_not_return_is_a_hang_too():
    slow = Answer(preparing=True, step_ms=299_000, step_limit_ms=300_000)
    assert patience(LOADING).verdict(7, slow, 5.0, stopped=False) == ""
    stuck = Answer(preparing=True, step_ms=301_000, step_limit_ms=300_000)
    assert "a step of loading a workflow" in patience(LOADING).verdict(7, stuck, 5.0, stopped=False)
    endless = Answer(preparing=True, step_ms=900_000, step_limit_ms=0)
    assert patience(LOADING).verdict(7, endless, 5.0, stopped=False) == "", "without a limit"


def test_engine_that_holds_frames_and_runs_none_is_a_hang():
    made = patience(QUIET)
    assert made.verdict(7, Answer(answered={"a": 12}), 5.0, stopped=False) == "", "one look is a moment"
    assert "held frames for 5 s" in made.verdict(7, Answer(answered={"a": 12}), 10.0, stopped=False)
    assert made.verdict(8, Answer(answered={"a": 12}), 15.0, stopped=False) == "", "another process begins anew"


@pytest.mark.parametrize(
    "between",
    [
        Answer(answered={"a": 13}),  # it got on
        Answer(answered={"a": 12}, run_ms=1),  # it is at it
        Answer(answered={"a": 12}, step_ms=1),
        Answer(answered={"a": 12}, preparing=True),
        Answer(answered={"b": 12}),
    ],
)
def test_engine_that_did_anything_between_two_looks_may_stay(between):
    made = patience(QUIET)
    for now, answer in enumerate((Answer(answered={"a": 12}), between, Answer(answered={"a": 12}))):
        assert made.verdict(7, answer, 5.0 * now, stopped=False) == ""


@pytest.mark.parametrize("before", [(), (LOADING,), (QUIET, LOADING)])
def test_silence_while_something_loads_is_waited_for(before):
    made = patience(*before)
    made.verdict(7, Silence.TIMEOUT, 0.0, stopped=False)
    assert made.verdict(7, Silence.TIMEOUT, LOADING_SILENCE_S, stopped=False) == ""
    assert made.verdict(7, Silence.TIMEOUT, LOADING_SILENCE_S + 1, stopped=False)


def test_stopped_process_is_never_waited_for():
    assert "SIGSTOP" in patience(LOADING).verdict(7, Silence.TIMEOUT, 1.0, stopped=True)


def test_engine_that_boots_or_leaves_may_be_deaf_for_a_while():
    made = patience(QUIET)
    assert made.verdict(7, Silence.REFUSED, DEAF_S, stopped=False) == ""
    assert made.verdict(7, Silence.REFUSED, DEAF_S + 1, stopped=False)
    assert made.verdict(8, Silence.REFUSED, DEAF_S + 2, stopped=False) == "", "another process begins anew"


def test_events_are_read_and_answered_one_by_one():
    payload = "processname:engine-0 groupname:engine from_state:RUNNING expected:0 pid:12"
    source = io.StringIO(
        f"ver:3.0 eventname:PROCESS_STATE_EXITED len:{len(payload)}\n{payload}"
        "ver:3.0 eventname:TICK_5 len:15\nwhen:1201063880"
    )
    answers = io.StringIO()
    found = []
    for event in events(source, answers):
        found.append(event)
        assert answers.getvalue() == "READY\nRESULT 2\nOK" * (len(found) - 1) + "READY\n"
    assert [event.name for event in found] == ["PROCESS_STATE_EXITED", "TICK_5"]
    assert found[0].facts["pid"] == "12"


def test_stopped_process_is_recognised():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not is_stopped(child.pid)
        child.send_signal(19)
        os.waitpid(child.pid, os.WUNTRACED)
        assert is_stopped(child.pid)
    finally:
        child.kill()
        child.wait()
    assert not is_stopped(child.pid)


class FakeSupervisor:
    def __init__(self, account: str = "", log: str = "") -> None:
        self.texts = account, log
        self.known: list[Process] = []
        self.started: list[str] = []

    def processes(self) -> list[Process]:
        return self.known

    def start(self, process: Process) -> None:
        self.started.append(process.name)

    def account(self, length: int) -> str:
        return self.texts[0]

    def log_of(self, process: str, length: int) -> str:
        assert process == "engine:engine-0"
        return self.texts[1]


def ended(pid: int, *, expected: bool = False) -> Event:
    facts = {"processname": "engine-0", "groupname": "engine", "expected": str(int(expected)), "pid": str(pid)}
    return Event("PROCESS_STATE_EXITED", facts)


KILLED = "INFO exited: engine-0 (terminated by SIGKILL; not expected)\n"


@pytest.mark.parametrize(
    ("account", "log", "kills", "reason"),
    [
        (KILLED, "", [0, 1], "killed by the kernel, which ran out of memory"),
        (KILLED, "", [1, 1], "terminated by SIGKILL"),
        (
            "x exited: engine-0 (terminated by SIGABRT; not expected)\n",
            "Fatal Python error: Aborted\n\nThread 0x2 (most recent call first):\n"
            '  File "/c/idle.py", line 8 in wait\n\n'
            "Current thread 0x1 (most recent call first):\n"
            '  File "/c/bad.py", line 3 in run\n  File "/e/plan.py", line 9 in run\n',
            [0, 0],
            'terminated by SIGABRT; its last words: Fatal Python error: Aborted at File "/c/bad.py", line 3 in run',
        ),
        ("x exited: engine-1 (exit status 1; not expected)\n", "MemoryError\n", [0, 0], "MemoryError"),
    ],
)
def test_end_of_an_engine_is_noted_with_its_reason(tmp_path, account, log, kills, reason):
    watchdog = Watchdog(FakeSupervisor(account, log), tmp_path, 1.0, out_of_memory_kills=iter(kills).__next__)
    watchdog.handle(ended(5))
    note = deaths.read(f"unix:{tmp_path}/engine-0.sock")
    assert note is not None
    assert reason in note.reason
    assert (note.log, note.recent) == (log, 1)
    assert abs(note.at_ms - time.time() * 1000) < 60_000


def test_end_that_was_asked_for_is_no_news(tmp_path):
    Watchdog(FakeSupervisor(), tmp_path, 1.0).handle(ended(5, expected=True))
    assert deaths.read(f"unix:{tmp_path}/engine-0.sock") is None


def test_note_that_is_damaged_or_elsewhere_is_none(tmp_path):
    path = deaths.path_of(f"unix:{tmp_path}/engine-0.sock")
    for text in (
        "",
        "[]",
        '{"at_ms": 1}',
        '{"at_ms": "x", "reason": 1, "log": ""}',
        '{"at_ms": 1, "reason": "", "x": 1}',
    ):
        path.write_text(text)
        assert deaths.read(f"unix:{tmp_path}/engine-0.sock") is None
    deaths.write(path, Death(1, "because"))
    assert deaths.read(f"unix:{tmp_path}/engine-0.sock") == Death(1, "because")
    assert deaths.read("10.0.0.1:50051") is None


def test_program_that_was_given_up_is_started_again_after_a_while(tmp_path):
    supervisor, now = FakeSupervisor(), [1000.0]
    watchdog = Watchdog(supervisor, tmp_path, 1.0, clock=lambda: now[0])

    def look(after_s: float, state: str) -> list[str]:
        now[0] += after_s
        supervisor.known = [Process("engine-0", "engine", state, 0), Process("shim", "shim", "STARTING", 7)]
        watchdog.handle(Event("TICK_5", {"when": str(now[0])}))
        return supervisor.started

    assert look(0, "FATAL") == []
    assert look(REVIVE_S - 1, "FATAL") == []
    assert look(5, "FATAL") == ["engine-0"]
    assert look(5, "BACKOFF") == ["engine-0"]
    assert look(REVIVE_S, "FATAL") == ["engine-0"], "given up anew"
    assert look(REVIVE_S, "FATAL") == ["engine-0", "engine-0"]


def test_last_words_are_those_that_say_most():
    assert last_words("a\nMemoryError: no\n\n") == "MemoryError: no"
    assert last_words("") == ""
