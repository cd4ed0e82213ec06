"""A viewer that decodes everything: which picture, which sound, at which stamp, and when it came.

Access units are cut out at their arrival, which gives the times; libav, on a thread, reads the same bytes as any
player would and gives the contents. Nothing is kept but numbers, so that a soak of hours fits into memory.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import av
import numpy as np

from gateway_shim.localnet import numbered
from gateway_shim.media.ts import TsReader
from gateway_shim.trickle.subscriber import Subscriber

from . import tone

_WRAP = 1 << 33
TICKS = 90_000


class Unwrap:
    """Stamps of 33 bits on one growing line."""

    def __init__(self) -> None:
        self._last: int | None = None

    def __call__(self, stamp: int) -> int:
        if self._last is not None:
            stamp += round((self._last - stamp) / _WRAP) * _WRAP
        else:
            stamp %= _WRAP
        self._last = stamp
        return stamp


@dataclass(frozen=True, slots=True)
class Seen:
    """One decoded picture. ``number``: of 16 bits, None when unreadable."""

    pts: int
    number: int | None
    inverted: bool


@dataclass(frozen=True, slots=True)
class Heard:
    """One window of sound. ``pts``: of its first sample; ``position``: where in the source's sound it lies, None when
    it is no such sound; ``count``: samples, `tone.WINDOW` but at the end of a run."""

    pts: int
    position: int | None
    count: int


@dataclass
class View:
    """What came. ``arrived``: monotonic time by pts of the pictures."""

    pictures: list[Seen] = field(default_factory=list)
    sound: list[Heard] = field(default_factory=list)
    arrived: dict[int, float] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)  # pts of the pictures as they came
    segments: int = 0
    broken_segments: int = 0
    keyless_segments: int = 0
    errors: int = 0  # that the decoder met
    closed_reason: str = ""


class _Pipe:
    """A file for libav that another thread fills."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._rest = b""
        self._ended = False

    def put(self, data: bytes) -> None:
        """Empty data is the end."""
        self._queue.put(data)

    def read(self, size: int) -> bytes:
        if not self._rest and not self._ended:
            self._rest = self._queue.get()
            self._ended = not self._rest
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


class Viewer:
    """Reads one channel to its end."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.view = View()
        self._http = http
        self._url = url
        self._pipe = _Pipe()
        self._thread = threading.Thread(target=self._decode, name="viewer", daemon=True)
        self._video_line, self._sound_line, self._unit_line = Unwrap(), Unwrap(), Unwrap()
        self._run = np.zeros(0, np.float32)  # sound that is not judged yet
        self._run_pts = 0
        self._run_taken = 0  # samples since _run_pts that were judged
        self._expected = 0  # position at _run's begin if all goes on

    async def run(self) -> View:
        """Until the channel is over. The thread has ended when this returns."""
        reader = TsReader()
        self._thread.start()
        view = self.view
        try:
            async with Subscriber(self._http, self._url) as subscriber:
                async for segment in subscriber:
                    view.segments += 1
                    if segment.gap:
                        reader.gap()
                    keyed: bool | None = None
                    async for data in segment:
                        self._pipe.put(bytes(data))
                        keyed = self._take(reader.feed(data), keyed)
                    if segment.complete:
                        keyed = self._take(reader.end_segment(), keyed)
                    else:
                        view.broken_segments += 1
                        reader.gap()
                    view.keyless_segments += keyed is False
            view.closed_reason = str(subscriber.closed_reason or "")
        finally:
            self._pipe.put(b"")
            self._thread.join(30)
        return view

    def _take(self, units: list[Any], keyed: bool | None) -> bool | None:
        now = time.monotonic()
        for unit in units:
            if unit.track.kind == "video" and unit.pts is not None:
                keyed = unit.keyframe if keyed is None else keyed
                pts = self._unit_line(unit.pts)
                self.view.order.append(pts)
                self.view.arrived.setdefault(pts, now)
        return keyed

    # ---- on the thread

    def _decode(self) -> None:
        try:
            # A live stream: no second is spent on guessing what the tables say.
            options = {"probesize": "100000", "analyzeduration": "500000"}
            with av.open(self._pipe, "r", format="mpegts", options=options) as container:
                streams = [*container.streams.video[:1], *container.streams.audio[:1]]
                for packet in container.demux(streams):
                    try:
                        frames: list[Any] = packet.decode()
                    except av.FFmpegError:
                        self.view.errors += 1
                        continue
                    for frame in frames:
                        if frame.pts is None:
                            continue
                        stamp = round(frame.pts * frame.time_base * TICKS)
                        if isinstance(frame, av.VideoFrame):
                            self._see(frame, self._video_line(stamp))
                        else:
                            self._hear(frame, self._sound_line(stamp))
        except (av.FFmpegError, ValueError):
            self.view.errors += 1
        while self._pipe.read(1 << 20):  # whoever fills it must not notice
            pass

    def _see(self, frame: av.VideoFrame, pts: int) -> None:
        luma = numbered.luma_of(frame)
        row = luma[luma.shape[0] // 16].astype(int)
        cell = luma.shape[1] // 22
        inverted = bool(row[cell // 2] < row[cell + cell // 2])
        self.view.pictures.append(Seen(pts, numbered.read_number(luma), inverted))

    def _hear(self, frame: av.AudioFrame, pts: int) -> None:
        samples = frame.to_ndarray()
        mono = samples.mean(axis=0) if samples.shape[0] > 1 else samples[0]
        at = self._run_pts + (self._run_taken + len(self._run)) * TICKS / tone.SAMPLE_RATE
        if abs(pts - at) > TICKS // 100:
            # A gap: the next run has a place of its own.
            if len(self._run):
                self._judge(self._run)
            if abs(step := round((pts - at) * tone.SAMPLE_RATE / TICKS)) < tone.PERIOD // 2:
                self._expected += step  # beyond it stamps have jumped, and the content has not
            self._run = np.zeros(0, np.float32)
            self._run_pts, self._run_taken = pts, 0
        self._run = np.concatenate([self._run, mono.astype(np.float32)])
        while len(self._run) >= tone.WINDOW:
            window, self._run = self._run[: tone.WINDOW], self._run[tone.WINDOW :]
            self._judge(window)

    def _judge(self, window: np.ndarray) -> None:
        position = tone.locate(window, self._expected)
        stamp = self._run_pts + round(self._run_taken * TICKS / tone.SAMPLE_RATE)
        self.view.sound.append(Heard(stamp, position, len(window)))
        self._expected = (self._expected if position is None else position) + len(window)
        self._run_taken += len(window)
