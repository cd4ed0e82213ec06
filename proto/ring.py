"""Slots of memory that two processes of one user share: the planes of a session's pictures, one direction each.

A ring is a memfd, so nothing of it has a name on a disk, and the kernel frees it with its last holder however that
one ends. The maker seals its size: no end can take pages away under the other (SIGBUS). Whoever attaches opens the
maker's descriptor through /proc, believes no number and checks all it can before it maps anything.

Layout: one page with magic, version, slots, slot bytes and a nonce; then the slots, each beginning on a page.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import struct
from typing import Final, Self

#: Grows with every change of the layout.
VERSION: Final = 1

#: Slots of one ring at most; a peer cannot make us map more.
MAX_SLOTS: Final = 64

_HEAD: Final = struct.Struct("<8sIIQ16s")
_MAGIC: Final = b"headrace"
_NAME: Final = "headrace-ring"
NONCE_BYTES: Final = 16
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class RingRefused(Exception):
    """What the other end offers is not used; the sentence says why."""


def slot_bytes(frame_bytes: int) -> int:
    """Size of a slot for pictures of ``frame_bytes``: whole pages."""
    return -(-frame_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class Ring:
    """See the module. ``slot`` numbers begin at 1, as in ``Frame.slot``."""

    def __init__(self, fd: int, memory: mmap.mmap, slots: int, size: int) -> None:
        self.fd = fd
        self.slots = slots
        self.slot_bytes = size
        self._memory: mmap.mmap | None = memory

    @classmethod
    def create(cls, slots: int, size: int, nonce: bytes) -> Self:
        """A ring of our own, every page of it in memory. ``size``: of a slot, whole pages. Raises OSError where there
        is no memory for it, or no memfd.

        The map is filled at first touch, 0.4 ms for each slot of 720p and each end: Python's mmap keeps the
        interpreter's lock, with MAP_POPULATE 15 ms of it at 720p and 50 at 4K, which all other streams would feel.
        """
        total = mmap.PAGESIZE + slots * size
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            os.posix_fallocate(fd, 0, total)  # a limit of memory is an error here, and SIGBUS later
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(fd, total, flags=mmap.MAP_SHARED)
        except BaseException:
            os.close(fd)
            raise
        memory[: _HEAD.size] = _HEAD.pack(_MAGIC, VERSION, slots, size, nonce)
        return cls(fd, memory, slots, size)

    @classmethod
    def attach(cls, pid: int, fd: int, slots: int, size: int, nonce: bytes, *, writable: bool) -> Self:
        """The ring behind descriptor ``fd`` of process ``pid``, which says that it has ``slots`` of ``size`` bytes.

        ``size`` is what the caller reckons itself. Raises RingRefused; nothing is left open then.
        """
        if not 1 <= slots <= MAX_SLOTS:
            raise RingRefused(f"a ring has 1 to {MAX_SLOTS} slots, not {slots}")
        if not 0 < pid < 1 << 31 or fd < 0 or len(nonce) != NONCE_BYTES:
            raise RingRefused("the offer names no process, no descriptor or no nonce")
        total = mmap.PAGESIZE + slots * size
        ours = _open(f"/proc/{pid}", f"/proc/{pid}/fd/{fd}", writable)
        try:
            status = os.fstat(ours)
            # The seals say for ever what the size says now.
            if not stat.S_ISREG(status.st_mode) or status.st_nlink or status.st_uid != os.geteuid():
                raise RingRefused(f"descriptor {fd} of process {pid} is no memfd of this user")
            if status.st_size != total:
                raise RingRefused(f"the ring has {status.st_size} bytes; {slots} slots of {size} need {total}")
            if status.st_blocks * 512 < total:
                raise RingRefused("the ring has holes: filling them would take memory of ours")
            if fcntl.fcntl(ours, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise RingRefused("the ring could still change its size")
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            memory = mmap.mmap(ours, total, flags=mmap.MAP_SHARED, prot=protection)
        except OSError as exc:
            os.close(ours)
            raise RingRefused(f"the ring cannot be used: {exc.strerror}") from None
        except BaseException:
            os.close(ours)
            raise
        if memory[: _HEAD.size] != _HEAD.pack(_MAGIC, VERSION, slots, size, nonce):
            memory.close()
            os.close(ours)
            raise RingRefused("the ring's head is not that of the offer")
        return cls(ours, memory, slots, size)

    def view(self, slot: int, size: int) -> memoryview:
        """The first ``size`` bytes of a slot. Raises ValueError for numbers that the ring does not have, and after
        ``close``."""
        memory = self._memory
        if memory is None:
            raise ValueError("the ring is closed")
        if not 1 <= slot <= self.slots:
            raise ValueError(f"slot {slot} is none of 1 to {self.slots}")
        if not 0 < size <= self.slot_bytes:
            raise ValueError(f"{size} bytes do not fit into a slot of {self.slot_bytes}")
        begin = mmap.PAGESIZE + (slot - 1) * self.slot_bytes
        return memoryview(memory)[begin : begin + size]

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Nobody can attach any more. The memory goes with the last view of it. May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        memory, self._memory = self._memory, None
        if memory is not None:
            with contextlib.suppress(BufferError):  # views are in use; what holds them, and nothing else, holds it
                memory.close()


def _open(process: str, path: str, writable: bool) -> int:
    """Opens nothing but a memfd of ours: what it opens may be anything, and a pipe would wait for its other end."""
    try:
        if os.stat(process).st_uid != os.geteuid():
            raise RingRefused(f"{process} belongs to another user")
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise RingRefused(f"{path} is no ring")
        return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as exc:
        raise RingRefused(f"{path}: {exc.strerror}") from None
