"""A file as a live stream: real-time MPEG-TS segments on a trickle channel, the way a gateway publishes an ingest.

Nothing is encoded again: H.264 and its sound are cut at keyframes and repacked, each segment with its own PAT and PMT
(protocol.md 2.1). Timestamps run on over loops, as those of a camera would.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av

from ..trickle.publisher import Publisher

#: Ticks a second of MPEG-TS.
TICKS = 90_000
#: Where ffmpeg's own muxer begins, 1.4 s; room for the decoding times before zero of a clip with B-frames.
FIRST_PTS = 126_000
#: A cut comes at the first keyframe this much after the last (protocol.md 2.1, both ingests).
SEGMENT_S = 2.0
#: Codecs that travel as they are; what `publishable` refuses has to be encoded first.
VIDEO_CODECS = frozenset({"h264"})
AUDIO_CODECS = frozenset({"aac", "opus", "mp2", "mp3"})
#: Files are interleaved coarsely, up to about a second (libavformat mov.c); live streams are not.
_INTERLEAVE_TICKS = TICKS * 3 // 2


class NotPublishable(ValueError):
    """The file has no video that can travel unchanged; the message says what it has."""


@dataclass
class Published:
    """What has left so far. ``video``: each frame's pts, and the monotonic time at which its bytes were handed on."""

    video: dict[int, float] = field(default_factory=dict)
    audio_packets: int = 0
    segments: int = 0
    bytes: int = 0
    loops: int = 0  # whole ones
    late_s: float = 0.0  # largest delay behind real time: above zero the machine is too slow
    media_s: float = 0.0  # seconds of video published


@dataclass(order=True)
class _Timed:
    """One packet on the continuous 90 kHz time line; sorts by decoding time."""

    dts: int
    order: int
    pts: int = field(compare=False)
    packet: Any = field(compare=False)
    video: bool = field(compare=False)
    duration: int = field(compare=False)


def publishable(path: Path) -> tuple[str, str | None]:
    """Codecs of the picture and of the sound (None without). Raises NotPublishable, or OSError for no file."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise NotPublishable(f"{path} has no video")
            video = container.streams.video[0].codec_context.name
            sound = container.streams.audio[0].codec_context.name if container.streams.audio else None
    except av.error.InvalidDataError as exc:
        raise NotPublishable(f"{path} is not a video file that libav can read") from exc
    if video not in VIDEO_CODECS:
        raise NotPublishable(f"{path} holds {video} video; a live ingest carries H.264")
    if sound is not None and sound not in AUDIO_CODECS:
        raise NotPublishable(f"{path} holds {sound} sound, which does not travel in MPEG-TS")
    return video, sound


def _sorted(timed: Iterator[_Timed]) -> Iterator[_Timed]:
    """By decoding time, holding back no more than the interleaving of the file."""
    waiting: list[_Timed] = []
    for item in timed:
        heapq.heappush(waiting, item)
        while item.dts - waiting[0].dts > _INTERLEAVE_TICKS:
            yield heapq.heappop(waiting)
    while waiting:
        yield heapq.heappop(waiting)


class _Clip:
    """The packets of a file, again and again on one growing time line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()
        container = self._stack.enter_context(av.open(str(path)))
        #: Streams whose parameters every segment's muxer copies; alive until close.
        self.templates: list[Any] = [container.streams.video[0], *container.streams.audio[:1]]
        self._origin = _first_pts(path)
        self.loops = 0

    def close(self) -> None:
        self._stack.close()

    def packets(self, loops: int | None) -> Iterator[_Timed]:
        """``loops`` times the file, None for ever. Frames keep their distance over the seam; where the sound is
        longer than the picture its tail is left out, so that decoding times only grow."""
        offset = FIRST_PTS
        last: dict[bool, int] = {}
        while loops is None or self.loops < loops:
            end = offset
            for item in _sorted(self._once(offset)):
                if item.video:
                    end = max(end, item.pts + item.duration)
                if item.dts > last.get(item.video, -1):
                    last[item.video] = item.dts
                    yield item
            if end == offset:
                return
            self.loops += 1
            offset = end

    def _once(self, offset: int) -> Iterator[_Timed]:
        with av.open(str(self._path)) as container:
            streams: list[Any] = [container.streams.video[0], *container.streams.audio[:1]]
            # Asked now: packets outlive their container here, and what libav knows of a stream goes with that.
            rate = streams[0].average_rate or streams[0].guessed_rate or 25
            duration = round(TICKS / Fraction(rate))
            for order, packet in enumerate(container.demux(streams)):
                if packet.dts is None or packet.pts is None or packet.size == 0:
                    continue
                base: Fraction = packet.time_base
                dts, pts = (offset + round(value * base * TICKS) - self._origin for value in (packet.dts, packet.pts))
                if dts >= 0:
                    yield _Timed(dts, order, pts, packet, packet.stream.index == streams[0].index, duration)


def _first_pts(path: Path) -> int:
    """Lowest video pts among the first packets, in ticks: the clip's zero."""
    with av.open(str(path)) as container:
        first: int | None = None
        for count, packet in enumerate(container.demux(container.streams.video[0])):
            if packet.pts is not None:
                pts = round(packet.pts * packet.time_base * TICKS)
                first = pts if first is None else min(first, pts)
            # More than the deepest reordering of H.264, 16 frames.
            if count >= 32:
                break
    return first or 0


class _SegmentMuxer:
    """One segment of MPEG-TS: packets in, bytes out at once."""

    def __init__(self, templates: list[Any]) -> None:
        self._written = bytearray()
        options = {
            "flush_packets": "1",
            # Without this, sound waits until 2930 bytes are full: a sixth of a second at 128 kbit/s.
            "pes_payload_size": "0",
            # A track that ends early must not hold the other one back for libavformat's 10 s; microseconds.
            "max_interleave_delta": "300000",
        }
        self._container = av.open(self, "w", format="mpegts", options=options)
        self._streams: list[Any] = [self._container.add_stream_from_template(stream) for stream in templates]

    def write(self, data: bytes) -> int:
        """Called by libav for every packet that it has finished."""
        self._written += data
        return len(data)

    def mux(self, item: _Timed) -> bytes:
        packet = item.packet
        packet.time_base = Fraction(1, TICKS)
        packet.pts, packet.dts = item.pts, item.dts
        packet.stream = self._streams[0 if item.video else 1]
        self._container.mux(packet)
        return self._take()

    def finish(self) -> bytes:
        self._container.close()
        return self._take()

    def _take(self) -> bytes:
        data = bytes(self._written)
        self._written.clear()
        return data


async def publish_file(
    publisher: Publisher,
    path: Path,
    *,
    loops: int | None = None,
    duration_s: float | None = None,
    realtime: bool = True,
    segment_s: float = SEGMENT_S,
    record: IO[bytes] | None = None,
    on_progress: Callable[[Published], None] | None = None,
    published: Published | None = None,
) -> Published:
    """Publish ``path`` until ``loops`` or ``duration_s`` (of media) is over, whichever is first; None for no limit.

    realtime: each packet leaves when its decoding time comes; otherwise as fast as the channel takes it.
    record: gets every byte that is published. on_progress: called once a second of media and at the end.
    published: filled while it runs, so that a probe can look up frames that are on their way.
    The channel stays open; closing or deleting it is the caller's. Raises NotPublishable, ChannelClosed.
    """
    publishable(path)
    facts = published or Published()
    clip = _Clip(path)
    segment: Any = None
    muxer: _SegmentMuxer | None = None
    started_at = time.monotonic()
    first_dts = segment_pts = reported = -1

    async def send(data: bytes) -> None:
        if data:
            await segment.write(data)
            facts.bytes += len(data)
            if record is not None:
                record.write(data)

    try:
        # Repacking costs tens of microseconds a packet; a thread would cost more than it saves.
        for item in clip.packets(loops):
            if first_dts < 0:
                if not (item.video and item.packet.is_keyframe):
                    continue  # a gateway drops what comes before the first keyframe
                first_dts = item.dts
            if duration_s is not None and item.dts - first_dts >= duration_s * TICKS:
                break
            if realtime:
                due_at = started_at + (item.dts - first_dts) / TICKS
                facts.late_s = max(facts.late_s, time.monotonic() - due_at)
                await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            cut = item.video and item.packet.is_keyframe and item.pts - segment_pts >= segment_s * TICKS
            if muxer is None or (cut and segment_pts >= 0):
                if muxer is not None:
                    await send(muxer.finish())
                    await segment.close()
                segment = await publisher.open_segment()
                muxer, segment_pts = _SegmentMuxer(clip.templates), item.pts
                facts.segments += 1
            if item.video:
                # Before the write: from here on the bytes may be anywhere.
                facts.video[item.pts] = time.monotonic()
                facts.media_s = (item.dts - first_dts) / TICKS
            else:
                facts.audio_packets += 1
            await send(muxer.mux(item))
            facts.loops = clip.loops
            if on_progress is not None and int(facts.media_s) > reported:
                reported = int(facts.media_s)
                on_progress(facts)
        if muxer is not None:
            await send(muxer.finish())
            await segment.close()
    finally:
        facts.loops = clip.loops
        clip.close()
    if on_progress is not None:
        on_progress(facts)
    return facts
