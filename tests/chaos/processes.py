"""What the programs hold, counted from outside: /proc of every process of a run, and the folders they write to."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

_CLOCK_HZ = os.sysconf("SC_CLK_TCK")

#: Samples of a life that are compared with each other, at most: half a million pairs.
_PAIRED = 1000

#: Threads of asyncio's own pool and of gRPC come when they are first needed and stay (concurrent.futures.thread).
_POOL_THREADS = min(32, (os.cpu_count() or 1) + 4) + 8

#: Every process of a run has this variable, also one that left its parent and its group.
MARK = "HEADRACE_CHAOS_RUN"


@dataclass(frozen=True)
class Holdings:
    """What one process has at a moment."""

    threads: int = 0  # of Python, without the pool that asyncio keeps and fills by and by; from the shim's own status
    system_threads: int = 0  # all
    descriptors: int = 0
    sockets: int = 0
    shared_memory: int = 0  # memfd and /dev/shm, as descriptors and as mappings
    tasks: int = 0  # of asyncio; from the shim's own status

    def beyond(self, before: Holdings) -> dict[str, int]:
        """What is more than it was, by name."""
        pairs = {name: getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__}
        pairs["system_threads"] -= _POOL_THREADS
        return {name: more for name, more in pairs.items() if more > 0}


def holdings(pid: int, tasks: int = 0, threads: int = 0, clients: int = 0) -> Holdings:
    """``clients``: connections that others keep to it, each a socket and a task. Raises OSError for a process that is
    gone."""
    folder = Path(f"/proc/{pid}")
    kinds: Counter[str] = Counter()
    for each in (folder / "fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(each)
            kinds["all"] += 1
            kinds["socket"] += target.startswith("socket:")
            kinds["memory"] += _is_shared(target)
    mapped = sum(_is_shared(line.split(maxsplit=5)[-1]) for line in (folder / "maps").read_text().splitlines())
    system_threads = len(list((folder / "task").iterdir()))
    descriptors, sockets = kinds["all"] - clients, kinds["socket"] - clients
    return Holdings(threads, system_threads, descriptors, sockets, kinds["memory"] + mapped, tasks - clients)


def clients_of(pid: int, port: int) -> int:
    """Connections that others have to a port of the process."""
    found = psutil.Process(pid).net_connections("tcp")
    return sum(each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED for each in found)


def _is_shared(name: str) -> bool:
    return name.startswith(("/memfd:", "/dev/shm/"))


def connections(pid: int) -> list[str]:
    """The sockets of a process, for people: which of them was left over."""
    found = []
    for each in psutil.Process(pid).net_connections("all"):
        ends = [f"{end.ip}:{end.port}" if hasattr(end, "ip") else str(end) for end in (each.laddr, each.raddr)]
        found.append(f"{ends[0]} - {ends[1]} {each.status}")
    return found


def own_kb(pid: int) -> int:
    """Resident memory but for pages of files, which the kernel takes back as it likes. Raises OSError for a process
    that is gone."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem"))


def started_at(pid: int) -> float:
    """Monotonic time at which the process began. Raises OSError for one that is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[19]) / _CLOCK_HZ
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def marked(run: str) -> dict[int, str]:
    """Living processes of a run, by pid, with what they execute."""
    found = {}
    wanted = f"{MARK}={run}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    found[int(folder.name)] = b" ".join(words).decode(errors="replace").strip()
    return found


#: Written for the next start: why an engine ended (gateway_shim/deaths.py), how often it did (engine/starts.py).
_RECORDS = (".death.json", ".starts", "streams/lock")


def left_in(run_dir: Path, temporary: Path) -> list[str]:
    """Files that should be gone when all has ended. Logs and records stay."""
    found = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if not path.is_dir()]
    found = [name for name in found if not name.startswith("log/") and not name.endswith((".conf", *_RECORDS))]
    return found + [f"tmp/{path.name}" for path in temporary.iterdir()]


@dataclass
class Memory:
    """Memory of processes over time, without that of files."""

    samples: dict[int, list[tuple[float, int]]] = field(default_factory=dict)  # (monotonic s, kB) by pid

    def take(self, pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(OSError):
                self.samples.setdefault(pid, []).append((time.monotonic(), own_kb(pid)))

    def slope_kb_per_min(self, pids: Iterable[int]) -> float | None:
        """Of the process that lived longest, without the first third of its life; None for less than 20 s of it.

        The median slope between any two moments (Theil and Sen): a leak has it everywhere, while a step is a step. An
        allocator makes steps, and so does libavcodec, whose pool keeps as many pictures as were ever held at once.
        """
        lives = [self.samples[pid] for pid in pids if self.samples.get(pid)]
        if not lives:
            return None
        life = max(lives, key=lambda each: each[-1][0] - each[0][0])
        begin, end = life[0][0], life[-1][0]
        points = [(at, kb) for at, kb in life if at >= begin + (end - begin) / 3]
        if end - begin < 20 or len(points) < 5:
            return None
        at, kb = np.array(points[:: -(-len(points) // _PAIRED)]).T
        first, second = np.triu_indices(len(at), 1)
        return round(float(np.median((kb[second] - kb[first]) / (at[second] - at[first]))) * 60, 1)
