"""Parts of the trip by themselves, each as a process: ``python -m bench.alone codec ...`` and ``... http ...``.

codec: decode and encode the clip with the appliance's own settings, and nothing else. http: read a channel and write
another with our own classes, the bytes and pieces of a trip that was, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.video.frame import PictureType

from gateway_shim.media.bit_rate import default_bit_rate
from gateway_shim.media.h264 import open_x264
from gateway_shim.media.settings import EncoderSettings
from gateway_shim.media.sound import TIME_BASE
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import OutgoingSegment, Publisher
from gateway_shim.trickle.subscriber import Subscriber

from . import material


def codec(clip: Path, loops: int) -> dict[str, float]:
    """CPU milliseconds a frame of the decoder and of the encoder."""
    with av.open(str(clip)) as container:
        video = container.streams.video[0]
        packets = [bytes(packet) for packet in container.demux(video) if packet.size]
        extradata, width, height = video.codec_context.extradata, video.width, video.height
    decoder: av.VideoCodecContext = av.CodecContext.create("h264", "r")  # type: ignore[assignment]
    decoder.extradata = extradata
    decoder.thread_count, decoder.thread_type = 1, "SLICE"
    settings = EncoderSettings(width, height, threads=1, preset="superfast")
    rate = Fraction(material.RATE)
    encoder = open_x264(settings, default_bit_rate(width, height, rate), rate, "superfast")
    clock = time.process_time_ns
    decoded_ns = encoded_ns = number = 0
    for _ in range(loops):
        for data in packets:
            packet = av.Packet(data)
            began = clock()
            frames = decoder.decode(packet)
            decoded_ns += clock() - began
            for frame in frames:
                frame.pts, frame.time_base = number * 3000, TIME_BASE
                frame.pict_type = PictureType.NONE if number % material.FRAMES else PictureType.I
                began = clock()
                encoder.encode(frame)
                encoded_ns += clock() - began
                number += 1
    if number != loops * len(packets):
        raise AssertionError(f"{number} pictures of {loops * len(packets)} were decoded")
    return {"decode_ms": decoded_ns / 1e6 / number, "encode_ms": encoded_ns / 1e6 / number}


async def http(subscribe_url: str, publish_url: str, script: dict[str, Any]) -> None:
    """``script``: ``units``, bytes of each frame on the way in; ``pieces`` of the way out: the segment, bytes, and
    how many units have come in before it is written.
    """
    ends = list(itertools.accumulate(script["units"]))
    pieces = script["pieces"]
    payload = bytes(max(size for _, size, _ in pieces))
    received = units = at = 0
    async with (
        open_http() as session,
        Publisher(session, publish_url, content_type="video/mp2t", resume=True) as publisher,
        Subscriber(session, subscribe_url, start=0) as subscriber,
    ):
        outgoing: OutgoingSegment | None = None
        async for segment in subscriber:
            async for data in segment:
                received += len(data)
                while units < len(ends) and received >= ends[units]:
                    units += 1
                while at < len(pieces) and units >= pieces[at][2]:
                    number, size, _ = pieces[at]
                    if at == 0 or number != pieces[at - 1][0]:
                        if outgoing is not None:
                            await outgoing.finish()
                        outgoing = await publisher.open_segment()
                    assert outgoing is not None
                    await outgoing.write(payload[:size])
                    await asyncio.sleep(0)  # or the socket would take it together with the next one
                    at += 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.alone", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("codec")
    part.add_argument("clip", type=Path)
    part.add_argument("--loops", type=int, default=1)
    part = parts.add_parser("http")
    part.add_argument("subscribe_url")
    part.add_argument("publish_url")
    part.add_argument("plan", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "codec":
        print(json.dumps(codec(arguments.clip, arguments.loops)))
    else:
        asyncio.run(http(arguments.subscribe_url, arguments.publish_url, json.loads(arguments.plan.read_text())))


if __name__ == "__main__":
    main()
