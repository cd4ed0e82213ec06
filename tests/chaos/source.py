"""A camera whose every frame carries its number and whose sound tells its own place, and what can go wrong with it.

Pictures and sound are encoded while they are sent, because numbers, clocks and pauses have to be free. One content
clock counts what was captured; stamps are that clock plus an offset, and jumps, pauses and restarts of the stamps are
changes of the offset, applied to finished transport packets, so that a stamp may wrap at 33 bits like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np

from gateway_shim.localnet import numbered
from gateway_shim.trickle.publisher import OutgoingSegment, Publisher
from gateway_shim.trickle.wire import ChannelClosed, ChannelError
from tests.fakes.ts_edit import MASK, shifted

from . import tone

TICKS = 90_000
#: Where ffmpeg's muxer begins. Not zero: sound that begins a little before the picture would have a stamp below it.
RESTART_PTS = 126_000
_MUX_LEAD = TICKS  # room for stamps below the first picture's: reordering, and the delay of AAC
_BACKGROUNDS = 16


@dataclass(frozen=True)
class Recipe:
    """What the input is like from its first frame on."""

    fps: int = 30
    width: int = 320
    height: int = 240
    audio: str = "aac"  # or "opus"
    b_frames: int = 0
    segment_s: float = 1.0
    first_pts: int = 126_000  # stamp of the first frame, 33 bits
    vfr: bool = False  # every third frame is left out, every fifth is late


@dataclass(frozen=True, slots=True)
class Sent:
    """One frame. ``content_s``: on the clock of what was captured. ``stamp``: its pts, unwrapped. ``epoch``: changes
    whenever stamps and content part or come together otherwise. ``at``: monotonic time of handing its bytes on."""

    number: int
    content_s: float
    stamp: int
    epoch: int
    at: float


@dataclass
class Account:
    """What was sent. ``frames``: by order; a number may come twice when a segment is repeated."""

    frames: list[Sent] = field(default_factory=list)
    samples: int = 0
    segments: int = 0
    lost_segments: int = 0  # that we could not write
    late_s: float = 0.0  # largest delay of this machine behind real time


@functools.cache
def _backgrounds(width: int, height: int) -> list[tuple[Any, bytes]]:
    pictures = [numbered.picture(number * 7, width, height).to_ndarray() for number in range(_BACKGROUNDS)]
    return [(each[:height].copy(), each[height:].tobytes()) for each in pictures]


def _picture(number: int, width: int, height: int) -> av.VideoFrame:
    luma, chroma = _backgrounds(width, height)[number % _BACKGROUNDS]
    luma = luma.copy()
    numbered.stamp(luma, number & 0xFFFF)
    planes = np.frombuffer(luma.tobytes() + chroma, np.uint8).reshape(height * 3 // 2, width)
    return av.VideoFrame.from_ndarray(planes, format="yuv420p")


class _Encoders:
    """Encoded packets of picture and sound, in 90 kHz of the content clock plus `_MUX_LEAD`."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        gop = str(max(1, round(recipe.fps * recipe.segment_s)))
        self._sink = av.open(_Bytes(), "w", format="mpegts")
        self.video: Any = self._sink.add_stream("libx264", rate=recipe.fps)
        self.video.width, self.video.height, self.video.pix_fmt = recipe.width, recipe.height, "yuv420p"
        self.video.codec_context.time_base = Fraction(1, TICKS)
        self.video.codec_context.thread_count = 1
        self.video.codec_context.options = {
            "preset": "ultrafast",
            "crf": "23",
            "forced-idr": "1",
            "x264-params": f"keyint={gop}:min-keyint=1:scenecut=0:bframes={recipe.b_frames}:open-gop=0",
        } | ({} if recipe.b_frames else {"tune": "zerolatency"})
        self.audio: Any = self._sink.add_stream(
            {"aac": "aac", "opus": "libopus"}[recipe.audio], rate=tone.SAMPLE_RATE
        )
        self.audio.codec_context.layout = "mono"
        self.audio.codec_context.format = "fltp" if recipe.audio == "aac" else "s16"
        self.audio.codec_context.bit_rate = 128_000
        self.audio.codec_context.time_base = Fraction(1, tone.SAMPLE_RATE)
        self._sink.start_encoding()
        self._block = self.audio.codec_context.frame_size or 960

    def picture(self, number: int, content: int, *, key: bool) -> list[Any]:
        frame = _picture(number, self._recipe.width, self._recipe.height)
        frame.pts, frame.time_base = content + _MUX_LEAD, Fraction(1, TICKS)
        if key:
            frame.pict_type = av.video.frame.PictureType.I
        return list(self.video.codec_context.encode(frame))

    def sound(self, first: int, until: int) -> tuple[list[Any], int]:
        """Packets of whole blocks from sample ``first`` on that begin before ``until``; where the next one begins."""
        packets: list[Any] = []
        while first < until:
            block = tone.samples(first, self._block)
            if self._recipe.audio == "aac":
                frame = av.AudioFrame.from_ndarray(block[None], "fltp", "mono")
            else:
                frame = av.AudioFrame.from_ndarray((block * 32767).astype(np.int16)[None], "s16", "mono")
            lead = _MUX_LEAD * tone.SAMPLE_RATE // TICKS
            frame.sample_rate, frame.pts, frame.time_base = (
                tone.SAMPLE_RATE,
                first + lead,
                Fraction(1, tone.SAMPLE_RATE),
            )
            packets += self.audio.codec_context.encode(frame)
            first += self._block
        return packets, first

    def close(self) -> None:
        with contextlib.suppress(av.FFmpegError, ValueError):
            self._sink.close()


class _Bytes:
    """What libav writes, until it is taken."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


class _Muxer:
    """One segment of MPEG-TS; every packet leaves at once."""

    def __init__(self, encoders: _Encoders) -> None:
        self._bytes = _Bytes()
        options = {"flush_packets": "1", "pes_payload_size": "0", "max_interleave_delta": "1", "mpegts_copyts": "1"}
        self._container = av.open(self._bytes, "w", format="mpegts", options=options)
        self._streams = [self._container.add_stream_from_template(each) for each in (encoders.video, encoders.audio)]

    def mux(self, packet: Any, *, video: bool) -> bytes:
        packet.stream = self._streams[0 if video else 1]
        self._container.mux(packet)
        return self._bytes.take()

    def finish(self) -> bytes:
        self._container.close()
        return self._bytes.take()


class Source:
    """Publishes until `stop`. Faults are asked for by the methods below and happen at the next frame or segment."""

    def __init__(self, publisher: Publisher, recipe: Recipe) -> None:
        self.account = Account()
        self.recipe = recipe
        self.stopped = asyncio.Event()
        self._publisher = publisher
        self._encoders = _Encoders(recipe)
        self._segment: OutgoingSegment | None = None
        self._muxer: _Muxer | None = None
        self._written: list[bytes] = []  # of this segment, for a repetition
        self._sent_before = 0  # frames, when this segment began
        self._offset = recipe.first_pts  # stamp - content
        self._next_offset: int | None = None  # from the next segment on, which begins at the next frame
        self._epoch = 0
        self._content = 0  # ticks captured
        self._sample = 0
        self._pause_s = 0.0
        self._vfr = recipe.vfr
        self._skip = False  # the next segment is announced and never written
        self._repeat = False
        self._late_s = 0.0
        self._number_at: dict[int, int] = {}  # by content, of frames that the codec has
        self._held: deque[tuple[bytes, Sent | None]] | None = None  # while a segment is late
        self._held_until = 0.0

    # ---- what can be asked for

    def pause(self, seconds: float) -> None:
        """The camera is off: nothing is captured, the stamps go on with the wall clock."""
        self._pause_s += seconds

    def jump(self, seconds: float) -> None:
        """All stamps from here on are that much later (or earlier)."""
        self._shift((self._offset if self._next_offset is None else self._next_offset) + round(seconds * TICKS))

    def restart_clock(self) -> float:
        """Stamps begin anew, as those of a publisher that reconnects. By how many seconds they fall."""
        offset = RESTART_PTS - self._content
        fall = self._offset - offset
        self._shift(offset)
        return fall / TICKS

    def vary(self, on: bool) -> None:
        """Frames at irregular distances."""
        self._vfr = on

    def skip_segment(self) -> None:
        self._skip = True

    def repeat_segment(self) -> None:
        self._repeat = True

    def hold(self, seconds: float) -> None:
        """Everything is that late, then comes in one burst."""
        self._late_s = seconds

    def _shift(self, offset: int) -> None:
        """A segment of its own begins with it: what the muxer and the codecs hold back belongs to the one before."""
        self._next_offset = offset

    # ---- life

    def stop(self) -> None:
        self.stopped.set()

    @property
    def content_s(self) -> float:
        return self._content / TICKS

    async def run(self) -> None:
        """Until `stop` or the end of the channel."""
        began, paused = time.monotonic(), 0.0
        number = 0
        try:
            while not self.stopped.is_set():
                due = began + paused + self._content / TICKS
                self.account.late_s = max(self.account.late_s, time.monotonic() - due)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, due - time.monotonic())):
                        await self.stopped.wait()
                if self._pause_s:
                    pause, self._pause_s = self._pause_s, 0.0
                    paused += pause
                    self._shift(self._offset + round(pause * TICKS))
                    continue
                await self._frame(number)
                number += 1
                step = TICKS // self.recipe.fps
                if self._vfr:
                    step += (step * 2 // 3 if number % 5 == 0 else 0) + (step if number % 3 == 0 else 0)
                self._content += step
            await self._flush_held()
            await self._end_segment()
        except ChannelClosed:
            pass  # the stream was ended under us
        finally:
            self._encoders.close()

    async def _frame(self, number: int) -> None:
        per_segment = max(1, round(self.recipe.fps * self.recipe.segment_s))
        key = number % per_segment == 0 or self._next_offset is not None
        self._number_at[self._content] = number
        for packet in self._encoders.picture(number, self._content, key=key):
            if packet.is_keyframe:
                await self._cut()
            # With B-frames a packet is of an earlier picture; its number follows from its place.
            content = int(packet.pts) - _MUX_LEAD
            whose = self._number_at.pop(content)
            stamp = content + self._offset
            await self._send(packet, Sent(whose, content / TICKS, stamp, self._epoch, 0.0))
        until = (self._content + TICKS // self.recipe.fps) * tone.SAMPLE_RATE // TICKS
        packets, self._sample = self._encoders.sound(self._sample, until)
        self.account.samples = self._sample
        for packet in packets:
            await self._send(packet, None)

    async def _send(self, packet: Any, sent: Sent | None) -> None:
        if self._muxer is None:
            return  # sound before the first picture
        data = shifted(self._muxer.mux(packet, video=sent is not None), (self._offset - _MUX_LEAD) & MASK)
        self._written.append(data)
        if self._late_s and self._held is None:
            self._held, self._held_until, self._late_s = deque(), time.monotonic() + self._late_s, 0.0
        if self._held is not None:
            self._held.append((data, sent))
            if time.monotonic() >= self._held_until:
                await self._flush_held()
            return
        await self._write(data, sent)

    async def _flush_held(self) -> None:
        held, self._held = self._held or (), None
        for data, sent in held:
            await self._write(data, sent)

    async def _write(self, data: bytes, sent: Sent | None) -> None:
        if sent is not None:
            self.account.frames.append(Sent(sent.number, sent.content_s, sent.stamp, sent.epoch, time.monotonic()))
        if self._segment is None:
            return
        try:
            await self._segment.write(data)
        except ChannelClosed:
            raise
        except ChannelError:
            self.account.lost_segments += 1
            self._segment = None  # the rest of it is lost too; the next keyframe opens another

    async def _cut(self) -> None:
        """A keyframe comes: end the segment and begin the next."""
        await self._flush_held()
        before = self._written
        await self._end_segment()
        if self._next_offset is not None:
            self._offset, self._next_offset = self._next_offset, None
            self._epoch += 1
        if self._skip:
            self._skip = False
            self._muxer, self._written = _Muxer(self._encoders), []
            with contextlib.suppress(ChannelError):
                await (await self._publisher.open_segment()).close()
            return  # what is muxed until the next cut goes nowhere
        if self._repeat and before:
            self._repeat = False
            again = self.account.frames[self._sent_before :]
            with contextlib.suppress(ChannelError):
                segment = await self._publisher.open_segment()
                self._epoch += 1
                now = time.monotonic()
                self.account.frames += [Sent(s.number, s.content_s, s.stamp, self._epoch, now) for s in again]
                for data in before:
                    await segment.write(data)
                await segment.close()
                self._epoch += 1
        self._muxer, self._written = _Muxer(self._encoders), []
        self._sent_before = len(self.account.frames)
        self.account.segments += 1
        try:
            self._segment = await self._publisher.open_segment()
        except ChannelClosed:
            raise
        except ChannelError:
            self.account.lost_segments += 1

    async def _end_segment(self) -> None:
        muxer, self._muxer = self._muxer, None
        segment, self._segment = self._segment, None
        if muxer is not None:
            rest = muxer.finish()
            if segment is not None:
                try:
                    if rest:
                        await segment.write(shifted(rest, (self._offset - _MUX_LEAD) & MASK))
                    await segment.close()
                except ChannelClosed:
                    raise
                except ChannelError:
                    self.account.lost_segments += 1
