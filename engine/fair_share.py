"""Whose turn it is on one device: numbers only, no clock, no loop, no frames.

Every member has an account of the device seconds that it used. The rules:

1. Who comes back while others compete starts where the least served of them stands (start-time fair queueing: Goyal,
   Vin, Cheng 1996): time that nobody wanted is not saved up, and a member that was away owes nothing.
2. A member *stands back* when it had nothing to run until the others were level with it. Since it last did, one that
   used less than the longest run of the competitors is within its share. Of those the one that is due first goes.
3. When nobody is within the share, the least served goes; due times only decide between equals.

A graph that always has frames waiting is within its share for one run and then waits for its turn. One that needs
less than its share goes before it whenever it has a frame; as a run cannot be interrupted, it waits at most for the
run that is under way, and for others that are within their share and due before it.

With runs of at most ``c`` seconds the accounts of competitors are never further apart than ``2 c``, whatever comes
and goes, so nobody starves (tests/unit/test_fair_share.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

M = TypeVar("M")  # hashable

#: No run is free: members whose runs take no measurable time take turns as well.
LEAST_S: Final = 1e-7


@dataclass(slots=True)
class _Account:
    """Device seconds. ``used``: of all time, raised by rule 1; ``since_rest``: since it last stood back."""

    used: float
    since_rest: float = 0.0
    last: float = 0.0


class FairShare(Generic[M]):
    """Members enter when they have something to run and leave when they have not."""

    def __init__(self) -> None:
        self._accounts: dict[M, _Account] = {}
        self._competing: dict[M, _Account] = {}
        self._floor = 0.0  # the least served competitor's account; never falls
        self._top = 0.0  # the most served member's

    def __contains__(self, member: M) -> bool:
        """Whether it competes."""
        return member in self._competing

    def __len__(self) -> int:
        return len(self._competing)

    @property
    def competing(self) -> list[M]:
        return list(self._competing)

    def enter(self, member: M) -> None:
        """It has something to run. No change if it competes already."""
        if member in self._competing:
            return
        account = self._accounts.get(member)
        if account is None:
            account = self._accounts[member] = _Account(self._floor)
        elif account.used <= self._floor:
            account.used, account.since_rest = self._floor, 0.0
        self._competing[member] = account

    def leave(self, member: M) -> None:
        """It has nothing to run; its account stays."""
        if self._competing.pop(member, None) is not None and not self._competing:
            self._floor = self._top  # the device is idle: everybody has what they wanted

    def forget(self, member: M) -> None:
        """It will not come back."""
        self.leave(member)
        self._accounts.pop(member, None)

    def choose(self, due: Mapping[M, float]) -> M:
        """Who runs now. ``due``: when each competitor's next run should be over, on any one clock; not empty."""
        competing = self._competing
        if len(due) == 1:
            member = next(iter(due))
            self._floor = max(self._floor, competing[member].used)
            return member
        accounts = [competing[member] for member in due]
        self._floor = max(self._floor, min([account.used for account in accounts]))
        longest = max([account.last for account in accounts])
        turns = [
            (False, at, account.used) if account.since_rest < longest else (True, account.used, at)
            for account, at in zip(accounts, due.values(), strict=True)
        ]
        return list(due)[turns.index(min(turns))]

    def charge(self, member: M, seconds: float) -> None:
        """A run of the member took so long. One that was forgotten meanwhile is not charged."""
        account = self._accounts.get(member)
        if account is None:
            return
        if seconds < LEAST_S:
            seconds = LEAST_S
        account.used += seconds
        account.since_rest += seconds
        account.last = seconds
        if account.used > self._top:
            self._top = account.used
