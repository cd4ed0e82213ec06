"""H.264 out of pictures, a packet for each at once: x264, or NVENC with x264 to fall back on.

What may change in a running stream (preset, bit rate, codec) changes with an IDR picture, which brings its own
parameter sets: the encoder is opened anew. Nothing is lost by that, for no picture waits in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

import av
from av.video.frame import PictureType

from .bit_rate import DEFAULT_RATE, RateMeter, default_bit_rate
from .clock import TICKS_PER_S
from .hardware import NVENC, X264, EncoderName
from .preset import PresetChoice
from .settings import EncoderSettings
from .sound import TIME_BASE
from .threads import encoder_threads

logger = logging.getLogger(__name__)

#: Both encoders plan by the frame rate that they were told: a 60 fps stream that was taken for 30 had 2.4 times the
#: bits that it should, one of 15 half of them. (x264 can go by the stamps instead, but then holds a picture back.)
_RATE_TOLERANCE: Final = 0.1

Context = av.VideoCodecContext


class H264Encoder:
    """One stream's encoder. ``frame`` below is yuv420p of the settings' size, with its stamps."""

    def __init__(self, settings: EncoderSettings, clock: Callable[[], float] = time.perf_counter) -> None:
        self._settings = settings
        self._clock = clock
        self._rate = RateMeter(settings.frame_rate)
        self._preset = PresetChoice(settings.preset)
        self._last_pts: int | None = None
        self.fallback = ""  # why x264 works in the place of the hardware
        self.name: EncoderName = settings.codec
        self._context = self._open()

    @property
    def preset(self) -> str:
        """Of x264; NVENC has one of its own."""
        return self._preset.now if self.name == X264 else NVENC_OPTIONS["preset"]

    @property
    def bit_rate(self) -> int:
        return self._bit_rate

    @property
    def load(self) -> float:
        """Share of their time that pictures take here: at 1 the stream falls behind."""
        return self._preset.load

    def encode(self, frame: av.VideoFrame, *, idr: bool) -> list[av.Packet[Any]]:
        """The packets of one picture; ``idr``: it begins a segment, and changes that were due take place.

        Raises av.FFmpegError only where x264 does.
        """
        assert frame.pts is not None
        packets = self._renew() if idr else []
        interval_s = (frame.pts - self._last_pts) / TICKS_PER_S if self._last_pts is not None else 0.0
        self._last_pts = frame.pts
        self._rate.add(frame.pts)
        # A decoded frame still says what type it was, and x264 would take that for an order.
        frame.pict_type = PictureType.I if idr else PictureType.NONE
        began = self._clock()
        try:
            packets += self._context.encode(frame)
        except av.FFmpegError as exc:
            if self.name == X264:
                raise
            self._note(f"{self.name} failed: {exc}")
            self._context = self._open()
            packets += self._context.encode(frame)  # the first one of an encoder is an IDR picture
        self._preset.spent(self._clock() - began, interval_s)
        return packets

    def flush(self) -> list[av.Packet[Any]]:
        try:
            return list(self._context.encode(None))
        except av.FFmpegError:
            if self.name == X264:
                raise
            return []  # the hardware went away with the end of the stream

    def _renew(self) -> list[av.Packet[Any]]:
        """Open anew if something else is wanted by now; what the old encoder still holds."""
        preset = self._preset.now
        another_preset = self._preset.next() != preset and self.name == X264
        rate = self._rate.rate or DEFAULT_RATE
        if not another_preset and abs(rate - self._frame_rate) <= _RATE_TOLERANCE * self._frame_rate:
            return []
        rest = self.flush() if self._last_pts is not None else []
        self._context = self._open()
        logger.info("preset %s, %.2f fps, %d bit/s from here on", self.preset, self._frame_rate, self._bit_rate)
        return rest

    def _open(self) -> Context:
        settings, rate = self._settings, self._rate.rate or DEFAULT_RATE
        self._frame_rate = rate
        self._bit_rate = settings.bit_rate or default_bit_rate(settings.width, settings.height, rate)
        if self.name == NVENC:
            try:
                return open_nvenc(settings, self._bit_rate, rate)
            except (av.FFmpegError, ValueError) as exc:  # the driver's limit of sessions, or of sizes
                self._note(f"{NVENC} does not open: {exc}")
        return open_x264(settings, self._bit_rate, rate, self._preset.now)

    def _note(self, reason: str) -> None:
        self.name, self.fallback = X264, reason
        logger.warning("%s; this stream is encoded with %s from here on", reason, X264)


def _prepared(name: EncoderName, settings: EncoderSettings, bit_rate: int, frame_rate: Fraction) -> Context:
    context: Context = av.CodecContext.create(name, "w")
    context.width, context.height, context.pix_fmt = settings.width, settings.height, "yuv420p"
    context.time_base = TIME_BASE
    context.framerate = frame_rate  # without it rate control plans for 90000 frames per second
    context.bit_rate = bit_rate
    # Frames do not bring their tags into the stream; only what is set before opening gets there.
    colour = settings.colour
    context.colorspace = context.color_primaries = context.color_trc = colour.matrix_tag
    context.color_range = colour.range_tag
    return context


def _options(bit_rate: int) -> dict[str, str]:
    return {
        "bf": "0",
        "forced-idr": "1",
        "g": str(1 << 20),
        "aud": "1",  # required in transport streams, ISO/IEC 13818-1 section 2.14.1
        # One second of buffer: an IDR picture may take several times its share, a segment not.
        "maxrate": str(bit_rate * 3 // 2),
        "bufsize": str(bit_rate),
    }


def open_x264(settings: EncoderSettings, bit_rate: int, frame_rate: Fraction, preset: str) -> Context:
    """x264 without any delay. An IDR picture comes where it is asked for and, apart from that, at scene cuts."""
    context = _prepared(X264, settings, bit_rate, frame_rate)
    pixels_per_s = settings.width * settings.height * float(frame_rate)
    context.thread_count = settings.threads or encoder_threads(pixels_per_s, settings.streams)
    context.options = _options(bit_rate) | {
        "preset": preset,
        "tune": "zerolatency",
    }
    context.open()
    return context


#: The SDK's low-latency set-up: p4 is the middle of p1 (fastest) to p7, ull has neither B-frames nor lookahead, and
#: with delay 0 and zerolatency libavcodec gives each picture's bytes in its own call (libavcodec/nvenc.c).
NVENC_OPTIONS: Final = {
    "preset": "p4",
    "tune": "ull",
    "rc": "cbr",
    "delay": "0",
    "zerolatency": "1",
    "rc-lookahead": "0",
    "spatial-aq": "1",
}


def open_nvenc(settings: EncoderSettings, bit_rate: int, frame_rate: Fraction) -> Context:
    """NVENC, as x264 above. It takes yuv420p from memory and uploads it itself."""
    context = _prepared(NVENC, settings, bit_rate, frame_rate)
    context.options = _options(bit_rate) | NVENC_OPTIONS
    context.open()
    return context
