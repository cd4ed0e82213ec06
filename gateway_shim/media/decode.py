"""Access units to pictures and sound. Synchronous; belongs to one worker thread per stream.

PyAV lets go of the GIL while it decodes. Threads share the slices of a picture; threads that share frames would add a
frame of delay each (hot-path.md section 5). The Python around the codec takes 3 us per picture and 16 us per block of
sound, most of that resampling.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import av
from av.video.reformatter import VideoReformatter

from .bit_rate import RateMeter, declared_rate
from .colour import Colour, colour_of
from .hardware import DecoderDevice, open_decoder
from .pes import AccessUnit
from .psi import Track
from .sound import TIME_BASE, Sound, SoundDecoder
from .threads import decoder_threads
from .timeline import Timeline

logger = logging.getLogger(__name__)

__all__ = ["Colour", "Decoder", "DecoderCounters", "DecoderSettings", "Picture", "Sound"]

# How many units to wait for a key frame after a loss: 10 s at 30 fps. A source that refreshes without key frames is
# decoded from anywhere after that.
_MAX_WAIT_UNITS = 300
# Distance to assume for a picture without a stamp when nothing is known of the rate: 30 fps.
_DEFAULT_STEP = 3_000
_MAX_STEP = 9_000  # a pause is no frame rate
# Units that the GPU may refuse; damage in the stream looks the same, and the CPU costs no more than time then.
_MAX_HARDWARE_ERRORS = 10


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """threads: of the video codec; 0: as many as the machine has for ``streams`` streams at once.
    device: to begin with; the CPU takes over where it fails.
    max_pixels: larger pictures are refused; a damaged size must not take the memory. 4096x2304 by default.
    """

    threads: int = 0
    streams: int = 1
    device: DecoderDevice = "cpu"
    max_pixels: int = 4096 * 2304


@dataclass(frozen=True, slots=True)
class Picture:
    """One decoded picture. ``frame`` is 8-bit yuv420p of even size, owned by the decoder's pool: its samples are
    references of later pictures and must not be written. ``pts``: 90 kHz. ``colour``: what its numbers mean."""

    frame: av.VideoFrame
    pts: int
    width: int
    height: int
    colour: Colour


@dataclass(slots=True)
class DecoderCounters:
    """pictures, sounds: given out. video_errors, audio_errors: units that did not decode. skipped_units: video units
    passed over while waiting for a key frame. clock_jumps: times the source's clock fell back."""

    pictures: int = 0
    sounds: int = 0
    video_errors: int = 0
    audio_errors: int = 0
    skipped_units: int = 0
    clock_jumps: int = 0


class Decoder:
    """Pictures in the order of their pts, sound in its own order. Never raises for what the units contain."""

    def __init__(self, settings: DecoderSettings | None = None) -> None:
        self._timeline = Timeline()
        self._pictures = _PictureDecoder(settings or DecoderSettings())
        self._sound = SoundDecoder()
        self._given = DecoderCounters()

    @property
    def counters(self) -> DecoderCounters:
        return DecoderCounters(
            pictures=self._given.pictures,
            sounds=self._given.sounds,
            video_errors=self._pictures.errors,
            audio_errors=self._sound.errors,
            skipped_units=self._pictures.skipped,
            clock_jumps=self._timeline.jumps,
        )

    @property
    def frame_rate(self) -> Fraction | None:
        """Of the pictures by their stamps, or what the stream says of itself; None before either is known."""
        return self._pictures.frame_rate

    @property
    def device(self) -> DecoderDevice:
        """Where pictures are decoded now."""
        return self._pictures.device

    @property
    def fallback(self) -> str:
        """Why the CPU works in the place of the GPU."""
        return self._pictures.fallback

    @property
    def position(self) -> tuple[int, int]:
        """Latest stamp of the source, and what is added to it; see `Timeline`."""
        return self._timeline.position

    def resume(self, source: int, offset: int, overlap: int) -> None:
        """Go on where another decoder of the same stream was; see `Timeline`."""
        self._timeline.resume(source, offset, overlap)

    def feed(self, units: Iterable[AccessUnit]) -> list[Picture | Sound]:
        """Decode units; a picture comes out with its unit, or after as many units as the stream reorders."""
        decoded: list[Picture | Sound] = []
        for unit in units:
            for placed in self._timeline.place(unit):
                self._decode(placed, decoded)
        return decoded

    def flush(self) -> list[Picture | Sound]:
        """The input is over: what the codecs still hold. Feeding may go on afterwards, from a key frame."""
        decoded: list[Picture | Sound] = []
        for placed in self._timeline.flush():
            self._decode(placed, decoded)
        self._count(decoded, self._pictures.flush())
        self._count(decoded, self._sound.flush())
        return decoded

    def _decode(self, unit: AccessUnit, decoded: list[Picture | Sound]) -> None:
        self._count(decoded, self._pictures.feed(unit) if unit.track.kind == "video" else self._sound.feed(unit))

    def _count(self, decoded: list[Picture | Sound], more: list[Picture] | list[Sound]) -> None:
        for item in more:
            if isinstance(item, Picture):
                self._given.pictures += 1
            else:
                self._given.sounds += 1
            decoded.append(item)


class _PictureDecoder:
    def __init__(self, settings: DecoderSettings) -> None:
        self.errors = 0
        self.skipped = 0
        self.device: DecoderDevice = settings.device
        self.fallback = ""
        self._threads = settings.threads or decoder_threads(settings.streams)
        self._hardware_errors = 0
        self._settings = settings
        self._track: Track | None = None
        self._context: av.VideoCodecContext | None = None
        self._waiting = True  # for a key frame
        self._waited = 0
        self._last_pts: int | None = None
        self._step = _DEFAULT_STEP
        self._rate = RateMeter()
        self._reformatter = VideoReformatter()
        self._reformats: tuple[str, int, int] | None = None

    @property
    def frame_rate(self) -> Fraction | None:
        declared = self._context.framerate if self._context is not None else None
        return self._rate.rate or declared_rate(declared)

    def feed(self, unit: AccessUnit) -> list[Picture]:
        pictures: list[Picture] = []
        if self._context is None or unit.track != self._track:
            pictures += self.flush()
            self._track = unit.track
            self._context = self._open(unit.track)
        elif unit.discontinuity:
            pictures += self._drain(self._context)
        if self._waiting:
            if not unit.keyframe and self._waited < _MAX_WAIT_UNITS:
                self._waited += 1
                self.skipped += 1
                return pictures
            self._waiting = False
            self._waited = 0
        packet = av.Packet(unit.data)
        packet.pts, packet.dts = unit.pts, unit.dts
        packet.time_base = TIME_BASE
        try:
            frames = self._context.decode(packet)
        except av.FFmpegError as exc:
            if self._is_hardware_over(unit, exc):
                self._context = self._open(unit.track)
                self._waiting = True
                return pictures + self.feed(unit)
            self.errors += 1
            return pictures + self._drain(self._context)
        return pictures + [self._picture(frame) for frame in frames if not frame.is_corrupt]

    def flush(self) -> list[Picture]:
        pictures = self._drain(self._context) if self._context is not None else []
        self._context = None
        return pictures

    def _open(self, track: Track) -> av.VideoCodecContext:
        try:
            context = open_decoder(track.codec, self.device)
        except Exception as exc:  # FFmpeg's errors, and PyAV's for a codec that the GPU does not know
            if self.device == "cpu":
                raise
            self._to_cpu(exc)
            context = open_decoder(track.codec, "cpu")
        context.thread_count = self._threads if self.device == "cpu" else 1
        context.thread_type = "SLICE"
        context.options = {"max_pixels": str(self._settings.max_pixels)}
        return context

    def _is_hardware_over(self, unit: AccessUnit, exc: Exception) -> bool:
        """Whether this failure ends decoding on the GPU: a key frame, which needs nothing before it, or too many."""
        if self.device == "cpu":
            return False
        self._hardware_errors += 1
        if not unit.keyframe and self._hardware_errors < _MAX_HARDWARE_ERRORS:
            return False
        self._to_cpu(exc)
        return True

    def _to_cpu(self, exc: Exception) -> None:
        self.device, self.fallback = "cpu", f"the GPU does not decode this stream: {exc}"
        logger.warning("%s; the CPU does from here on", self.fallback)

    def _drain(self, context: av.VideoCodecContext) -> list[Picture]:
        """Take what the codec holds back for reordering, and begin again at the next key frame."""
        self._waiting = True
        pictures = []
        try:
            if context.is_open:
                pictures = [self._picture(frame) for frame in context.decode(None) if not frame.is_corrupt]
        except av.FFmpegError:
            self.errors += 1
        context.flush_buffers()
        return pictures

    def _picture(self, frame: av.VideoFrame) -> Picture:
        pts, last = frame.pts, self._last_pts
        if pts is None:
            # Pictures come in the order of display: one step after the last is where it belongs.
            pts = last + self._step if last is not None else frame.dts or 0
        elif last is not None and 0 < pts - last <= _MAX_STEP:
            self._step = pts - last
        self._last_pts = pts
        self._rate.add(pts)
        # What PyAV downloads from a GPU has lost its tags; the codec has them.
        tagged = self._context if self.device == "cuda" and self._context is not None else frame
        colour = colour_of(tagged.colorspace, tagged.color_range, frame.format.name)
        width, height = frame.width & ~1, frame.height & ~1  # 4:2:2 and 4:4:4 may be odd
        # From NVDEC: libavcodec has copied its NV12 down, and here it is copied into planes. The CPU's decoder makes
        # neither copy.
        if frame.format.name != "yuv420p" or (width, height) != (frame.width, frame.height):
            frame = self._to_yuv420p(frame, width, height, colour)
        return Picture(frame, pts, width, height, colour)

    def _to_yuv420p(self, frame: av.VideoFrame, width: int, height: int, colour: Colour) -> av.VideoFrame:
        """The same colours in 8-bit 4:2:0. Matrix and range stay, which swscale does only when told both."""
        shape = (frame.format.name, width, height)
        if shape != self._reformats:  # a reformatter that sees several shapes sets itself up again each time
            self._reformatter, self._reformats = VideoReformatter(), shape
        return self._reformatter.reformat(
            frame,
            width,
            height,
            "yuv420p",
            src_color_range=colour.range_tag,
            dst_color_range=colour.range_tag,
            threads=1,
        )
