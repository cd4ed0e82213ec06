"""A session's shared memory as the shim sees it: it makes both rings, fills request slots and shows reply slots.

They belong to one engine session and have no name: whichever process dies, the kernel frees them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import weakref
from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

from proto import engine_pb2 as pb
from proto.results import Picture
from proto.ring import NONCE_BYTES, VERSION, Ring, slot_bytes

from .media.rows import Rows, planes_size, rows_size, write_planes

#: Slots for frames and for pictures: a visit of the engine to its executor takes up to eight frames where they wait,
#: and pictures wait for the encoder and are shown again. Larger pictures have fewer, since these are most of what a
#: stream weighs: 28 MB at 720p, where 12 and 16 slots are 39 and the trip's overhead is the same (0.24 and 0.25, four
#: runs); 62 MB at 1080p, where 6 and 8 slots are 43 and the overhead is 0.196 in place of 0.176 (medians of seven
#: runs by turns). The largest make smaller visits.
REQUEST_SLOTS: Final = 12
REPLY_SLOTS: Final = 16
MIDDLE_BYTES: Final = 1 << 20
MIDDLE_REQUEST_SLOTS: Final = 8
MIDDLE_REPLY_SLOTS: Final = 12
LARGE_BYTES: Final = 4 << 20
LARGE_REQUEST_SLOTS: Final = 6
LARGE_REPLY_SLOTS: Final = 8


def slots_for(size: int) -> tuple[int, int]:
    """Request and reply slots for pictures of ``size`` bytes."""
    if size > LARGE_BYTES:
        return LARGE_REQUEST_SLOTS, LARGE_REPLY_SLOTS
    if size > MIDDLE_BYTES:
        return MIDDLE_REQUEST_SLOTS, MIDDLE_REPLY_SLOTS
    return REQUEST_SLOTS, REPLY_SLOTS


class EngineLane:
    """Made before a session opens. Belongs to the event loop; pictures may be let go of on any thread."""

    def __init__(self, width: int, height: int) -> None:
        """Raises OSError where there is no memory for it. Touches every page: off the loop, please."""
        self._size = planes_size(width, height)
        requests, self._reply_slots = slots_for(self._size)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._requests = Ring.create(requests, slot_bytes(self._size), self._nonce)
        try:
            self._replies = Ring.create(self._reply_slots, slot_bytes(self._size), self._nonce)
        except BaseException:
            self._requests.close()
            raise
        self._free = list(range(1, requests + 1))
        self._frames: dict[int, int] = {}  # request slot by frame_id
        self._shown: set[int] = set()  # reply slots of which the engine does not know that they are free
        self._done: deque[int] = deque()  # of these, those that nothing refers to any more
        self._wanted = False  # somebody waits for room
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def offer(self) -> pb.SharedMemory:
        return pb.SharedMemory(
            version=VERSION,
            owner_pid=os.getpid(),
            request_fd=self._requests.fd,
            response_fd=self._replies.fd,
            request_slots=self._requests.slots,
            response_slots=self._replies.slots,
            slot_bytes=self._requests.slot_bytes,
            nonce=self._nonce,
        )

    @property
    def room(self) -> int:
        """Frames that find a request slot now, and whose pictures will find a reply slot."""
        return min(len(self._free), self._reply_slots - len(self._frames) - len(self._shown) + len(self._done))

    async def freed(self) -> None:
        """Wait until there is room; once there was none, until it is worth a message: half of the slots.

        Where the encoder is slower than the graph, its pictures hold the reply slots. A frame that was sent
        regardless would come back in a message, at ten times the cost, and wait there.
        """
        if self.room > 0:
            return
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                self._wanted = True  # before the look: what is let go of after it wakes us
                if self._is_worth_it:
                    return
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._wanted = False

    @property
    def _is_worth_it(self) -> bool:
        return self.room >= self._reply_slots // 2

    def _let_go(self, slot: int) -> None:
        """On any thread. The loop is woken once, neither for each slot on the way nor for those of a hop that come
        after: a wake-up is a write to a socket, with the interpreter's lock let go of and fought for."""
        self._done.append(slot)
        if self._wanted and self._loop is not None and self._is_worth_it:
            self._wanted = False
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._changed.set)

    def put(self, frame_id: int, rows: Rows) -> int:
        """Copy a frame's planes into a free slot, which is given; 0 where there is none, or for another size."""
        if not self._free or rows_size(rows) != self._size:
            return 0
        slot = self._frames[frame_id] = self._free.pop()
        # Copy 1 of 2: out of the decoder's rows, which may be padded.
        write_planes(rows, self._requests.view(slot, self._size))
        return slot

    def answered(self, frame_id: int) -> None:
        """The frame's one result came: its slot is ours again."""
        slot = self._frames.pop(frame_id, 0)
        if slot:
            self._free.append(slot)
            if self._wanted and self._is_worth_it:
                self._changed.set()

    def picture(self, picture: Picture) -> NDArray[np.uint8]:
        """The planes in a reply slot, without a copy. The slot is released when nothing refers to them any more: the
        frame made of them was encoded and is not the one to repeat. Raises ValueError for a slot that the engine may
        not name."""
        slot = picture.slot
        if slot in self._shown:
            raise ValueError(f"the engine wrote into slot {slot}, which is in use")
        planes: NDArray[np.uint8] = np.frombuffer(
            self._replies.view(slot, planes_size(picture.width, picture.height)), np.uint8
        )
        self._shown.add(slot)
        weakref.finalize(planes, self._let_go, slot).atexit = False
        return planes

    def released(self) -> list[int]:
        """Reply slots that became free since the last call; the engine is told with the next frames."""
        slots = []
        while self._done:
            slots.append(self._done.popleft())
        self._shown.difference_update(slots)
        return slots

    def close(self) -> None:
        """Pictures that are shown stay as they are."""
        self._requests.close()
        self._replies.close()
