"""What trickle says on the wire, without a socket: URLs, headers, answers, waiting rules.

A channel is a named sequence of segments at one URL; a segment is the body of one POST, relayed byte for byte to any
number of GETs while it is written. Facts: go-livepeer trickle/README.md and trickle_server.go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

SEQ_NEXT: Final = -1  # the segment that will be written next
SEQ_CURRENT: Final = -2  # the newest segment that has bytes, else the first one to come

HEADER_SEQ: Final = "Lp-Trickle-Seq"
HEADER_LATEST: Final = "Lp-Trickle-Latest"  # index to be written next, one past the newest segment with bytes
HEADER_CLOSED: Final = "Lp-Trickle-Closed"
HEADER_RESET: Final = "Lp-Trickle-Reset"
HEADER_EXPECT_CONTENT: Final = "Expect-Content"  # MIME type, when a channel is created

STATUS_OUTSIDE_WINDOW: Final = 470  # the channel exists, the segment does not, or no longer

# The trickle server keeps five segments (go-livepeer trickle_server.go, maxSegmentsPerStream).
# Falling further behind than this is a gap, not a delay: resume at the live edge.
MAX_LAG_SEGMENTS: Final = 5


class ChannelError(ConnectionError):
    """One segment, or one request, did not get through. The channel itself may live on."""


class SegmentTooLarge(ChannelError):
    """The segment has more bytes than its reader wants to hold."""


#: Why a channel is over whose server could not be reached for too long.
UNREACHABLE = "unreachable"


class ChannelClosed(ChannelError):
    """The channel is over. ``reason``: "closed header", "404", "unreachable", or "deleted" (by ourselves)."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the channel is over: {reason}")
        self.reason = reason


def channel_base(channel_url: str) -> str:
    """The URL to append ``/{seq}`` to. One trailing slash goes: ``//`` in a path is answered with a redirect."""
    return channel_url.removesuffix("/")


def segment_url(channel_url: str, seq: int) -> str:
    """URL of segment ``seq``, -2 or more. A lower index makes the server drop the connection unanswered."""
    if seq < SEQ_CURRENT:
        raise ValueError(f"segment {seq}: the lowest index is {SEQ_CURRENT}")
    return f"{channel_base(channel_url)}/{seq}"


def next_url(channel_url: str) -> str:
    """URL that answers at once with the index that will be written next."""
    return f"{channel_base(channel_url)}/next"


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and trickle headers of one response; a header that is absent or unreadable is None."""

    status: int
    seq: int | None
    latest: int | None
    closed: bool

    @property
    def over(self) -> str | None:
        """Why the channel is over, or None while it lives. The Closed header counts whatever the status is."""
        if self.closed:
            return "closed header"
        return "404" if self.status == 404 else None


def read_answer(status: int, headers: Mapping[str, str]) -> Answer:
    """``headers`` must look names up without regard to case, as those of every HTTP library do."""
    return Answer(
        status=status,
        seq=_index(headers.get(HEADER_SEQ)),
        latest=_index(headers.get(HEADER_LATEST)),
        closed=HEADER_CLOSED in headers,
    )


def _index(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


class Backoff:
    """How long to wait after each failure in a row, and when to give up.

    The wait doubles from ``first_s`` to ``max_s``. Giving up takes ``give_up_s`` of nothing but failures, counted
    from the first of them.
    """

    def __init__(self, first_s: float, max_s: float, give_up_s: float, clock: Callable[[], float]) -> None:
        self._first_s, self._max_s, self._give_up_s, self._clock = first_s, max_s, give_up_s, clock
        self._wait_s = first_s
        self._failing_since: float | None = None

    def succeeded(self) -> None:
        self._wait_s = self._first_s
        self._failing_since = None

    def failed(self) -> float | None:
        """Seconds to wait before the next attempt, or None: give up."""
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since >= self._give_up_s:
            return None
        wait_s, self._wait_s = self._wait_s, min(self._wait_s * 2, self._max_s)
        return wait_s
