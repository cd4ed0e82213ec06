"""Pictures and sound to segments of an MPEG transport stream. Synchronous; belongs to one worker thread per stream.

Output contract: protocol.md 2.3. H.264 without B-frames, each segment begins with PAT, PMT and an IDR picture, stamps
are those of the input and strictly increase, size and tracks never change.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import av

from .clock import TICKS_PER_S
from .fit import Fitter
from .h264 import H264Encoder
from .mux import TsWriter
from .opus import OpusEncoder
from .settings import EncoderSettings
from .sound import TIME_BASE

_AUDIO_BIT_RATE = 96_000  # transparent for stereo music at 48 kHz
# Readers join in the middle of a segment and find nothing before they have seen the tables.
_TABLES_TICKS = TICKS_PER_S // 2
# Sound that comes before the first picture waits for it: the first picture takes longer through the graph. The same
# bound as the orchestrator's own worker (protocol.md 2.3); 100 blocks are 2 s.
_MAX_EARLY_BLOCKS = 100


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole transport packets. Where ``starts_segment`` is set they begin a segment: PAT, PMT, IDR picture."""

    data: bytes
    starts_segment: bool


@dataclass(slots=True)
class EncoderCounters:
    """pictures: encoded. dropped_pictures: their pts did not lie after the last. scaled_pictures: came in another
    size or format. segments: begun. dropped_sounds: blocks without a track, or long before the first picture.
    dropped_samples: sound that lay before the first picture or behind what was out already."""

    pictures: int = 0
    dropped_pictures: int = 0
    scaled_pictures: int = 0
    segments: int = 0
    dropped_sounds: int = 0
    dropped_samples: int = 0


class Encoder:
    """One output stream. Every call gives all bytes of what it was given; nothing waits for a later call but sound of
    less than 20 ms, and sound that is earlier than the first picture."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._settings = settings
        self._counters = EncoderCounters()
        self._writer = TsWriter(audio=settings.audio)
        self._fitter = Fitter(settings.width, settings.height, settings.colour)
        self._video: H264Encoder | None = H264Encoder(settings)
        self._audio = OpusEncoder(_AUDIO_BIT_RATE) if settings.audio else None
        self._early: deque[tuple[av.AudioFrame, int]] = deque()
        self._segment_ticks = round(settings.segment_s * TICKS_PER_S)
        self._last_pts: int | None = None
        self._segment_pts = 0  # of its first picture
        self._segment_asked = False
        self._tables_pts = 0  # when the tables were written last

    @property
    def counters(self) -> EncoderCounters:
        if self._audio is not None:
            self._counters.dropped_samples = self._audio.dropped_samples
        return self._counters

    @property
    def h264(self) -> H264Encoder | None:
        """None when closed."""
        return self._video

    def video(self, frame: av.VideoFrame, pts: int) -> list[Chunk]:
        """Encode one picture at ``pts`` (90 kHz); none where that is not after the last one (counted).

        The samples are not written to; ``pts``, ``time_base`` and ``pict_type`` of the frame object are set.
        """
        if self._video is None:
            raise ValueError("the encoder is closed")
        if self._last_pts is not None and pts <= self._last_pts:
            self._counters.dropped_pictures += 1
            return []
        is_first = self._last_pts is None
        starts = is_first or self._segment_asked or pts - self._segment_pts >= self._segment_ticks
        if not self._fitter.fits(frame):
            self._counters.scaled_pictures += 1
            frame = self._fitter.fit(frame)
        frame.pts = pts
        frame.time_base = TIME_BASE
        self._last_pts = pts
        chunks = [self._picture(packet) for packet in self._video.encode(frame, idr=starts)]
        self._counters.pictures += 1
        if is_first:
            chunks += self._begin_audio(pts)
        return chunks

    def begin_segment(self) -> None:
        """The next picture begins a segment: the one before it was lost, and its rest is of use to nobody."""
        self._segment_asked = True

    def audio(self, sound: av.AudioFrame, pts: int) -> list[Chunk]:
        """Encode a block of 48 kHz s16 stereo whose first sample is at ``pts`` (90 kHz).

        Time before the first picture and time that is out already are dropped. Raises ValueError for another format.
        """
        if self._video is None:
            raise ValueError("the encoder is closed")
        if self._audio is None:
            self._counters.dropped_sounds += 1
            return []
        if self._last_pts is None:
            if len(self._early) == _MAX_EARLY_BLOCKS:
                self._early.popleft()
                self._counters.dropped_sounds += 1
            self._early.append((sound, pts))
            return []
        return self._sounds(self._audio.encode(sound, pts))

    @property
    def sound_late(self) -> int:
        """Ticks by which the latest block of sound goes out behind its pts."""
        return self._audio.late if self._audio is not None else 0

    def flush(self) -> list[Chunk]:
        """The stream is over: what is left of it. Closes the encoder."""
        if self._video is None:
            return []
        chunks = [self._picture(packet) for packet in self._video.flush()] if self._last_pts is not None else []
        if self._audio is not None and self._last_pts is not None:
            chunks += self._sounds(self._audio.flush())
        self.close()
        return chunks

    def close(self) -> None:
        """Let go of the codecs; what they hold is lost. May be called twice."""
        self._video = None
        self._early.clear()

    def _picture(self, packet: av.Packet[Any]) -> Chunk:
        pts = packet.pts
        assert pts is not None
        starts = packet.is_keyframe and (
            self._counters.segments == 0 or self._segment_asked or pts - self._segment_pts >= self._segment_ticks
        )
        tables = b""
        if starts:
            self._counters.segments += 1
            self._segment_pts = pts
            self._segment_asked = False
        if starts or pts - self._tables_pts >= _TABLES_TICKS:
            self._tables_pts = pts
            tables = self._writer.tables()
        return Chunk(tables + self._writer.video(pts, bytes(packet), keyframe=packet.is_keyframe), starts)

    def _begin_audio(self, pts: int) -> list[Chunk]:
        if self._audio is None:
            return []
        self._audio.begin(pts)
        chunks = []
        while self._early:
            chunks += self._sounds(self._audio.encode(*self._early.popleft()))
        return chunks

    def _sounds(self, packets: list[tuple[int, bytes]]) -> list[Chunk]:
        return [Chunk(self._writer.audio(pts, data), False) for pts, data in packets]
