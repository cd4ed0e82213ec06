"""Which codecs this machine has. Known by using them: FFmpeg lists NVIDIA's on every machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, Literal

import av
from av.codec.hwaccel import HWAccel

logger = logging.getLogger(__name__)

EncoderName = Literal["libx264", "h264_nvenc"]
X264: Final = "libx264"
NVENC: Final = "h264_nvenc"

DecoderDevice = Literal["cpu", "cuda"]
CodecChoice = Literal["auto", "cpu", "cuda"]

# Only for the words: most machines have none, and FFmpeg's errors would puzzle their owners.
_NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia")

# Within the limits of every generation of NVENC (145x49) and NVDEC (48x16).
_PROBE_SIZE: Final = 256
_PROBE_PICTURES: Final = 3


@dataclass(frozen=True, slots=True)
class Codecs:
    """What streams begin with; each falls back on the CPU by itself. ``reason``: a sentence, why not the GPU."""

    encoder: EncoderName = X264
    decoder: DecoderDevice = "cpu"
    reason: str = ""

    def __str__(self) -> str:
        because = f" ({self.reason})" if self.reason else ""
        return f"{self.encoder}, decoding on {self.decoder}{because}"


ON_CPU: Final = Codecs()


def probe(choice: CodecChoice) -> Codecs:
    """Encode and decode some pictures on the GPU. Blocks: a driver takes up to a second to wake.

    Encoder and decoder are chosen apart: there are cards with only one of them (A100, H100: no NVENC).
    """
    if choice == "cpu":
        return Codecs(reason="the setting codec is cpu")
    reasons = []
    encoder: EncoderName = X264
    decoder: DecoderDevice = "cpu"
    try:
        probe_encoder(NVENC)
        encoder = NVENC
    except Exception as exc:  # drivers fail in many ways; streams run on the CPU then
        reasons.append(f"NVENC does not work: {exc}")
    try:
        probe_decoder()
        decoder = "cuda"
    except Exception as exc:
        reasons.append(f"NVDEC does not work: {exc}")
    reason = "; ".join(reasons)
    if choice == "auto" and len(reasons) == 2 and not _NVIDIA_DRIVER.exists():
        reason = "no NVIDIA GPU"
    if reason and choice == "cuda":
        logger.warning("codec is set to cuda, but %s; the CPU does that part", reason)
    return Codecs(encoder, decoder, reason)


def probe_encoder(name: EncoderName) -> bytes:
    """The bytes of a few grey pictures. Raises what the codec raises, or RuntimeError."""
    context: av.VideoCodecContext = av.CodecContext.create(name, "w")
    context.width = context.height = _PROBE_SIZE
    context.pix_fmt, context.time_base, context.framerate = "yuv420p", Fraction(1, 30), Fraction(30)
    packets = []
    for number in range(_PROBE_PICTURES):
        frame = av.VideoFrame(_PROBE_SIZE, _PROBE_SIZE, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes([128]) * plane.buffer_size)
        frame.pts, frame.time_base = number, context.time_base
        packets += context.encode(frame)
    packets += context.encode(None)
    if len(packets) != _PROBE_PICTURES:
        raise RuntimeError(f"{len(packets)} packets for {_PROBE_PICTURES} pictures")
    return b"".join(map(bytes, packets))


def probe_decoder() -> None:
    """Decode on the GPU what x264 encoded. Raises what the codec raises, or RuntimeError."""
    context = open_decoder("h264", "cuda", fall_back=False)
    frames = []
    for packet in [*context.parse(probe_encoder(X264)), *context.parse()]:
        frames += context.decode(packet)
    frames += context.decode(None)
    if len(frames) != _PROBE_PICTURES or not context.is_hwaccel:
        raise RuntimeError(f"{len(frames)} of {_PROBE_PICTURES} pictures came back")


def open_decoder(codec: str, device: DecoderDevice, *, fall_back: bool = True) -> av.VideoCodecContext:
    """A decoder that has not begun. On the GPU its frames come back to memory as NV12.

    fall_back: libavcodec decodes what the GPU does not know (4:2:2, 10 bit in H.264) on the CPU by itself.
    """
    if device == "cpu":
        return av.CodecContext.create(codec, "r")  # type: ignore[return-value]
    # The context that the process has on that GPU anyway: one of its own takes hundreds of megabytes a decoder there.
    shared: dict[str, object] = {"primary_ctx": "1"}
    accelerator = HWAccel("cuda", allow_software_fallback=fall_back, options=shared)
    return av.CodecContext.create(codec, "r", accelerator)  # type: ignore[return-value]
