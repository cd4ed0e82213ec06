"""From what was sent and what was seen to the figures of a run: pure functions."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from gateway_shim.localnet.measure import percentile

from . import tone
from .source import Account, Sent
from .viewer import Heard, Seen, View

TICKS = 90_000
_NUMBERS = 1 << 16

#: How far sound and picture may lie apart at one pts to be compared; one window of sound is 20 ms.
_NEAR_TICKS = TICKS // 20
#: What encoders of the source still hold when it ends: two blocks of AAC and a frame's share.
TAIL_SAMPLES = 4 * 1024


@dataclass(frozen=True)
class Span:
    """Content between two moments that a fault may have taken, seconds of the source's content clock."""

    begin: float
    end: float

    def touches(self, begin: float, end: float) -> bool:
        return begin < self.end and end > self.begin


@dataclass
class Judged:
    """One stream's figures."""

    gap_ms: float = 0.0
    samples_lost: int = 0
    samples_twice: int = 0
    samples_excused: int = 0
    losses: list[tuple[float, float, bool]] = field(default_factory=list)  # of sound: content s, whether excused
    gap_at_s: float = 0.0  # content
    offsets_ms: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    backwards: int = 0  # pts that were not above the one before
    unreadable: int = 0
    misplaced: list[tuple[float, int]] = field(default_factory=list)  # pictures with another pts: content s, ticks
    processed_pts: list[int] = field(default_factory=list)  # of pictures that show the graph's work


def judge(account: Account, view: View, excused: Sequence[Span], *, ended: bool, settled_s: float = 0.0) -> Judged:
    """``ended``: the source ended by itself, so that everything it sent has to be there. ``settled_s``: seconds of
    content from which on lateness counts."""
    found = Judged()
    frames = sorted(account.frames, key=lambda sent: (sent.epoch, sent.stamp))
    fresh = _fresh(frames, view.pictures)
    offsets = _offsets(fresh)
    found.unreadable = sum(seen.number is None for seen in view.pictures)
    found.backwards = sum(after <= before for before, after in pairwise(view.order))
    found.misplaced = [
        (round(sent.content_s, 3), moved)
        for sent, seen in fresh
        if (moved := seen.pts - sent.stamp - offsets[sent.epoch])
        and not any(span.touches(sent.content_s, sent.content_s) for span in excused)
    ]
    found.processed_pts = [seen.pts for seen in view.pictures if seen.inverted]
    expected = [(s.stamp + offsets[s.epoch], s) for s in frames if s.epoch in offsets]
    found.gap_ms, found.gap_at_s = _largest_gap(expected, view.order, excused)
    found.latencies_ms = _latencies_ms([each for each in expected if each[1].content_s >= settled_s], view)
    _judge_sound(found, view.sound, account, excused, ended=ended)
    found.offsets_ms = _av_offsets_ms(fresh, view.sound)
    return found


def _fresh(frames: Sequence[Sent], pictures: Iterable[Seen]) -> list[tuple[Sent, Seen]]:
    """Each frame with the picture in which it was seen first, both in order of display. A number that does not lie
    ahead is a picture that was held. Numbers have 16 bits and a segment may come twice: a frame is looked for behind
    the last one found."""
    places: dict[int, list[int]] = {}
    for place, sent in enumerate(frames):
        places.setdefault(sent.number % _NUMBERS, []).append(place)
    found: list[tuple[Sent, Seen]] = []
    at = -1
    for seen in pictures:
        if seen.number is None:
            continue
        ahead = (seen.number - found[-1][0].number) % _NUMBERS if found else 1
        if not 0 < ahead < _NUMBERS // 2:
            continue
        known = places.get(seen.number, [])
        index = bisect.bisect_right(known, at)
        if index < len(known):
            at = known[index]
            found.append((frames[at], seen))
    return found


def _offsets(fresh: Sequence[tuple[Sent, Seen]]) -> dict[int, int]:
    """Output pts less stamp, by epoch."""
    by_epoch: dict[int, list[int]] = {}
    for sent, seen in fresh:
        by_epoch.setdefault(sent.epoch, []).append(seen.pts - sent.stamp)
    return {epoch: statistics.mode(values) for epoch, values in by_epoch.items()}


def _largest_gap(
    expected: Sequence[tuple[int, Sent]], order: Sequence[int], excused: Sequence[Span]
) -> tuple[float, float]:
    """Largest step of output pts beyond the input's own step there, in ms; where that is, in content s."""
    if not expected:
        return 0.0, 0.0
    line = sorted(expected, key=lambda each: each[0])
    stamps = [pts for pts, _ in line]
    worst, where = 0, 0.0
    for before, after in pairwise(order):
        if after <= before:
            continue
        first = max(0, bisect.bisect_right(stamps, before) - 1)
        last = min(len(stamps) - 1, bisect.bisect_left(stamps, after))
        own = max((b - a for a, b in pairwise(stamps[first : last + 1])), default=0)
        beyond = after - before - own
        if beyond <= worst:
            continue
        contents = [sent.content_s for _, sent in line[first : last + 1]]
        if any(span.touches(min(contents), max(contents)) for span in excused):
            continue
        worst, where = beyond, min(contents)
    return worst * 1000 / TICKS, where


def _latencies_ms(expected: Sequence[tuple[int, Sent]], view: View) -> list[float]:
    """From handing a frame's bytes on to the arrival of something with its pts."""
    found = []
    for pts, sent in expected:
        if (at := view.arrived.get(pts)) is not None:
            found.append((at - sent.at) * 1000)
    return found


def _judge_sound(
    found: Judged, sound: Sequence[Heard], account: Account, excused: Sequence[Span], *, ended: bool
) -> None:
    known = [(heard.position, heard.count) for heard in sound if heard.position is not None]

    def count(begin: int, end: int) -> None:
        lost = end - begin
        if lost < 0:
            found.samples_twice -= lost
        elif lost:
            seconds = begin / tone.SAMPLE_RATE, end / tone.SAMPLE_RATE
            is_excused = any(span.touches(*seconds) for span in excused)
            found.losses.append((round(seconds[0], 3), round(seconds[1], 3), is_excused))
            if is_excused:
                found.samples_excused += lost
            else:
                found.samples_lost += lost

    for (position, length), (after, _) in pairwise(known):
        count(position + length, after)
    if ended and known and account.samples - sum(known[-1]) > TAIL_SAMPLES:
        count(sum(known[-1]), account.samples)


def _av_offsets_ms(fresh: Sequence[tuple[Sent, Seen]], sound: Sequence[Heard]) -> list[float]:
    """At each new picture: how much older than it is the sound with its pts. Positive: the sound is late."""
    known = [heard for heard in sound if heard.position is not None]
    stamps = [heard.pts for heard in known]
    period_s = tone.PERIOD / tone.SAMPLE_RATE
    found = []
    for sent, seen in fresh:
        index = bisect.bisect_right(stamps, seen.pts) - 1
        if index < 0 or seen.pts - stamps[index] > _NEAR_TICKS:
            continue
        position = known[index].position
        assert position is not None
        heard_s = position / tone.SAMPLE_RATE + (seen.pts - stamps[index]) / TICKS
        offset = sent.content_s - heard_s
        offset -= round(offset / period_s) * period_s  # the sound repeats
        found.append(offset * 1000)
    return found


def p99(values: Sequence[float]) -> float | None:
    found = percentile(values, 0.99)
    return None if found is None else round(found, 1)


def ledger_gap(frames: dict[str, int]) -> int:
    """What the account of a stream's frames lacks; 0 when it is exact."""
    settled = ("processed", "failed", "passed_through", "dropped", "in_flight")
    return frames["received"] - sum(frames[name] for name in settled)
