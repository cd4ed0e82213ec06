"""The viewer at the end: reads the output channel, keeps it on disk, and says what arrived and when.

While the stream runs only access units are cut out of it (no decoding, so that the probe takes no time from what it
measures); pictures and sound are decoded from the file afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp
import av
import numpy as np
from numpy.typing import NDArray

from ..media.ts import AccessUnit, TsReader
from ..trickle.subscriber import Subscriber
from . import measure, numbered


@dataclass
class Arrivals:
    """What came in, in order of arrival; times are monotonic seconds."""

    video: list[tuple[int, float]] = field(default_factory=list)  # pts, when its last byte was there
    sound_units: int = 0
    segments: int = 0
    broken_segments: int = 0  # ended without their proper end
    keyless_segments: int = 0  # whose first picture is no keyframe: a viewer cannot begin there
    gaps: int = 0
    bytes: int = 0
    closed_reason: str = ""

    @property
    def pts(self) -> list[int]:
        return [pts for pts, _ in self.video]


class Probe:
    """Reads one channel to its end. ``path`` gets every byte, which is MPEG-TS that any player reads."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        path: Path,
        *,
        on_unit: Callable[[AccessUnit], None] | None = None,
    ) -> None:
        self.arrivals = Arrivals()
        self._http = http
        self._url = url
        self._path = path
        self._on_unit = on_unit
        self._reader = TsReader()

    async def run(self) -> Arrivals:
        """Until the channel is over. May be cancelled; what arrived so far is in the file and in ``arrivals``."""
        with self._path.open("wb") as file:
            async with Subscriber(self._http, self._url) as subscriber:
                async for segment in subscriber:
                    await self._read(segment, file)
            self.arrivals.closed_reason = str(subscriber.closed_reason or "")
        return self.arrivals

    async def _read(self, segment: Any, file: IO[bytes]) -> None:
        facts = self.arrivals
        facts.segments += 1
        if segment.gap:
            facts.gaps += 1
            self._reader.gap()
        keyed: bool | None = None
        async for data in segment:
            facts.bytes += len(data)
            file.write(data)
            keyed = self._take(self._reader.feed(data), keyed)
        if segment.complete:
            keyed = self._take(self._reader.end_segment(), keyed)
        else:
            facts.broken_segments += 1
            self._reader.gap()
        # None: nothing but sound, or nothing at all; an empty segment is legal (protocol.md 1.5).
        facts.keyless_segments += keyed is False

    def _take(self, units: list[AccessUnit], keyed: bool | None) -> bool | None:
        now = time.monotonic()
        for unit in units:
            if unit.track.kind == "video":
                if keyed is None:
                    keyed = unit.keyframe
                if unit.pts is not None:
                    self.arrivals.video.append((unit.pts, now))
            else:
                self.arrivals.sound_units += 1
            if self._on_unit is not None:
                self._on_unit(unit)
        return keyed


def pictures(path: Path) -> Iterator[tuple[int, av.VideoFrame]]:
    """Pts in ticks and decoded frame, in order of display. Damaged parts are left out."""
    for frame in _decoded(path, "video"):
        yield round(frame.pts * frame.time_base * measure.TICKS), frame


def sound(path: Path) -> measure.Sound | None:
    """The sound of a file as mono on its time line, or None when it has none."""
    blocks: list[tuple[int, NDArray[np.float32]]] = []
    for frame in _decoded(path, "audio"):
        # One resampler for each frame keeps nothing back: pts and samples stay together.
        resampler = av.AudioResampler(format="flt", layout="mono", rate=frame.sample_rate)
        pts = round(frame.pts * frame.time_base * measure.TICKS)
        for mono in resampler.resample(frame):
            samples = mono.to_ndarray().reshape(-1).astype(np.float32)
            if frame.sample_rate != measure.SAMPLE_RATE:
                at = np.arange(0, len(samples), frame.sample_rate / measure.SAMPLE_RATE)
                samples = np.interp(at, np.arange(len(samples)), samples).astype(np.float32)
            blocks.append((pts, samples))
    return measure.lay_out(blocks)


def _decoded(path: Path, kind: str) -> Iterator[Any]:
    with av.open(str(path)) as container:
        streams = [stream for stream in container.streams if stream.type == kind][:1]
        if not streams:
            return
        for packet in container.demux(streams):
            try:
                frames: list[Any] = packet.decode()
            except av.error.FFmpegError:
                continue  # a stream that lost bytes still has the rest to show
            for frame in frames:
                if frame.pts is not None:
                    yield frame


@dataclass(frozen=True)
class Numbers:
    """Frame numbers read off the pictures of a numbered clip."""

    by_pts: dict[int, int]
    unreadable: int

    @property
    def bursts_due(self) -> list[int]:
        """Pts of the frames with which a burst of sound begins."""
        return [pts for pts, number in self.by_pts.items() if number % numbered.BURST_EVERY == 0]


def number_of(frame: av.VideoFrame) -> int | None:
    """What a frame of a numbered clip says about itself; None on any other."""
    plain = frame if frame.format.name == "yuv420p" else frame.reformat(format="yuv420p")
    return numbered.read_number(numbered.luma_of(plain))


def numbers(path: Path) -> Numbers:
    by_pts: dict[int, int] = {}
    unreadable = 0
    for pts, frame in pictures(path):
        number = number_of(frame)
        if number is None:
            unreadable += 1
        else:
            by_pts[pts] = number
    return Numbers(by_pts, unreadable)


def to_mp4(path: Path, target: Path) -> bool:
    """Repack MPEG-TS as MP4 without encoding, for players that want one. False when there is nothing to repack."""
    with av.open(str(path)) as source:
        streams: list[Any] = [*source.streams.video[:1], *source.streams.audio[:1]]
        if not source.streams.video or source.streams.video[0].codec_context.width == 0:
            return False
        with av.open(str(target), "w", options={"movflags": "+faststart"}) as sink:
            copies = {stream.index: sink.add_stream_from_template(stream) for stream in streams}
            last: dict[int, int] = {}
            for packet in source.demux(streams):
                if packet.dts is None or packet.dts <= last.get(packet.stream.index, packet.dts - 1):
                    continue
                last[packet.stream.index] = packet.dts
                packet.stream = copies[packet.stream.index]
                sink.mux(packet)
    return True
