"""Whose sound goes out: the graph's where it is there in time, the input's everywhere else, each moment once.

The input's sound is the clock. The graph's sound has the pts of what it was made of, so it takes the place of exactly
that stretch. While the engine is expected to give sound, the input's waits for it; it goes out itself when it is due,
when the graph skipped it, or when the engine went away. Stamps are rounded, samples are not: everything here is
counted in samples, and the engine is told and answers positions, so that the two fit to the sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import av

from ..media.decode import Sound
from ..media.sound import MAX_STAMP_NOISE, SAMPLE_RATE, TICKS_PER_SAMPLE, TIME_BASE
from .av_sync import AudioGate

_SAMPLE_BYTES = 4  # two channels of s16

#: A stamp that differs by less from the count is rounding; by more, sound is missing.
_NOISE = round(MAX_STAMP_NOISE / TICKS_PER_SAMPLE)


@dataclass(slots=True)
class _Waiting:
    """Input sound that has not gone out. ``begin``: position of its first sample."""

    begin: int
    samples: bytes
    due: float  # loop time at which it goes out as it is

    @property
    def end(self) -> int:
        return self.begin + len(self.samples) // _SAMPLE_BYTES


class StreamSound:
    """Stands before the gate and is used like one: `put` is for the input, `replace` for the graph.

    ``hold_s``: how much input may wait for the graph.
    """

    def __init__(self, gate: AudioGate[Sound], hold_s: float = 30.0) -> None:
        self._gate = gate
        self._hold = round(hold_s * SAMPLE_RATE)
        self._waiting: deque[_Waiting] = deque()
        self._end: int | None = None  # position behind the last input
        self._extra_s: float | None = None  # how long the graph may take; None: it gives no sound
        self.replaced_samples = 0  # that the graph gave
        self.late_samples = 0  # that it gave when the input's were out already

    # ---- the engine's side

    def expect(self, extra_s: float) -> None:
        """From here on the graph gives sound; input waits for it until ``extra_s`` after it is due."""
        self._extra_s = extra_s

    @property
    def expects(self) -> bool:
        """Whether input waits for the graph."""
        return self._extra_s is not None

    def give_up(self) -> None:
        """The graph gives none (any more): what waits goes out as it came."""
        self._extra_s = None
        while self._waiting:
            self._pass_on()

    def replace(self, begin: int, samples: bytes) -> None:
        """The graph's sound for the stretch that begins at a position, 48 kHz s16 stereo."""
        count = len(samples) // _SAMPLE_BYTES
        if not self._waiting:
            self.late_samples += count
            return
        first = self._waiting[0].begin
        cut = min(max(first - begin, 0), count)
        self.late_samples += cut
        # The graph cannot know more than it was given.
        begin, end = begin + cut, min(begin + count, self._waiting[-1].end)
        if begin >= end:
            return
        samples = samples[cut * _SAMPLE_BYTES :][: (end - begin) * _SAMPLE_BYTES]
        while self._waiting[0].begin < begin:
            self._pass_on(until=begin)  # what the graph skipped
        self._give(begin, samples, self._waiting[0].due)
        self.replaced_samples += end - begin
        while self._waiting and self._waiting[0].begin < end:
            head = self._waiting.popleft()
            if head.end > end:
                rest = head.samples[(end - head.begin) * _SAMPLE_BYTES :]
                self._waiting.appendleft(_Waiting(end, rest, head.due))

    # ---- the input's side

    def put(self, sound: Sound, due: float) -> int:
        """``due``: moment after which it goes out even without its picture. Returns its first sample's position."""
        begin = round(sound.pts / TICKS_PER_SAMPLE)
        if self._end is not None and abs(begin - self._end) < _NOISE:
            begin = self._end
        self._end = begin + sound.frame.samples
        if self._extra_s is None:
            self._gate.put(sound, due)
        else:
            self._waiting.append(_Waiting(begin, samples_of(sound), due + self._extra_s))
            while self._end - self._waiting[0].begin > self._hold:
                self._pass_on()
        return begin

    def _pass_on(self, until: int | None = None) -> None:
        """The oldest input goes out as it came, up to a position."""
        head = self._waiting.popleft()
        if until is not None and until < head.end:
            cut = (until - head.begin) * _SAMPLE_BYTES
            self._waiting.appendleft(_Waiting(until, head.samples[cut:], head.due))
            head = _Waiting(head.begin, head.samples[:cut], head.due)
        self._give(head.begin, head.samples, head.due)

    def _give(self, begin: int, samples: bytes, due: float) -> None:
        self._gate.put(sound_of(round(begin * TICKS_PER_SAMPLE), samples), due)

    # ---- the output's side, as `AudioGate`

    def release(self, video_pts: int) -> Iterator[Sound]:
        return self._gate.release(video_pts)

    def overdue(self, now: float) -> Iterator[Sound]:
        while self._waiting and self._waiting[0].due <= now:
            self._pass_on()
        return self._gate.overdue(now)

    def rest(self) -> Iterator[Sound]:
        self.give_up()
        return self._gate.rest()


def samples_of(sound: Sound) -> bytes:
    """The samples of a block, interleaved, without the padding of its plane."""
    return bytes(sound.frame.planes[0])[: sound.frame.samples * _SAMPLE_BYTES]


def sound_of(pts: int, samples: bytes) -> Sound:
    """A block of 48 kHz s16 stereo."""
    frame = av.AudioFrame("s16", "stereo", len(samples) // _SAMPLE_BYTES)
    frame.planes[0].update(samples.ljust(frame.planes[0].buffer_size, b"\0"))
    frame.sample_rate = SAMPLE_RATE
    frame.pts = pts
    frame.time_base = TIME_BASE
    return Sound(frame, pts)
