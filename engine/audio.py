"""A session's sound on its way into runs: blocks of any length in, buffers of LoadAudioTensor's length out.

When a graph runs is decided by what it takes and gives:

- With a live picture among its inputs, or pictures among its outputs, it runs for each frame ("mixed"). A run takes
  the whole buffers that are complete by then, in one piece; between two buffers LoadAudioTensor gives the last one
  again, nothing behind it runs, and no sound leaves. Before the first buffer it gives silence.
- Otherwise ("paced by sound") it runs for each buffer, and frames are answered without a picture at once.

Every sample is in at most one buffer. A buffer ends early where the sound has a gap: its pts hold for all of it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

from proto import engine_pb2 as pb

from .errors import InvalidRequest, Violation
from .graph.workflow import Prompt, Workflow

#: ComfyStream's default of LoadAudioTensor.buffer_size, and the bounds of ours: one packet, and what may wait.
DEFAULT_BUFFER_MS: Final = 500.0
MIN_BUFFER_MS: Final = 10.0
MAX_BUFFER_MS: Final = 10_000.0

#: Sound that waits for its run at most; the oldest goes. A client that sends a file faster than it is run has this
#: much ahead.
MAX_WAITING_S: Final = 30.0

#: Beyond the latency budget, sound may wait this much longer for its run: it comes in bursts of a segment.
BURST_S: Final = 2.0

#: Stamps that differ by less from the count of samples are rounding; by more, sound is missing.
MAX_STAMP_NOISE_S: Final = 0.01

#: Sample rates and channels that a client may send.
SAMPLE_RATES: Final = (8_000, 192_000)
MAX_CHANNELS: Final = 8

_SAMPLE_BYTES: Final = 2  # s16


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """Of a session's sound, both ways: interleaved s16, little-endian."""

    sample_rate: int = 48_000
    channels: int = 2
    time_base: Fraction = Fraction(1, 90_000)  # seconds per tick of pts

    @property
    def frame_bytes(self) -> int:
        """One sample of every channel."""
        return _SAMPLE_BYTES * self.channels

    def ticks(self, samples: int) -> Fraction:
        """How long so many samples are, in ticks."""
        return Fraction(samples, self.sample_rate) / self.time_base


@dataclass(frozen=True, slots=True)
class Sound:
    """A block of sound; ``pts`` of its first sample."""

    pts: int
    samples: bytes
    format: AudioFormat


def audio_format(message: pb.AudioFormat) -> AudioFormat:
    """Checked; InvalidRequest names every wrong field at once, with paths under ``audio``."""
    violations = []
    least, most = SAMPLE_RATES
    for name, value, low, high in (
        ("sample_rate", message.sample_rate, least, most),
        ("channels", message.channels, 1, MAX_CHANNELS),
    ):
        if not low <= value <= high:
            violations.append(Violation(f"audio.{name}", f"{name} is {value}, not {low} to {high}", "out_of_range"))
    time_base = Fraction(1, 90_000)
    if message.HasField("time_base"):
        if message.time_base.numerator <= 0 or message.time_base.denominator <= 0:
            text = "time_base has to be a positive number of seconds per tick"
            violations.append(Violation("audio.time_base", text, "out_of_range"))
        else:
            time_base = Fraction(message.time_base.numerator, message.time_base.denominator)
    if violations:
        raise InvalidRequest("; ".join(violation.message for violation in violations), violations)
    return AudioFormat(message.sample_rate, message.channels, time_base)


def buffer_samples(prompt: Prompt, sample_rate: int) -> int:
    """Samples per channel that one run takes: what the first LoadAudioTensor asks for, within our bounds."""
    wanted = next(
        (
            node["inputs"].get("buffer_size", DEFAULT_BUFFER_MS)
            for node in prompt.values()
            if node["class_type"] == "LoadAudioTensor"
        ),
        DEFAULT_BUFFER_MS,
    )
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or math.isnan(wanted):  # a link, for one
        wanted = DEFAULT_BUFFER_MS
    return int(sample_rate * min(max(wanted, MIN_BUFFER_MS), MAX_BUFFER_MS) / 1000)


def paced_by_sound(workflow: Workflow) -> bool:
    """Whether a run of the graph belongs to a buffer of sound and not to a frame."""
    return bool(workflow.audio_inputs) and not workflow.image_inputs and not workflow.image_outputs


@dataclass(slots=True)
class _Stretch:
    """Sound without a gap."""

    begin: Fraction  # pts of the first sample that is left
    samples: bytearray = field(default_factory=bytearray)
    arrivals: deque[tuple[int, float]] = field(default_factory=deque)  # (samples up to here, when they came)
    taken: int = 0  # samples per channel


class AudioQueue:
    """Blocks in, buffers out. ``patience_s``: how long sound may wait, which may change; None: for ever."""

    def __init__(self, format: AudioFormat, patience_s: float | None, clock: Callable[[], float]) -> None:
        self.format = format
        self.dropped_samples = 0
        self.ended = False
        self.patience_s = patience_s
        self._clock = clock
        self._stretches: deque[_Stretch] = deque()

    def put(self, blocks: Iterable[tuple[int, bytes]]) -> None:
        """Take blocks ``(pts, samples)`` in. Bytes beyond a whole sample are cut off."""
        format = self.format
        noise = Fraction(MAX_STAMP_NOISE_S) / format.time_base
        for pts, samples in blocks:
            count = len(samples) // format.frame_bytes
            if not count:
                continue
            last = self._stretches[-1] if self._stretches else None
            if last is None or abs(pts - last.begin - format.ticks(self._left(last))) >= noise:
                last = _Stretch(Fraction(pts))
                self._stretches.append(last)
            last.samples += samples[: count * format.frame_bytes]
            last.arrivals.append((last.taken + self._left(last), self._clock()))
        too_much = sum(map(self._left, self._stretches)) - int(MAX_WAITING_S * format.sample_rate)
        while too_much > 0:
            cut = min(too_much, self._left(self._stretches[0]))
            self._cut(self._stretches[0], cut)
            self.dropped_samples += cut
            too_much -= cut
            if not self._left(self._stretches[0]):
                self._stretches.popleft()

    def ready(self, size: int) -> bool:
        """Whether ``take`` has a buffer, or something to throw away."""
        if not self._stretches:
            return False
        whole = [stretch for stretch in self._stretches if self.ended or stretch is not self._stretches[-1]]
        return any(map(self._left, whole)) or self._left(self._stretches[-1]) >= size

    @property
    def oldest_at(self) -> float:
        """When the oldest sound that is left came; raises IndexError when nothing is left."""
        return self._stretches[0].arrivals[0][1]

    def take(self, size: int, *, all_complete: bool = False) -> Sound | None:
        """The oldest buffer of ``size`` samples that is still worth it; with ``all_complete`` those behind it too."""
        while self._stretches:
            stretch = self._stretches[0]
            left = self._left(stretch)
            is_last = len(self._stretches) == 1
            if left >= size:
                count = size * (left // size if all_complete else 1)
            elif is_last and not self.ended:
                return None
            elif left:
                count = left
            else:
                self._stretches.popleft()
                continue
            sound, arrived = self._cut(stretch, count)
            if self.patience_s is None or self._clock() - arrived <= self.patience_s:
                return sound
            self.dropped_samples += count
        return None

    def _left(self, stretch: _Stretch) -> int:
        return len(stretch.samples) // self.format.frame_bytes

    def _cut(self, stretch: _Stretch, count: int) -> tuple[Sound, float]:
        """The first samples of a stretch, and when the last of them came."""
        size = count * self.format.frame_bytes
        sound = Sound(round(stretch.begin), bytes(stretch.samples[:size]), self.format)
        del stretch.samples[:size]
        stretch.begin += self.format.ticks(count)
        stretch.taken += count
        while stretch.arrivals[0][0] < stretch.taken:
            stretch.arrivals.popleft()
        return sound, stretch.arrivals[0][1]


def _patience_s(latency_budget_ms: int) -> float | None:
    return latency_budget_ms / 1000 + BURST_S if latency_budget_ms else None


class SoundFeed:
    """What of a session's sound its next run takes. ``has_video``: whether frames come as well."""

    def __init__(
        self,
        format: AudioFormat,
        *,
        has_video: bool = True,
        latency_budget_ms: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.format = format
        self._has_video = has_video
        self._queue = AudioQueue(format, _patience_s(latency_budget_ms), clock)
        self._prompt: Prompt | None = None
        self._size = 0
        self._wanted = False
        self._paced = False

    def put(self, blocks: Iterable[tuple[int, bytes]]) -> None:
        if self._wanted:
            self._queue.put(blocks)

    def set_latency_budget(self, budget_ms: int) -> None:
        """Of what waits as well; 0: none."""
        self._queue.patience_s = _patience_s(budget_ms)

    def end(self) -> None:
        """No more follows: the rest is a buffer too."""
        self._queue.ended = True

    def follow(self, prompt: Prompt) -> None:
        """Serve this prompt from here on."""
        if prompt is self._prompt:
            return
        workflow = Workflow(prompt)
        self._prompt = prompt
        self._size = buffer_samples(prompt, self.format.sample_rate)
        self._wanted = bool(workflow.audio_inputs)
        self._paced = paced_by_sound(workflow) or (self._wanted and not self._has_video)

    @property
    def is_wanted(self) -> bool:
        """Whether the workflow takes sound."""
        return self._wanted

    @property
    def is_pace(self) -> bool:
        """Whether a run belongs to a buffer, and frames give nothing."""
        return self._paced

    def ready(self) -> bool:
        """Whether sound alone is reason enough to run."""
        return self._paced and self._queue.ready(self._size)

    @property
    def waits_since(self) -> float:
        """When the oldest sound came, if any is ``ready``."""
        return self._queue.oldest_at

    def take(self) -> Sound | None:
        """For a run that begins."""
        return self._queue.take(self._size, all_complete=not self._paced) if self._wanted else None
