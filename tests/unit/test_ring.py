"""Shared memory between two processes that do not trust each other's numbers."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.ring import MAX_SLOTS, Ring, RingRefused, slot_bytes

NONCE = bytes(range(16))
SIZE = slot_bytes(5000)


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring.create(3, SIZE, NONCE)
    yield made
    made.close()


def attached(ring: Ring, *, writable: bool = False) -> Ring:
    return Ring.attach(os.getpid(), ring.fd, ring.slots, ring.slot_bytes, NONCE, writable=writable)


def test_both_ends_see_one_memory(ring: Ring) -> None:
    other = attached(ring, writable=True)
    ring.view(1, 5000)[:] = b"a" * 5000
    other.view(3, SIZE)[:] = b"c" * SIZE
    assert other.view(1, 5000) == b"a" * 5000
    assert ring.view(3, SIZE) == b"c" * SIZE
    assert ring.view(2, SIZE) == bytes(SIZE), "neighbours are left alone"
    other.close()


def test_a_reader_cannot_write(ring: Ring) -> None:
    other = attached(ring)
    with pytest.raises(TypeError, match="read-only"):
        other.view(1, 4)[:] = b"abcd"
    other.close()


@pytest.mark.parametrize(("slot", "size"), [(0, 1), (4, 1), (-1, 1), (2**32 - 1, 1), (1, 0), (1, SIZE + 1), (1, -1)])
def test_slots_that_are_not_there(ring: Ring, slot: int, size: int) -> None:
    with pytest.raises(ValueError, match="slot"):
        ring.view(slot, size)


def test_nobody_can_take_pages_away(ring: Ring) -> None:
    for size in (0, mmap.PAGESIZE, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(ring.fd, size)
    with pytest.raises(OSError) as caught:
        fcntl.fcntl(ring.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert caught.value.errno == errno.EPERM
    assert os.fstat(ring.fd).st_mode & 0o777 == 0o600


def test_offers_with_wrong_numbers_are_refused(ring: Ring) -> None:
    pid = os.getpid()
    good = {"pid": pid, "fd": ring.fd, "slots": 3, "size": SIZE, "nonce": NONCE}
    for wrong in (
        {"slots": 0},
        {"slots": 2},
        {"slots": 4},
        {"slots": MAX_SLOTS + 1},
        {"slots": 2**32 - 1},
        {"size": SIZE * 2},
        {"size": 2 * SIZE, "slots": 1},
        {"nonce": bytes(16)},
        {"nonce": b""},
        {"fd": -1},
        {"fd": 1 << 20},
        {"pid": 0},
        {"pid": 2**64 - 1},
        {"pid": 1 << 30},
    ):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(RingRefused):
            Ring.attach(**good | wrong, writable=True)  # type: ignore[arg-type]
        assert len(os.listdir("/proc/self/fd")) == before, "a refusal leaves nothing open"


def test_descriptors_that_are_no_ring_are_refused(ring: Ring, tmp_path: Path) -> None:
    total = mmap.PAGESIZE + 3 * SIZE
    path = tmp_path / "memfd:headrace-ring"
    path.write_bytes(bytes(total))
    head = ring.view(1, 1).obj[: mmap.PAGESIZE]  # type: ignore[index]  # the map, with magic and nonce
    reader, writer = os.pipe()
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    made = {}
    for kind in ("unsealed", "may shrink", "may grow", "may be sealed", "holes", "frozen", "short", "long", "alien"):
        fd = made[kind] = os.memfd_create("x" if kind == "alien" else "headrace-ring", os.MFD_ALLOW_SEALING)
        size = total + {"short": -1, "long": mmap.PAGESIZE}.get(kind, 0)
        os.ftruncate(fd, size)
        if kind != "holes":
            os.posix_fallocate(fd, 0, size)
        os.pwrite(fd, head, 0)
    fcntl.fcntl(made["may shrink"], fcntl.F_ADD_SEALS, seals & ~fcntl.F_SEAL_SHRINK)
    fcntl.fcntl(made["may grow"], fcntl.F_ADD_SEALS, seals & ~fcntl.F_SEAL_GROW)
    fcntl.fcntl(made["may be sealed"], fcntl.F_ADD_SEALS, seals & ~fcntl.F_SEAL_SEAL)
    fcntl.fcntl(made["frozen"], fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_WRITE)
    for kind in ("holes", "short", "long", "alien"):
        fcntl.fcntl(made[kind], fcntl.F_ADD_SEALS, seals)
    file = os.open(path, os.O_RDWR)
    zeros = os.open("/dev/zero", os.O_RDWR)
    try:
        for fd, why in (
            (file, "no ring"),
            (zeros, "no ring"),
            (reader, "no ring"),
            (made["alien"], "no ring"),
            (made["short"], "bytes"),
            (made["long"], "bytes"),
            (made["holes"], "holes"),
            (made["unsealed"], "size"),
            (made["may shrink"], "size"),
            (made["may grow"], "size"),
            (made["may be sealed"], "size"),
            (made["frozen"], "not permitted"),
        ):
            with pytest.raises(RingRefused, match=why):
                Ring.attach(os.getpid(), fd, 3, SIZE, NONCE, writable=True)
    finally:
        for fd in (reader, writer, zeros, file, *made.values()):
            os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's process can only be made by root")
def test_another_user_s_process_is_refused(ring: Ring) -> None:
    child = subprocess.Popen(["sleep", "60"], user=65534, pass_fds=[ring.fd])
    try:
        with pytest.raises(RingRefused, match="another user"):
            Ring.attach(child.pid, ring.fd, 3, SIZE, NONCE, writable=False)
    finally:
        child.kill()
        child.communicate()


def test_a_ring_outlives_its_maker_and_is_gone_with_its_last_view() -> None:
    code = "from proto.ring import *; import os, sys; r = Ring.create(2, 8192, bytes(16)); r.view(1, 3)[:] = b'abc'; "
    child = subprocess.Popen(
        [sys.executable, "-c", code + "print(r.fd, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    ring = Ring.attach(child.pid, int(child.stdout.readline()), 2, 8192, bytes(16), writable=True)
    child.kill()
    child.communicate()
    mapped = maps()
    view = ring.view(1, 3)
    ring.close()
    assert view == b"abc", "no SIGBUS, whoever died"
    assert maps() == mapped
    with pytest.raises(ValueError, match="closed"):
        ring.view(1, 3)
    del view  # what is closed holds nothing, whoever refers to it still
    assert maps() == mapped - 1


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("headrace-ring")
