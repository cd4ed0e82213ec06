"""Sound blocks into Opus packets of 20 ms whose time follows the blocks' time."""

from __future__ import annotations

from fractions import Fraction

import av

from .clock import TICKS_PER_S
from .sound import MAX_STAMP_NOISE, SAMPLE_RATE, TICKS_PER_SAMPLE

_BLOCK = SAMPLE_RATE // 50  # samples per packet: 20 ms, what every WebRTC peer expects
_BLOCK_TICKS = TICKS_PER_S // 50
_SAMPLE_BYTES = 4  # two channels of s16
_PRE_SKIP_AT = 10  # offset of the encoder's delay in OpusHead, RFC 7845 section 5.1


class OpusEncoder:
    """48 kHz s16 stereo in, ``(pts, packet)`` out. Stamps strictly increase; what lies behind is dropped.

    A packet's stamp is that of its first decoded sample, which is 6.5 ms of encoder delay before the sound given in:
    the sound itself keeps its time.
    """

    def __init__(self, bit_rate: int) -> None:
        context: av.AudioCodecContext = av.CodecContext.create("libopus", "w")
        context.sample_rate = SAMPLE_RATE
        context.layout = "stereo"
        context.format = "s16"
        context.bit_rate = bit_rate
        context.time_base = Fraction(1, SAMPLE_RATE)
        context.options = {"frame_duration": "20"}
        context.open()
        self._context = context
        head = context.extradata or b""
        delay = int.from_bytes(head[_PRE_SKIP_AT : _PRE_SKIP_AT + 2], "little")
        self._lead = round(delay * TICKS_PER_SAMPLE)
        self._waiting = b""  # less than a block
        self._anchor: Fraction | None = None  # pts of the first sample of this run
        self._floor: int | None = None  # nothing may begin before this
        self._blocks = 0  # encoded in this run
        self._position = 0  # samples encoded in all runs: the codec's own count has no gaps
        self.dropped_samples = 0
        self.late = 0  # ticks by which the latest block goes out behind its pts, within `MAX_STAMP_NOISE`

    def begin(self, pts: int) -> None:
        """Drop all sound whose packets would be stamped before ``pts``, the first picture's.

        A stream that begins at 0 would otherwise begin with a stamp below 0, which is 26 h in 33 bits.
        """
        self._floor = pts + self._lead

    def encode(self, frame: av.AudioFrame, pts: int) -> list[tuple[int, bytes]]:
        """Take a block whose first sample is at ``pts`` (90 kHz). Raises ValueError for another format."""
        if (frame.format.name, frame.layout.name, frame.sample_rate) != ("s16", "stereo", SAMPLE_RATE):
            raise ValueError(f"the sound is {frame.format.name} {frame.layout.name} {frame.sample_rate} Hz")
        samples = bytes(frame.planes[0])[: frame.samples * _SAMPLE_BYTES]
        packets: list[tuple[int, bytes]] = []
        expected = self._expected()
        step = Fraction(0) if expected is None else pts - expected
        self.late = -round(step) if abs(step) < MAX_STAMP_NOISE else 0
        if expected is not None and step >= _BLOCK_TICKS:
            packets += self._end_run()  # silence fills its last packet, which ends before this block begins
            expected = None
        elif step >= MAX_STAMP_NOISE:
            samples = bytes(_samples(step) * _SAMPLE_BYTES) + samples  # a gap shorter than a packet is silence
        elif step <= -MAX_STAMP_NOISE:
            samples = self._behind(samples, -step)
        if expected is None:
            if self._floor is not None and pts < self._floor:
                before = len(samples)
                samples = self._behind(samples, Fraction(self._floor - pts))
                pts += round((before - len(samples)) // _SAMPLE_BYTES * TICKS_PER_SAMPLE)
            if not samples:
                return packets
            self._anchor = Fraction(pts)
        self._waiting += samples
        return packets + self._encode_blocks()

    def flush(self) -> list[tuple[int, bytes]]:
        """The sound is over: the last packets, filled with silence. Nothing may be encoded afterwards."""
        packets = self._end_run()
        end = packets[-1][0] + _BLOCK_TICKS if packets else None
        for packet in self._context.encode(None):
            if end is not None:
                packets.append((end, bytes(packet)))
                end += _BLOCK_TICKS
        return packets

    def _expected(self) -> Fraction | None:
        """Stamp that the next sample has if nothing is missing; None when none came yet."""
        if self._anchor is None:
            return None
        count = self._blocks * _BLOCK + len(self._waiting) // _SAMPLE_BYTES
        return self._anchor + count * TICKS_PER_SAMPLE

    def _behind(self, samples: bytes, ticks: Fraction) -> bytes:
        """``samples`` without those of the first ``ticks``."""
        cut = min(_samples(ticks) * _SAMPLE_BYTES, len(samples))
        self.dropped_samples += cut // _SAMPLE_BYTES
        return samples[cut:]

    def _end_run(self) -> list[tuple[int, bytes]]:
        missing = -len(self._waiting) % (_BLOCK * _SAMPLE_BYTES)
        self._waiting += bytes(missing)
        packets = self._encode_blocks()
        self._anchor = None
        self._blocks = 0
        return packets

    def _encode_blocks(self) -> list[tuple[int, bytes]]:
        packets = []
        size = _BLOCK * _SAMPLE_BYTES
        assert self._anchor is not None or not self._waiting
        while len(self._waiting) >= size:
            frame = av.AudioFrame("s16", "stereo", _BLOCK)
            frame.planes[0].update(self._waiting[:size])
            frame.sample_rate = SAMPLE_RATE
            frame.pts = self._position
            frame.time_base = Fraction(1, SAMPLE_RATE)
            self._waiting = self._waiting[size:]
            self._position += _BLOCK
            assert self._anchor is not None
            pts = round(self._anchor) + self._blocks * _BLOCK_TICKS - self._lead
            self._blocks += 1
            # libopus has no frames of delay: the delay is within its packets, one comes for each block.
            packets += [(pts, bytes(packet)) for packet in self._context.encode(frame)]
        return packets


def _samples(ticks: Fraction) -> int:
    """Samples in a time, upwards: cutting or filling one too many keeps stamps from falling."""
    return -int(-ticks // TICKS_PER_SAMPLE)
