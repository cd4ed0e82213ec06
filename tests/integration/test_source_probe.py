"""A file through a real broker to a probe: what the demo and the stream tests rely on when they count frames."""

import asyncio
import time
from fractions import Fraction
from pathlib import Path

import av
import pytest

from gateway_shim.localnet import assets, measure, numbered, probe
from gateway_shim.localnet.broker import Broker
from gateway_shim.localnet.probe import Probe
from gateway_shim.localnet.source import FIRST_PTS, NotPublishable, Published, publish_file
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.publisher import Publisher
from gateway_shim.trickle.wire import ChannelClosed

FRAME = 3000  # ticks at 30 fps


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds with B-frames, sound, and a keyframe every second."""
    return numbered.write_clip(
        tmp_path_factory.mktemp("clip") / "clip.mp4",
        frames=60,
        width=320,
        height=192,
        audio="aac",
        b_frames=2,
        gop=30,
    )


@pytest.fixture
async def http():
    async with open_http() as session:
        yield session


async def relay(http, clip: Path, target: Path, **options) -> tuple[Published, probe.Arrivals]:
    """Publish ``clip`` and read it back, to the end of the channel."""
    async with Broker() as broker:
        url = broker.create("cam", "video/MP2T")
        viewer = Probe(http, url, target)
        watching = asyncio.create_task(viewer.run())
        await broker.wait_for_reader("cam", 0)
        async with Publisher(http, url, content_type="video/mp2t") as publisher:
            published = await publish_file(publisher, clip, **options)
            await publisher.delete()
        async with asyncio.timeout(20):
            return published, await watching


async def test_every_frame_and_sample_arrives_over_the_seam_of_two_loops(http, clip, tmp_path):
    published, arrivals = await relay(http, clip, tmp_path / "out.ts", loops=2, realtime=False)
    assert published.loops == 2
    assert sorted(published.video) == [FIRST_PTS + n * FRAME for n in range(120)]
    # Units of a stream with B-frames come in order of decoding.
    found = measure.tally(published.video, sorted(arrivals.pts))
    assert found == measure.FrameTally(sent=120, received=120, lost=0, duplicated=0, out_of_order=0, unknown=0)
    assert arrivals.keyless_segments == arrivals.broken_segments == arrivals.gaps == 0
    assert arrivals.segments == published.segments == 2  # cut at keyframes, two seconds at least
    assert arrivals.sound_units == published.audio_packets
    assert arrivals.bytes == published.bytes == (tmp_path / "out.ts").stat().st_size

    seen = probe.numbers(tmp_path / "out.ts")
    assert seen.unreadable == 0
    assert list(seen.by_pts.values()) == [*range(60), *range(60)]
    sound = probe.sound(tmp_path / "out.ts")
    assert sound is not None
    assert len(seen.bursts_due) == 4
    assert measure.nearest_offset_ms(measure.onsets(sound), seen.bursts_due) == pytest.approx(0, abs=2)


async def test_real_time_takes_the_time_of_the_clip_and_stops_where_asked(http, clip, tmp_path):
    began = time.monotonic()
    published, arrivals = await relay(http, clip, tmp_path / "out.ts", duration_s=1.0)
    assert time.monotonic() - began >= 0.9
    assert len(published.video) == 30
    assert measure.tally(published.video, arrivals.pts).lost == 0
    latencies = measure.latencies_ms(published.video, arrivals.video)
    assert len(latencies) == 30
    assert min(latencies) >= 0


async def test_recording_is_what_was_published(http, clip, tmp_path):
    with (tmp_path / "in.ts").open("wb") as record:
        await relay(http, clip, tmp_path / "out.ts", loops=1, realtime=False, record=record)
    assert (tmp_path / "in.ts").read_bytes() == (tmp_path / "out.ts").read_bytes()


async def test_probe_sees_a_frame_that_was_lost_on_the_way(http, clip, tmp_path):
    with (tmp_path / "in.ts").open("wb") as record:
        published, _ = await relay(http, clip, tmp_path / "whole.ts", loops=1, realtime=False, record=record)
    whole = (tmp_path / "in.ts").read_bytes()
    async with Broker() as broker:
        url = broker.create("cam", "video/MP2T")
        viewer = Probe(http, url, tmp_path / "out.ts")
        watching = asyncio.create_task(viewer.run())
        await broker.wait_for_reader("cam", 0)
        async with Publisher(http, url, content_type="video/mp2t") as publisher:
            middle = len(whole) // 188 // 2 * 188
            await publisher.publish(whole[:middle] + whole[middle + 60 * 188 :])
            await publisher.delete()
        async with asyncio.timeout(20):
            arrivals = await watching
    found = measure.tally(published.video, arrivals.pts)
    assert found.lost > 0
    assert found.received == found.sent - found.lost


async def test_channel_that_ends_stops_the_source(http, clip):
    async with Broker() as broker:
        url = broker.create("cam", "video/MP2T")
        async with Publisher(http, url, content_type="video/mp2t") as publisher:
            publishing = asyncio.create_task(publish_file(publisher, clip))
            await broker.wait_for_writer("cam", 0)
            await broker.delete("cam")
            with pytest.raises(ChannelClosed):
                async with asyncio.timeout(20):
                    await publishing


async def test_output_is_repacked_for_players(http, clip, tmp_path):
    await relay(http, clip, tmp_path / "out.ts", loops=1, realtime=False)
    assert probe.to_mp4(tmp_path / "out.ts", tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].frames == 60
        assert container.streams.audio[0].codec_context.name == "aac"


def write_mpeg4(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=15)
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        for index in range(15):
            frame = numbered.picture(index, 160, 96)
            frame.pts, frame.time_base = index, Fraction(1, 15)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


async def test_other_codecs_are_refused_by_the_source_and_encoded_for_the_demo(http, tmp_path):
    path = write_mpeg4(tmp_path / "old.mp4")
    with pytest.raises(NotPublishable, match="mpeg4"):
        await relay_nothing(http, path)
    loaded = assets.load_clip(path, tmp_path)
    assert (loaded.width, loaded.height, loaded.rate, loaded.sound) == (160, 96, 15, False)
    published, arrivals = await relay(http, loaded.path, tmp_path / "out.ts", loops=1, realtime=False)
    assert len(published.video) == len(arrivals.video) == 15


async def relay_nothing(http, path: Path) -> None:
    async with Broker() as broker, Publisher(http, broker.create("cam"), content_type="video/mp2t") as publisher:
        await publish_file(publisher, path)


@pytest.mark.parametrize("content", [b"", b"not a video at all"])
def test_file_that_is_no_video_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "holiday.mp4"
    path.write_bytes(content)
    with pytest.raises(assets.NoAsset, match=r"holiday\.mp4"):
        assets.load_clip(path, tmp_path)
