"""Looks at every engine on each tick, kills those that hang, and notes why an engine's process ended."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from proto import engine_address, engine_pb2_grpc
from proto import engine_pb2 as pb

from ..deaths import MAX_LOG_CHARS, Death, last_words, path_of, write
from .events import Event
from .supervisor import Process, Supervisor, Unreachable
from .verdict import Answer, Patience, Silence

logger = logging.getLogger(__name__)

GROUP = "engine"  # [program:engine] of supervisord.conf

#: After so long a program that supervisord has given up is started once more: what was in its way, a driver that is
#: being replaced or a port that somebody held, may be gone, and nobody may be there to say so.
REVIVE_S = 300.0

#: A tick that waited for the one before it says nothing of now: supervisord sends one each five seconds.
STALE_TICK_S = 4.0

#: Ends that are told together, as in "the third within ten minutes".
RECENT_S = 600.0

#: supervisord's own words: ``exited: engine-0 (terminated by SIGKILL; not expected)``.
_EXITED = re.compile(r"exited: (\S+) \((.*?); (?:not )?expected\)")

_ACCOUNT_BYTES = 2048


class Watchdog:
    """One thread, one event at a time; a look lasts ``probe_s`` at most however many engines hang."""

    def __init__(
        self,
        supervisor: Supervisor,
        run_dir: Path,
        probe_s: float,
        *,
        clock: Callable[[], float] = time.time,
        out_of_memory_kills: Callable[[], int] | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._run_dir = run_dir
        self._probe_s = probe_s
        self._clock = clock
        self._kills = out_of_memory_kills or kernel_kills
        self._kills_seen = self._kills()
        self._patience: dict[str, Patience] = {}
        self._killed: dict[int, str] = {}  # reason by pid
        self._ends: dict[str, deque[float]] = {}  # moments by name
        self._given_up: dict[str, float] = {}  # since when, by name

    def handle(self, event: Event) -> None:
        """One event of supervisord. Never raises: what cannot be done now is tried at the next tick."""
        try:
            if event.name.startswith("TICK"):
                if self._clock() - float(event.facts.get("when", "0")) < STALE_TICK_S:
                    self._look()
            elif event.facts.get("groupname") == GROUP:
                self._ended(event)
        except Unreachable as exc:
            logger.info("supervisord does not answer: %s", exc)
        except Exception:  # of our own making; a watchdog that ends would watch nothing
            logger.exception("event %s was not handled", event.name)

    # ---- hangs

    def _look(self) -> None:
        processes = self._supervisor.processes()
        self._revive([each for each in processes if each.state == "FATAL"])
        engines = [each for each in processes if each.group == GROUP and each.state == "RUNNING"]
        answers = self._answers([self._address(engine.name) for engine in engines])
        for engine in engines:
            patience = self._patience.setdefault(engine.name, Patience(self._probe_s))
            answer = answers[self._address(engine.name)]
            reason = patience.verdict(engine.pid, answer, self._clock(), stopped=is_stopped(engine.pid))
            if reason:
                self._kill(engine, reason)
        self._kills_seen = self._kills()

    def _revive(self, given_up: list[Process]) -> None:
        now, before = self._clock(), self._given_up
        self._given_up = {each.name: before.get(each.name, now) for each in given_up}
        for process in given_up:
            if now - self._given_up[process.name] >= REVIVE_S:
                logger.warning("%s, given up %.0f s ago, is started once more", process.name, REVIVE_S)
                del self._given_up[process.name]
                with contextlib.suppress(Unreachable):  # the next look finds it as it is then
                    self._supervisor.start(process)

    def _address(self, name: str) -> str:
        return engine_address(int(name.rpartition("-")[2]), self._run_dir)

    def _answers(self, addresses: list[str]) -> Mapping[str, Answer | Silence]:
        """Of all engines at once. New connections: an old one may be broken while the engine is well."""
        with contextlib.ExitStack() as stack:
            calls: dict[str, Any] = {}
            for address in addresses:
                channel = stack.enter_context(grpc.insecure_channel(address))
                stub: Any = engine_pb2_grpc.EngineStub(channel)
                calls[address] = stub.ListSessions.future(pb.ListSessionsRequest(), timeout=self._probe_s)
            return {address: _answer(call) for address, call in calls.items()}

    def _kill(self, engine: Process, reason: str) -> None:
        logger.warning("%s (process %d) is killed and restarted: %s", engine.name, engine.pid, reason)
        self._killed[engine.pid] = f"restarted by the watchdog: {reason}"
        with contextlib.suppress(ProcessLookupError):
            # Not by supervisord's restart: it asks first, and a stopped process lets it wait for stopwaitsecs. The
            # group: no child of a custom node outlives its engine.
            if os.getpgid(engine.pid) == engine.pid:
                os.killpg(engine.pid, signal.SIGKILL)
            else:
                os.kill(engine.pid, signal.SIGKILL)

    # ---- ends

    def _ended(self, event: Event) -> None:
        name = event.facts.get("processname", "")
        if event.facts.get("expected") == "1" and int(event.facts.get("pid", "0")) not in self._killed:
            return
        log = self._supervisor.log_of(f"{GROUP}:{name}", MAX_LOG_CHARS)
        reason = self._killed.pop(int(event.facts.get("pid", "0")), "") or self._reason(name, log)
        if event.name.endswith("FATAL"):
            reason = (
                f"given up by supervisord after too many tries, started again in {REVIVE_S / 60:.0f} min; {reason}"
            )
        ends = self._ends.setdefault(name, deque())
        now = self._clock()
        ends.append(now)
        while ends[0] < now - RECENT_S:
            ends.popleft()
        logger.warning("%s ended, %d times in ten minutes: %s", name, len(ends), reason)
        path = path_of(self._address(name))
        assert path is not None  # under the run directory
        write(path, Death(round(now * 1000), reason, log, len(ends)))

    def _reason(self, name: str, log: str) -> str:
        words = next((how for who, how in reversed(_EXITED.findall(self._account())) if who == name), "ended")
        if "SIGKILL" in words and self._kills() > self._kills_seen:
            return "killed by the kernel, which ran out of memory"
        said = last_words(log)
        return f"{words}; its last words: {said[:300]}" if said else words

    def _account(self) -> str:
        return self._supervisor.account(_ACCOUNT_BYTES)


def _answer(call: Any) -> Answer | Silence:
    try:
        found = call.result()
    except grpc.RpcError as exc:
        refused = exc.code() is grpc.StatusCode.UNAVAILABLE
        return Silence.REFUSED if refused else Silence.TIMEOUT
    answered = {each.session_id: _answered(each) for each in found.sessions if each.frames_in_flight}
    return Answer(
        found.preparing, found.run_ms, found.run_limit_ms, found.step_ms, found.step_limit_ms, answered=answered
    )


def _answered(session: pb.SessionState) -> int:
    return session.frames_received - session.frames_in_flight


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process: state T of proc(5). The name before it may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def kernel_kills() -> int:
    """Processes that the kernel has killed for want of memory since the machine started; 0 where it does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
