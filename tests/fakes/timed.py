"""A source of which every moment can be found again: numbered pictures, and sound that is never twice the same.

The sound is noise from a seed, so any 20 ms of it say where in the source they come from, to the sample. `heard`
tells for what came out at a pts which moment of the source its picture and its sound show; their difference is the
A/V offset as a viewer has it, whatever the stamps in between were.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from gateway_shim.localnet.numbered import luma_of, picture, read_number
from gateway_shim.localnet.source import _SegmentMuxer, _Timed
from gateway_shim.media.ts import TsReader
from gateway_shim.trickle.publisher import OutgoingSegment, Publisher
from gateway_shim.trickle.wire import ChannelClosed, ChannelError

TICKS = 90_000
SAMPLE_RATE = 48_000
WIDTH, HEIGHT = 192, 112
#: Room for the decode stamps of B-frames before the first picture.
ORIGIN = 9_000
#: Samples that are looked up at a time: one Opus packet.
WINDOW = 960
#: Share of their energy that a window and its place in the source have in common. By chance it is 0.4 at most.
LIKE = 0.5


def steady(rate: int, seconds: float) -> list[float]:
    """Times of frames, in seconds."""
    return [n / rate for n in range(int(rate * seconds))]


def noise(samples: int) -> NDArray[np.float32]:
    """Below 4 kHz, where codecs keep the form of the wave."""
    spectrum = np.fft.rfft(np.random.default_rng(7).standard_normal(samples))
    spectrum[len(spectrum) // 6 :] = 0
    wave = np.fft.irfft(spectrum, samples)
    return (wave / np.abs(wave).max() * 0.5).astype(np.float32)


def write_timed(
    path: Path, times: Sequence[float], *, audio: str = "aac", b_frames: int = 0, gop_s: float = 1.0
) -> Path:
    """A frame at each of ``times``, the first at 0, and sound from 0 to the last of them.

    In NUT, which keeps stamps exactly.
    """
    options = {
        "preset": "veryfast" if b_frames else "ultrafast",
        "crf": "26",
        "forced-idr": "1",
        "x264-params": f"keyint=999:scenecut=0:bframes={b_frames}:open-gop=0",
    }
    reference = noise(round(times[-1] * SAMPLE_RATE))
    with av.open(str(path), "w", format="nut") as container:
        video: Any = container.add_stream("libx264", rate=30, options=options)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        video.codec_context.time_base = video.time_base = Fraction(1, TICKS)
        track: Any = container.add_stream({"aac": "aac", "opus": "libopus"}[audio], rate=SAMPLE_RATE)
        track.codec_context.layout = "mono"
        track.codec_context.bit_rate = 128_000
        track.codec_context.format = "fltp" if audio == "aac" else "s16"
        written, key_s = 0, -gop_s
        for number, at in enumerate(times):
            frame = picture(number, WIDTH, HEIGHT)
            frame.pts, frame.time_base = round(at * TICKS), Fraction(1, TICKS)
            if at - key_s >= gop_s - 1e-6:
                key_s = at
                frame.pict_type = av.video.frame.PictureType.I
            container.mux(video.encode(frame))
            size = track.codec_context.frame_size or 960
            while written + size <= len(reference) and written <= at * SAMPLE_RATE:
                part = reference[written : written + size]
                if audio == "aac":
                    block = av.AudioFrame.from_ndarray(part[None].copy(), "fltp", "mono")
                else:
                    block = av.AudioFrame.from_ndarray((part * 32767).astype(np.int16)[None], "s16", "mono")
                block.sample_rate, block.pts, block.time_base = SAMPLE_RATE, written, Fraction(1, SAMPLE_RATE)
                container.mux(track.encode(block))
                written += size
        container.mux(video.encode(None))
        container.mux(track.encode(None))
    return path


@dataclass
class Played:
    """What left: number of each frame to the moment (monotonic) of its last byte; ``late_s`` behind real time."""

    frames: dict[int, float] = field(default_factory=dict)
    late_s: float = 0.0


#: Ticks to add to the stamps of an item: (seconds of the source, is a picture) to ticks; None leaves it out.
Move = Callable[[float, bool], int | None]


async def play(
    publisher: Publisher,
    path: Path,
    *,
    move: Move = lambda at, is_video: 0,
    cuts: Sequence[float] = (),
    segment_s: float = 1.0,
    sound_after_s: float = 0.0,
    burst: bool = False,
    later_s: Callable[[float], float] = lambda at: 0.0,
) -> Played:
    """Publish in real time. cuts: seconds at which another muxer begins, whatever the length of the segment.

    sound_after_s: how much later than its picture sound stands in the stream. burst: each segment in one piece, when
    its last frame is there. later_s: by how much what belongs to a second of the source leaves later.
    """
    played = Played()
    segment: OutgoingSegment | None = None

    async def send(data: bytes, end: bool = False) -> None:
        """What the network loses is lost; the next segment is another."""
        nonlocal segment
        if segment is not None:
            try:
                await segment.write(data)
                if end:
                    await segment.close()
            except ChannelClosed:
                raise
            except ChannelError:
                segment = None

    with av.open(str(path)) as container:
        templates: list[Any] = [container.streams.video[0], container.streams.audio[0]]
        items = _items(container, templates, round(sound_after_s * TICKS))
        numbers = {pts: n for n, pts in enumerate(sorted(item.pts for item in items if item.video))}
        began = time.monotonic()
        muxer: _SegmentMuxer | None = None
        pending = b""
        segment_at, waiting_cuts = 0.0, list(cuts)
        last_dts: dict[bool, int] = {}
        for item in items:
            arrival_s = (item.dts - ORIGIN) / TICKS + (0 if item.video else sound_after_s)
            arrival_s += later_s((item.pts - ORIGIN) / TICKS)
            if not burst:
                await asyncio.sleep(max(0.0, began + arrival_s - time.monotonic()))
                played.late_s = max(played.late_s, time.monotonic() - began - arrival_s)
            at = (item.pts - ORIGIN) / TICKS
            key = item.video and item.packet.is_keyframe
            number = numbers.get(item.pts) if item.video else None
            offset = move(at, item.video)
            cut = bool(key and waiting_cuts and at >= waiting_cuts[0] - 1e-6)
            if cut:
                waiting_cuts.pop(0)
            if muxer is None or cut or (key and at - segment_at >= segment_s - 1e-6):
                if muxer is not None:
                    if burst:
                        await asyncio.sleep(max(0.0, began + arrival_s - time.monotonic()))
                    await send(pending + muxer.finish(), end=True)
                    pending = b""
                segment, muxer, segment_at = await publisher.open_segment(), _SegmentMuxer(templates), at
                last_dts.clear()
            if offset is None:
                continue
            item.pts, item.dts = item.pts + offset, item.dts + offset
            if item.dts <= last_dts.get(item.video, item.dts - 1):
                continue  # what libavformat refuses
            last_dts[item.video] = item.dts
            pending += muxer.mux(item)
            if number is not None:
                played.frames[number] = time.monotonic()
            if not burst:
                await send(pending)
                pending = b""
        if muxer is not None:
            await send(pending + muxer.finish(), end=True)
    return played


def _items(container: Any, templates: list[Any], sound_after: int) -> list[_Timed]:
    """In the order of sending: by decode stamp, sound ``sound_after`` ticks later."""
    found: list[_Timed] = []
    unstamped: list[_Timed] = []
    for order, packet in enumerate(container.demux(templates)):
        if packet.pts is None or not packet.size:
            continue
        is_video = packet.stream.index == templates[0].index
        pts = ORIGIN + round(packet.pts * packet.time_base * TICKS)
        item = _Timed(0, order, pts, packet, is_video, 0)
        found.append(item)
        if packet.dts is None:
            unstamped.append(item)  # the first ones of a stream with B-frames
            continue
        item.dts = ORIGIN + round(packet.dts * packet.time_base * TICKS)
        if is_video and unstamped:
            for back, earlier in enumerate(reversed(unstamped), 1):
                earlier.dts = item.dts - 3000 * back
            unstamped.clear()
    # The encoder's delay has moved everything: sound begins before its first sample.
    first = min(item.pts for item in found if item.video) - ORIGIN
    for item in found:
        item.pts, item.dts = item.pts - first, item.dts - first
    return sorted(found, key=lambda item: (item.dts + (0 if item.video else sound_after), item.order))


@dataclass(frozen=True)
class Heard:
    """What came out, in ticks of the output and seconds of the source.

    pictures: (pts, number) of each. new: (pts, source time) where a number is shown for the first time. sounds: (pts,
    source time) of each window whose sound was recognised. unknown: windows of which it was not.
    """

    pictures: list[tuple[int, int]]
    new: list[tuple[int, float]]
    sounds: list[tuple[int, float]]
    unknown: int

    @property
    def offsets_ms(self) -> list[float]:
        """How late the sound is at each moment at which both are there."""
        offsets, at = [], 0
        for pts, source_s in self.sounds:
            while at + 1 < len(self.new) and self.new[at + 1][0] <= pts:
                at += 1
            shown_pts, shown_s = self.new[at]
            # A picture says what time it is until the next one, half a second at most.
            if 0 <= pts - shown_pts <= TICKS // 2:
                offsets.append((shown_s + (pts - shown_pts) / TICKS - source_s) * 1000)
        return offsets

    @property
    def steps(self) -> list[tuple[float, float]]:
        """Where the sound does not go on to the sample: (source time, seconds left out; negative: inserted)."""
        found = []
        for (_, before), (_, now) in itertools.pairwise(self.sounds):
            off = round((now - before) * SAMPLE_RATE) - WINDOW
            if abs(off) > 1:
                found.append((before, off / SAMPLE_RATE))
        return found


def heard(path: Path, times: Sequence[float]) -> Heard:
    """Read an output file. Stamps are unwrapped as they come; nothing else is assumed of them."""
    reader = TsReader()
    data = path.read_bytes()
    units = reader.feed(data) + reader.end_segment()
    video: Any = av.CodecContext.create("h264", "r")
    audio: Any = av.CodecContext.create("opus", "r")
    audio.layout, audio.sample_rate = "stereo", SAMPLE_RATE
    pictures: list[tuple[int, int]] = []
    blocks: list[tuple[int, NDArray[np.float32]]] = []
    for unit in units:
        packet = av.Packet(unit.data)
        packet.pts, packet.time_base = unit.pts, Fraction(1, TICKS)
        if unit.track.kind == "video":
            for frame in video.decode(packet):
                number = read_number(luma_of(frame))
                if number is not None:
                    pictures.append((frame.pts, number))
        else:
            assert unit.pts is not None
            frames = [frame.to_ndarray() for frame in audio.decode(packet)]
            wave = np.concatenate(frames, axis=1)
            wave = wave[0] if wave.shape[0] > 1 else wave[0].reshape(-1, 2)[:, 0]
            blocks.append((unit.pts, wave.astype(np.float32)))
    new, seen = [], set()
    for pts, number in pictures:
        if number not in seen:
            seen.add(number)
            new.append((pts, times[number]))
    sounds, unknown = _recognised(blocks, noise(round(times[-1] * SAMPLE_RATE)))
    return Heard(pictures, new, sounds, unknown)


def _recognised(
    blocks: list[tuple[int, NDArray[np.float32]]], reference: NDArray[np.float32]
) -> tuple[list[tuple[int, float]], int]:
    size = 1 << int(np.ceil(np.log2(len(reference) + WINDOW)))
    spectrum = np.fft.rfft(reference, size)
    found: list[tuple[int, float]] = []
    unknown = 0

    def likeness(window: NDArray[np.float32], at: int) -> float:
        part = reference[at : at + len(window)]
        norm = float(np.linalg.norm(window) * np.linalg.norm(part))
        return float(part @ window[: len(part)]) / norm if norm else 0.0

    for pts, window in blocks:
        at = round(found[-1][1] * SAMPLE_RATE) + WINDOW if found else 0
        if likeness(window, at) < LIKE:
            at = int(np.fft.irfft(np.conj(np.fft.rfft(window, size)) * spectrum, size).argmax())
        if likeness(window, at) >= LIKE:
            found.append((pts, at / SAMPLE_RATE))
        elif np.abs(window).max() > 0.05:
            unknown += 1
    return found, unknown
