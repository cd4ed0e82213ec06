"""Pictures and sound to segments of an MPEG transport stream. Synchronous; belongs to one worker thread per stream.

Output contract: protocol.md 2.3. H.264 without B-frames, each segment begins with PAT, PMT and an IDR picture, stamps
are those of the input and strictly increase, size and tracks never change.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
from av.video.frame import PictureType

from .clock import TICKS_PER_S
from .colour import Colour
from .fit import Fitter
from .mux import TsWriter
from .opus import OpusEncoder
from .sound import TIME_BASE

_DEFAULT_RATE = Fraction(30)
_DEFAULT_COLOUR = Colour()
_AUDIO_BIT_RATE = 96_000  # transparent for stereo music at 48 kHz
# Readers join in the middle of a segment and find nothing before they have seen the tables.
_TABLES_TICKS = TICKS_PER_S // 2
# Sound that comes before the first picture waits for it: the first picture takes longer through the graph. The same
# bound as the orchestrator's own worker (protocol.md 2.3); 100 blocks are 2 s.
_MAX_EARLY_BLOCKS = 100

# Bits per second that look right for textured content at 30 fps: 1.5 Mbit/s at 512x512, 3 at 720p, 5 at 1080p. The
# exponent follows: content of four times the pixels needs about twice the bits.
_REFERENCE_BIT_RATE = 1_500_000
_REFERENCE_PIXELS_PER_S = 512 * 512 * 30
_BIT_RATE_EXPONENT = 0.58


def default_bit_rate(width: int, height: int, frame_rate: Fraction | None) -> int:
    """Bits per second of video for a size and rate."""
    pixels_per_s = width * height * float(frame_rate or _DEFAULT_RATE)
    ratio = math.pow(pixels_per_s / _REFERENCE_PIXELS_PER_S, _BIT_RATE_EXPONENT)
    return round(_REFERENCE_BIT_RATE * ratio)


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What the stream is like from its first byte to its last.

    width, height: of every output picture, even.
    frame_rate: None when unknown or variable; it only steers the rate control.
    bit_rate: of the video, bits per second; None for one that suits the size.
    preset: of x264. threads: of x264; above 1 they share a picture's slices.
    segment_s: seconds of media in a segment.
    audio: whether there is a sound track.
    colour: what the numbers of the pictures mean; it is written into the stream.
    """

    width: int
    height: int
    frame_rate: Fraction | None = None
    bit_rate: int | None = None
    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium"] = "superfast"
    segment_s: float = 2.0
    audio: bool = True
    colour: Colour = _DEFAULT_COLOUR
    threads: int = 1

    def __post_init__(self) -> None:
        if self.width < 16 or self.height < 16 or self.width % 2 or self.height % 2:
            raise ValueError(f"cannot encode {self.width}x{self.height}: both must be even and at least 16")
        if self.segment_s <= 0:
            raise ValueError(f"segment_s is {self.segment_s}, it must be positive")


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
        self._video: av.VideoCodecContext | None = _open_x264(settings)
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
        # A decoded frame still says what type it was, and x264 would take that for an order.
        frame.pict_type = PictureType.I if starts else PictureType.NONE
        self._last_pts = pts
        chunks = [self._picture(packet) for packet in self._video.encode(frame)]
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

    def flush(self) -> list[Chunk]:
        """The stream is over: what is left of it. Closes the encoder."""
        if self._video is None:
            return []
        chunks = [self._picture(packet) for packet in self._video.encode(None)] if self._last_pts is not None else []
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


def _open_x264(settings: EncoderSettings) -> av.VideoCodecContext:
    """x264 without any delay. An IDR picture comes where it is asked for and, apart from that, at scene cuts."""
    context: av.VideoCodecContext = av.CodecContext.create("libx264", "w")
    bit_rate = settings.bit_rate or default_bit_rate(settings.width, settings.height, settings.frame_rate)
    context.width, context.height, context.pix_fmt = settings.width, settings.height, "yuv420p"
    context.time_base = TIME_BASE
    context.framerate = settings.frame_rate or _DEFAULT_RATE  # without it x264 plans for 90000 frames per second
    context.bit_rate = bit_rate
    context.thread_count = settings.threads
    # Frames do not bring their tags into the stream; only what is set before opening gets there.
    colour = settings.colour
    context.colorspace = context.color_primaries = context.color_trc = colour.matrix_tag
    context.color_range = colour.range_tag
    context.options = {
        "preset": settings.preset,
        "tune": "zerolatency",
        "bf": "0",
        "forced-idr": "1",
        "g": str(1 << 20),
        "aud": "1",  # required in transport streams, ISO/IEC 13818-1 section 2.14.1
        # One second of buffer: an IDR picture may take several times its share, a segment not.
        "maxrate": str(bit_rate * 3 // 2),
        "bufsize": str(bit_rate),
    }
    context.open()
    return context
