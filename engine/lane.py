"""A session's shared memory as the engine sees it: request slots to read, reply slots to write.

Nothing that the client says is believed: a slot is one of the ring's, belongs to one frame at a time, and its size is
reckoned from the session's format. What a client writes into a slot meanwhile spoils its own picture only.

Copies of a picture on this lane: 1 of 2, by the shim, from the decoder's rows into the request slot; the graph's
pixel conversion reads it there and writes its result into the reply slot, from which the encoder reads. Copy 2 of 2
is a pass-through's, from slot to slot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from proto import engine_pb2 as pb
from proto.ring import VERSION, Ring, RingRefused, slot_bytes

from .wire import VideoFormat

#: Both rings of a session at most: 14 slots of 4096x4096 are 352 MB. With ``max_sessions`` it bounds what is mapped.
MAX_BYTES: Final = 512 << 20


class Lane:
    """Runs on the event loop, but for ``place``, which a run calls on its thread."""

    def __init__(self, requests: Ring, replies: Ring, frame_bytes: int) -> None:
        self._requests = requests
        self._replies = replies
        self._frame_bytes = frame_bytes
        self._frames: dict[int, int] = {}  # request slot by frame_id, of frames without a result
        # Reply slots. The one that was freed last is the one that caches still hold: taken in turn, all of them, the
        # two copies of a picture that passes through take 0.124 ms at 720p, like this 0.096.
        self._free = list(range(replies.slots, 0, -1))
        self._written: list[int] = []  # by the run that is under way
        self._shown: set[int] = set()  # the client has them

    @classmethod
    def attach(cls, offer: pb.SharedMemory, video: VideoFormat) -> Lane:
        """Both rings that a client offers. Raises RingRefused: the planes travel in the messages then."""
        if offer.version != VERSION:
            raise RingRefused(f"the rings have layout {offer.version}, this engine knows {VERSION}")
        size = slot_bytes(video.frame_bytes)
        if not video.frame_bytes or offer.slot_bytes != size:
            raise RingRefused(f"a slot for this format has {size} bytes, not {offer.slot_bytes}")
        if (asked := size * (offer.request_slots + offer.response_slots)) > MAX_BYTES:
            raise RingRefused(f"the slots have {asked} bytes, {MAX_BYTES} are the limit")
        pid, nonce = offer.owner_pid, offer.nonce
        requests = Ring.attach(pid, offer.request_fd, offer.request_slots, size, nonce, writable=False)
        try:
            replies = Ring.attach(pid, offer.response_fd, offer.response_slots, size, nonce, writable=True)
        except RingRefused:
            requests.close()
            raise
        return cls(requests, replies, video.frame_bytes)

    # ---- frames

    def problem(self, slot: int) -> str:
        """Why a frame cannot lie in that slot; empty when it can."""
        if slot > self._requests.slots:
            return f"slot {slot} is none of 1 to {self._requests.slots}"
        if slot in self._frames.values():
            return f"slot {slot} holds a frame that has no result yet"
        return ""

    def claim(self, frame_id: int, slot: int) -> memoryview:
        """The planes of a frame; the slot is the frame's until ``answered``."""
        self._frames[frame_id] = slot
        return self._requests.view(slot, self._frame_bytes)

    def answered(self, frame_id: int) -> None:
        self._frames.pop(frame_id, None)

    # ---- pictures

    def place(self, size: int) -> tuple[int, memoryview] | None:
        """A free reply slot and its memory, for a picture of ``size`` bytes; None: it goes into the message, or to
        nobody, because the session ended while it ran."""
        if size > self._replies.slot_bytes:
            return None
        try:
            slot = self._free.pop()
            memory = self._replies.view(slot, size)
        except (IndexError, ValueError):
            return None
        self._written.append(slot)
        return slot, memory

    def settle(self, shown: Collection[int] = ()) -> None:
        """The run is over: ``shown`` go to the client, the other slots that it wrote are free again."""
        self._shown.update(slot for slot in self._written if slot in shown)
        self._free.extend(slot for slot in self._written if slot not in shown)
        self._written.clear()

    def release(self, slots: Iterable[int]) -> None:
        """The client is done with them; those that it never had are ignored."""
        for slot in slots:
            if slot in self._shown:
                self._shown.remove(slot)
                self._free.append(slot)

    def close(self) -> None:
        self._requests.close()
        self._replies.close()

    def __str__(self) -> str:
        slots = f"{self._requests.slots} and {self._replies.slots} slots"
        return f"shared memory, {slots} of {self._replies.slot_bytes} bytes"
