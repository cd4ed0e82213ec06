"""Misbehaviour of the network and of peers, on order: each fault hits the next request that matches it, once. A limit
of bandwidth hits all that begin while it lasts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["reset", "stall", "corrupt", "answer", "limit"]


#: What a limited connection lets through at once: one packet of Ethernet.
_PIECE_BYTES = 1400


class Dropped(ConnectionError):
    """The connection has to be reset here."""


@dataclass(eq=False)
class Fault:
    """One fault on order. ``taken`` is set when a request has met it; ``release`` ends a stall before its time."""

    kind: Kind
    method: str
    channel: str
    seq: int | None  # None: any
    after_bytes: int = 0  # of the body; 0: before the response, or before the first byte is read
    seconds: float | None = None  # of a stall; None: until released
    length: int = 0  # bytes to corrupt
    status: int = 0
    bytes_per_s: int = 0  # of a limit
    until: float = 0.0  # loop time at which a limit ends
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    _released: asyncio.Event = field(default_factory=asyncio.Event)
    _passed: int = 0  # body bytes so far

    def release(self) -> None:
        self._released.set()

    async def begin(self) -> None:
        """To be called before the first byte. Raises Dropped."""
        if self.after_bytes == 0:
            await self._strike()

    async def through(self, data: bytes) -> AsyncIterator[bytes]:
        """What becomes of body bytes on their way. Raises Dropped after exactly ``after_bytes``."""
        start, self._passed = self._passed, self._passed + len(data)
        if self.kind == "corrupt":
            first = min(max(self.after_bytes - start, 0), len(data))
            last = min(max(self.after_bytes + self.length - start, 0), len(data))
            yield data[:first] + bytes(byte ^ 0xFF for byte in data[first:last]) + data[last:]
        elif self.kind == "limit":
            for at in range(0, len(data), _PIECE_BYTES):
                piece = data[at : at + _PIECE_BYTES]
                if (left := self.until - asyncio.get_running_loop().time()) > 0:
                    await asyncio.sleep(min(left, len(piece) / self.bytes_per_s))
                yield piece
        elif start < self.after_bytes <= self._passed:
            head = self.after_bytes - start
            yield data[:head]
            await self._strike()
            if tail := data[head:]:
                yield tail
        else:
            yield data

    async def _strike(self) -> None:
        if self.kind == "reset":
            raise Dropped
        if self.kind == "stall":
            try:
                async with asyncio.timeout(self.seconds):
                    await self._released.wait()
            except TimeoutError:
                pass


class Faults:
    """The faults on order. Channel names are without the base path."""

    def __init__(self) -> None:
        self._ordered: list[Fault] = []
        self._met: list[Fault] = []

    def reset(self, method: str, channel: str, seq: int | None = None, *, after_bytes: int = 0) -> Fault:
        """Reset (RST) the connection once ``after_bytes`` of the body have passed."""
        return self._order(Fault("reset", method, channel, seq, after_bytes))

    def stall(
        self, method: str, channel: str, seq: int | None = None, *, after_bytes: int = 0, seconds: float | None = None
    ) -> Fault:
        """Neither read nor relay for ``seconds``, or until released, once ``after_bytes`` have passed."""
        return self._order(Fault("stall", method, channel, seq, after_bytes, seconds=seconds))

    def corrupt(
        self, method: str, channel: str, seq: int | None = None, *, after_bytes: int = 0, length: int = 188
    ) -> Fault:
        """Invert ``length`` bytes: for this one reader (GET), or for all of them (POST)."""
        return self._order(Fault("corrupt", method, channel, seq, after_bytes, length=length))

    def answer(self, method: str, channel: str, seq: int | None = None, *, status: int) -> Fault:
        """Answer ``status`` instead of serving the request."""
        return self._order(Fault("answer", method, channel, seq, status=status))

    def limit(self, method: str, channel: str, *, bytes_per_s: int, seconds: float) -> Fault:
        """Let no more than that through, on each connection, for ``seconds``."""
        until = asyncio.get_running_loop().time() + seconds
        return self._order(Fault("limit", method, channel, None, bytes_per_s=bytes_per_s, until=until))

    def _order(self, fault: Fault) -> Fault:
        self._ordered.append(fault)
        return fault

    def take(self, method: str, channel: str, seq: int) -> Fault | None:
        for fault in list(self._ordered):
            if (fault.method, fault.channel) == (method, channel) and fault.seq in (None, seq):
                over = fault.kind == "limit" and asyncio.get_running_loop().time() >= fault.until
                if fault.kind != "limit" or over:
                    self._ordered.remove(fault)
                if over:
                    continue
                self._met.append(fault)
                fault.taken.set()
                return fault
        return None

    def clear(self) -> None:
        """Forget what was ordered and end what stalls."""
        self._ordered.clear()
        for fault in self._met:
            fault.release()
        self._met.clear()
