"""Audio units to blocks of 48 kHz stereo with exact time."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av

from .clock import TICKS_PER_S
from .pes import AccessUnit
from .psi import Track

SAMPLE_RATE = 48_000
TICKS_PER_SAMPLE = Fraction(TICKS_PER_S, SAMPLE_RATE)  # 15/8
TIME_BASE = Fraction(1, TICKS_PER_S)

# Stamps of a track count samples, rounded to whatever the container before ours had (1 ms in FLV). Within this much
# of the count they are noise and the count goes on; from here on something was lost or inserted, and the stamp is
# right. 10 ms is half an Opus frame and a quarter of the 40 ms that picture and sound may be apart.
MAX_STAMP_NOISE = TICKS_PER_S // 100

# libavcodec's names; the decoder for MPEG audio of all layers is called mp3.
_DECODERS = {"aac": "aac", "aac_latm": "aac_latm", "opus": "opus", "mp2": "mp3"}


@dataclass(frozen=True, slots=True)
class Sound:
    """A block of sound. ``frame``: s16, interleaved stereo, 48 kHz; ``pts``: of its first sample, 90 kHz.

    late: ticks by which that is behind the stamp of the source, which counting samples has evened out.
    """

    frame: av.AudioFrame
    pts: int
    late: int = 0


class SoundDecoder:
    """Decodes one audio track after another. Time is counted in samples from the last stamp that did not fit."""

    def __init__(self) -> None:
        self.errors = 0
        self._track: Track | None = None
        self._context: av.AudioCodecContext | None = None
        self._resampler: av.AudioResampler | None = None
        self._shape: tuple[str, str, int] | None = None  # format, layout, rate that the resampler takes
        self._anchor = Fraction(0)  # pts of the first sample since the last restart
        self._taken = 0  # samples since then, at the track's rate
        self._given = 0  # samples since then, at 48 kHz
        self._late = 0  # ticks that the count is behind the latest stamp

    def feed(self, unit: AccessUnit) -> list[Sound]:
        """Sound of one unit: none while a decoder waits for more, none for a unit that does not decode (counted)."""
        sounds: list[Sound] = []
        if unit.track != self._track or self._context is None:
            sounds += self.flush()
            self._track = unit.track
            self._context = av.CodecContext.create(_DECODERS[unit.track.codec], "r")  # type: ignore[assignment]
        elif unit.discontinuity:
            sounds += self._restart()
        packet = av.Packet(unit.data)
        packet.pts = unit.pts
        packet.time_base = TIME_BASE
        try:
            assert self._context is not None
            for frame in self._context.decode(packet):
                sounds += self._convert(frame)
        except (av.FFmpegError, ValueError):
            self.errors += 1
        return sounds

    def flush(self) -> list[Sound]:
        sounds = self._restart()
        self._context = None
        return sounds

    def _convert(self, frame: av.AudioFrame) -> list[Sound]:
        sounds: list[Sound] = []
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        expected = self._anchor + Fraction(self._taken * TICKS_PER_S, frame.sample_rate)
        pts = frame.pts
        if self._resampler is None or shape != self._shape:
            sounds += self._restart()
            self._anchor = Fraction(expected if pts is None else pts)
        elif pts is not None and abs(pts - expected) >= MAX_STAMP_NOISE:
            sounds += self._restart()
            self._anchor = Fraction(pts)
        elif pts is not None:
            self._late = round(expected - pts)
        if self._resampler is None:
            self._resampler = av.AudioResampler(format="s16", layout="stereo", rate=SAMPLE_RATE)
            self._shape = shape
        self._taken += frame.samples
        frame.pts = None  # the resampler would otherwise follow the stamps in its own way
        return sounds + self._give(self._resampler.resample(frame))

    def _restart(self) -> list[Sound]:
        """End the run of samples: give out what the resampler still has and begin to count again."""
        sounds: list[Sound] = []
        if self._resampler is not None:
            sounds = self._give(self._resampler.resample(None))
            self._anchor += self._given * TICKS_PER_SAMPLE
        self._resampler = None
        self._taken = self._given = self._late = 0
        return sounds

    def _give(self, frames: list[av.AudioFrame]) -> list[Sound]:
        sounds = []
        for frame in frames:
            if frame is None or not frame.samples:  # a resampler with nothing to do gives None back
                continue
            pts = round(self._anchor + self._given * TICKS_PER_SAMPLE)
            self._given += frame.samples
            frame.pts = pts
            frame.time_base = TIME_BASE
            sounds.append(Sound(frame, pts, self._late))
        return sounds
