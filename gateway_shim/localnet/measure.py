"""What can be said about a stream from the pts that went in, the pts that came out, and the sound: pure functions.

Pts are ticks of 90 kHz, sound is float32 at 48 kHz, mono. A frame's identity is its pts (output pts = input pts).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TICKS = 90_000
SAMPLE_RATE = 48_000

#: Louder than this share of the peak is sound, for onsets; a codec's pre-echo stays below.
_ONSET_SHARE = 0.25
#: An onset is preceded by this much silence; bursts of numbered clips are 0.1 s long and 0.5 s apart at 60 fps.
_SILENCE_S = 0.2
#: Offsets searched by correlation. More than half the gap of most rhythms would find the wrong beat.
_MAX_LAG_S = 1.0
#: Below this normalised correlation the two sounds have too little in common for their offset to mean anything.
_MIN_CORRELATION = 0.3


@dataclass(frozen=True)
class FrameTally:
    """Every frame that was sent, by what became of it."""

    sent: int
    received: int  # pictures, repeats included
    lost: int  # sent and never received
    duplicated: int  # received again
    out_of_order: int  # received after a later one
    unknown: int  # received and never sent: a pts was changed on the way


def tally(sent: Iterable[int], received: Sequence[int]) -> FrameTally:
    """Compare pts that were sent with pts in the order of their arrival."""
    expected = set(sent)
    seen = Counter(received)
    latest = -1
    backwards = 0
    for pts in received:
        # An equal pts is a duplicate and already counted as one.
        backwards += pts < latest
        latest = max(latest, pts)
    return FrameTally(
        sent=len(expected),
        received=len(received),
        lost=len(expected - seen.keys()),
        duplicated=sum(count - 1 for count in seen.values()),
        out_of_order=backwards,
        unknown=len(seen.keys() - expected),
    )


def longest_gap(sent: Iterable[int], received: Iterable[int]) -> int:
    """Most frames lost in a row."""
    got = set(received)
    longest = run = 0
    for pts in sorted(set(sent)):
        run = 0 if pts in got else run + 1
        longest = max(longest, run)
    return longest


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` (0..1) of them lie, interpolated; None for no values."""
    return float(np.quantile(np.asarray(values), share)) if len(values) else None


def latencies_ms(published: Mapping[int, float], received: Iterable[tuple[int, float]]) -> list[float]:
    """Milliseconds from the publishing of each frame to its first arrival; both clocks are monotonic seconds."""
    first: dict[int, float] = {}
    for pts, at in received:
        first.setdefault(pts, at)
    return [(at - published[pts]) * 1000 for pts, at in first.items() if pts in published]


@dataclass(frozen=True)
class Sound:
    """Sound on the stream's time line. ``samples[0]`` plays at ``pts``; where nothing was sent there is silence."""

    samples: NDArray[np.float32]
    pts: int

    def pts_at(self, sample: int) -> float:
        return self.pts + sample * TICKS / SAMPLE_RATE


def lay_out(blocks: Sequence[tuple[int, NDArray[np.float32]]]) -> Sound | None:
    """Blocks of sound, each with the pts of its first sample, on one time line; where two overlap, the later one."""
    if not blocks:
        return None
    origin = min(pts for pts, _ in blocks)
    placed = [(round((pts - origin) * SAMPLE_RATE / TICKS), samples) for pts, samples in blocks]
    line = np.zeros(max(at + len(samples) for at, samples in placed), np.float32)
    for at, samples in placed:
        line[at : at + len(samples)] = samples
    return Sound(line, origin)


def onsets(sound: Sound) -> list[float]:
    """Pts at which sound begins after silence."""
    loud = np.abs(sound.samples)
    peak = float(loud.max(initial=0.0))
    if peak <= 0:
        return []
    where = np.flatnonzero(loud > peak * _ONSET_SHARE)
    starts = where[np.diff(where, prepend=-SAMPLE_RATE) > _SILENCE_S * SAMPLE_RATE]
    return [sound.pts_at(int(start)) for start in starts]


def nearest_offset_ms(begins: Sequence[float], due: Sequence[int]) -> float | None:
    """Median of (sound - picture) in ms, each onset against the nearest frame that is due one; None without either.

    Positive: the sound is late.
    """
    if not begins or not due:
        return None
    frames = np.sort(np.asarray(due, np.float64))
    offsets = []
    for begin in begins:
        after = int(np.searchsorted(frames, begin))
        near = frames[max(0, after - 1) : after + 1]
        offsets.append(float(begin - near[np.abs(near - begin).argmin()]) * 1000 / TICKS)
    return float(np.median(offsets))


def lag_ms(reference: Sound, sound: Sound) -> float | None:
    """How much later ``sound`` plays than the same sound in ``reference``, by their pts, in ms; None if unalike.

    Normalised cross-correlation, searched over a second either way. Since pictures keep their pts, this is the offset
    between picture and sound that the way through added. Positive: the sound is late.
    """
    shift = round((sound.pts - reference.pts) * SAMPLE_RATE / TICKS)
    length = max(len(reference.samples), len(sound.samples) + abs(shift))
    size = 1 << int(np.ceil(np.log2(length + _MAX_LAG_S * SAMPLE_RATE + 1)))
    ours = np.zeros(size)
    theirs = np.zeros(size)
    theirs[: len(reference.samples)] = reference.samples
    # What begins before the reference is cut; it has nothing to be compared with.
    part = sound.samples[max(0, -shift) :]
    ours[max(0, shift) : max(0, shift) + len(part)] = part
    norm = float(np.sqrt(np.dot(theirs, theirs) * np.dot(ours, ours)))
    if norm == 0:
        return None
    correlation = np.fft.irfft(np.fft.rfft(ours) * np.conj(np.fft.rfft(theirs)), size) / norm
    reach = int(_MAX_LAG_S * SAMPLE_RATE)
    lags = np.concatenate([correlation[-reach:], correlation[: reach + 1]])
    best = int(lags.argmax())
    return None if lags[best] < _MIN_CORRELATION else (best - reach) * 1000 / SAMPLE_RATE
