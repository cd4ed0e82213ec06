"""Whole streams, broker to broker, with everything that inputs do: no frame lost, doubled, moved or out of order."""

import asyncio
import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import pytest

from engine.backend import Building, FrameIn, Report, RunResult
from engine.graph.workflow import Prompt
from engine.wire import VideoFormat
from gateway_shim.localnet import measure, probe
from gateway_shim.localnet.numbered import write_clip
from gateway_shim.media import hardware
from gateway_shim.media.bit_rate import default_bit_rate
from gateway_shim.media.decode import Decoder
from gateway_shim.media.ts import TsReader
from gateway_shim.trickle.subscriber import Subscriber
from tests.fakes.engine_backend import StubBackend, StubGraph, painted, workflow
from tests.fakes.media_clips import numbers
from tests.fakes.network import network
from tests.fakes.ts_edit import shifted, without_sound_before

FRAME = 3000  # ticks at 30 fps


def sizes(path: Path) -> set[tuple[int, int]]:
    return {(frame.width, frame.height) for _, frame in probe.pictures(path)}


def av_offsets_ms(path: Path) -> list[float]:
    """Distance of each burst of sound from the frame that it belongs to."""
    sound = probe.sound(path)
    assert sound is not None
    numbers = probe.numbers(path)
    last = max(numbers.by_pts)  # sound may be longer than the picture
    onsets = [onset for onset in measure.onsets(sound) if onset <= last]
    return [min((onset - pts for pts in numbers.bursts_due), key=abs) / 90 for onset in onsets]


@pytest.mark.parametrize(
    ("audio", "b_frames"), [(None, 0), ("aac", 0), ("opus", 0), ("aac", 2)], ids=["silent", "aac", "opus", "b-frames"]
)
async def test_every_frame_once_in_order_with_its_pts(tmp_path: Path, audio: str | None, b_frames: int) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=90, audio=audio, b_frames=b_frames)  # type: ignore[arg-type]
    async with network(tmp_path) as net:
        stream = await net.start()
        published = await stream.publish(clip)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(90))
    assert received.pts == sorted(published.video)
    assert received.arrivals.keyless_segments == 0
    assert (received.arrivals.sound_units > 0) == (audio is not None)
    if audio is not None:
        offsets = av_offsets_ms(received.path)
        assert len(offsets) == 3
        assert max(map(abs, offsets)) < 40


@pytest.mark.parametrize(("setting", "lane"), [("auto", "shared_memory"), ("bytes", "bytes")])
async def test_both_lanes_carry_every_frame(tmp_path: Path, setting: str, lane: str) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=60, width=854, height=480)  # decoded rows are padded
    async with network(tmp_path, lane=setting) as net:
        stream = await net.start()
        publishing = asyncio.create_task(stream.publish(clip, realtime=True))
        await stream.flow(40)
        status = net.shim.streams.active["cam"].status()
        assert status["inference_status"]["lane"] == lane
        await publishing
        await stream.end_input()
        received = await stream.received()
        assert status["frames"]["processed"] > 10
    assert received.numbers == list(range(60))


async def test_two_streams_share_nothing(tmp_path: Path) -> None:
    clips = [write_clip(tmp_path / f"{n}.ts", frames=60, audio="aac", first_number=n) for n in (0, 1000)]
    async with network(tmp_path, capacity=2) as net:
        streams = [await net.start("one"), await net.start("two")]
        await asyncio.gather(*(stream.publish(clip) for stream, clip in zip(streams, clips, strict=True)))
        for stream in streams:
            await stream.end_input()
        received = [await stream.received() for stream in streams]
    assert received[0].numbers == list(range(60))
    assert received[1].numbers == list(range(1000, 1060))


async def test_size_change_is_scaled_to_the_first_size(tmp_path: Path) -> None:
    first = write_clip(tmp_path / "a.ts", frames=30, width=320, height=240)
    second = write_clip(tmp_path / "b.ts", frames=30, width=640, height=480, first_number=30)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(first.read_bytes())
        await stream.publish_bytes(shifted(second.read_bytes(), 30 * FRAME))
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(60))
    assert sizes(received.path) == {(320, 240)}


class SizedGraph(StubGraph):
    """Its pictures are grey and of the backend's size."""

    def run(self, prompt: Prompt, frames: Sequence[FrameIn]) -> RunResult:
        assert isinstance(self.backend, SizedBackend)
        width, height = self.picture_size = self.backend.size
        planes = bytes([128]) * (width * height * 3 // 2)
        return RunResult([painted(frame, planes, width, height) for frame in frames])


class SizedBackend(StubBackend):
    graph_class = SizedGraph

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Building:
        graph = yield from super().build(prompt, video, report)
        graph.picture_size = self.size
        return graph


@pytest.mark.parametrize("asked", [{}, {"width": 640, "height": 480}], ids=["graph's size", "asked size"])
@pytest.mark.parametrize("size", [(2, 2), (4, 4), (14, 240), (20_000, 16), (16, 4096), (16, 8192), (8192, 16)])
async def test_graph_of_odd_pictures_ends_no_stream(
    tmp_path: Path, size: tuple[int, int], asked: dict[str, int]
) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=30)
    can_be_shown = min(size) >= 16 and max(size) <= 8192
    async with network(tmp_path, backend=SizedBackend(size)) as net:
        params = {"prompts": json.loads(workflow()), "latency_budget_ms": 5000, **asked}
        stream = await net.start(params=params)
        flowing = asyncio.create_task(stream.flow(30))
        await stream.publish(clip)
        await flowing
        if not can_be_shown:
            assert "cannot be shown" in (await stream.event("error", reason="bad_picture"))["message"]
        await stream.end_input()
        received = await stream.received()
        frames = (await stream.event("stream_stopped"))["frames"]
    assert len(received.arrivals.pts) == 30, "something for every frame"
    assert frames["processed" if can_be_shown else "failed"] == 30, frames
    if not can_be_shown:
        assert frames["reasons"] == {"failed": {"bad_picture": 30}}
        assert received.numbers == list(range(30)), "the input stands in"
    shown = size if can_be_shown else (320, 240)
    assert sizes(received.path) == {(asked["width"], asked["height"]) if asked else shown}


@pytest.mark.parametrize("size", [(8, 8), (16, 2048), (2048, 16)])
async def test_source_of_extreme_shape_is_a_stream(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    odd = write_clip(tmp_path / "odd.ts", frames=30, width=width, height=height)
    parts = [
        write_clip(tmp_path / "a.ts", frames=30).read_bytes(),
        shifted(odd.read_bytes(), 30 * FRAME),
        shifted(write_clip(tmp_path / "b.ts", frames=30, first_number=60).read_bytes(), 60 * FRAME),
    ]
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(b"".join(parts))
        await stream.end_input()
        received = await stream.received()
        first = await net.start("alone")
        await first.publish_bytes(parts[1])
        await first.end_input()
        alone = await first.received()
    assert {after - before for before, after in pairwise(received.arrivals.pts)} == {FRAME}
    assert len(received.arrivals.pts) == 90
    assert sizes(received.path) == {(320, 240)}
    assert len(alone.arrivals.pts) == 30
    assert sizes(alone.path) == {(max(width, 16), max(height, 16))}


async def test_asked_size_is_given(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=30, width=640, height=480)
    async with network(tmp_path) as net:
        stream = await net.start(params={"width": 320, "height": 240})
        await stream.publish(clip)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(30))
    assert sizes(received.path) == {(320, 240)}


async def test_frame_rate_cap_thins_evenly(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=60)
    async with network(tmp_path) as net:
        stream = await net.start(params={"max_framerate": 15})
        await stream.publish(clip)
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(0, 60, 2))


@pytest.mark.parametrize("step_s", [-5, 1000], ids=["back", "ahead"])
async def test_clock_jump_loses_no_frame_and_output_only_grows(tmp_path: Path, step_s: int) -> None:
    first = write_clip(tmp_path / "a.ts", frames=60, audio="aac")
    second = write_clip(tmp_path / "b.ts", frames=60, audio="aac", first_number=60)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(shifted(first.read_bytes(), 300 * FRAME))
        await stream.publish_bytes(shifted(second.read_bytes(), (360 + step_s * 30) * FRAME))
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(120))
    assert received.pts == sorted(set(received.pts))


async def test_late_sound_joins_in_sync(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=90, audio="aac")
    first_pts = next(pts for pts, _ in probe.pictures(clip))
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(without_sound_before(clip.read_bytes(), first_pts + 45 * FRAME))
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(90))
    offsets = av_offsets_ms(received.path)
    assert len(offsets) == 1, "the burst of frame 60 and no other"
    assert abs(offsets[0]) < 40


async def test_thirty_three_bits_wrap_unnoticed(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=60, audio="aac")
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(shifted(clip.read_bytes(), (1 << 33) - 30 * FRAME))
        await stream.end_input()
        received = await stream.received()
    assert sorted(received.numbers) == list(range(60))
    assert len(received.numbers) == 60


async def test_sixty_frames_a_second_pass_uncapped_with_the_bits_that_they_need(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.ts", frames=180, rate=60)
    async with network(tmp_path) as net:
        stream = await net.start()
        published = await stream.publish(clip)
        await stream.flow(100)
        status = net.shim.streams.active[stream.id].status()
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(180))
    assert received.pts == sorted(published.video)
    assert status["codec"]["encoder"]["bit_rate"] == default_bit_rate(320, 240, Fraction(60))
    assert status["codec"]["decoder"] == {"device": "cpu", "fallback": None}


async def test_the_worker_says_what_its_codecs_are_and_why(tmp_path: Path) -> None:
    async with network(tmp_path, engine=False, codec="cpu") as net:
        facts = (await net.get("/stream/status"))["additional_info"]
    assert facts["codecs"] == "libx264, decoding on cpu (the setting codec is cpu)"


async def test_a_gpu_that_does_not_work_after_all_costs_no_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver answered at the start, and refuses the stream: too many sessions, or it was taken away."""

    def refuse(*_: object) -> None:
        raise av.error.ExternalError(1, "out of memory")

    real = hardware.open_decoder
    monkeypatch.setattr("gateway_shim.shim.probe", lambda _: hardware.Codecs(hardware.NVENC, "cuda"))
    monkeypatch.setattr("gateway_shim.media.h264.open_nvenc", refuse)
    monkeypatch.setattr(
        "gateway_shim.media.decode.open_decoder",
        lambda codec, device: real(codec, device) if device == "cpu" else refuse(),
    )
    clip = write_clip(tmp_path / "clip.ts", frames=60)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish(clip)
        await stream.flow(20)
        status = net.shim.streams.active[stream.id].status()["codec"]
        await stream.end_input()
        received = await stream.received()
    assert received.numbers == list(range(60))
    assert status["encoder"]["name"] == "libx264"
    assert "out of memory" in status["encoder"]["fallback"]
    assert status["decoder"]["device"] == "cpu"
    assert "out of memory" in status["decoder"]["fallback"]


async def test_the_last_picture_of_a_burst_is_out_while_the_input_stays_open(tmp_path: Path) -> None:
    """Nothing holds a picture until the next one comes: no codec, no muxer, no buffer on the way to the viewer."""
    clip = write_clip(tmp_path / "clip.ts", frames=20)
    reader, decoder = TsReader(), Decoder()
    seen: list[int | None] = []
    async with network(tmp_path) as net:
        stream = await net.start()
        async with Subscriber(net.http, stream.urls["publish_url"]) as viewer:
            await stream.publish_bytes(clip.read_bytes())
            async with asyncio.timeout(10):
                async for segment in viewer:
                    async for data in segment:
                        seen += numbers(decoder.feed(reader.feed(data)))
                        if len(seen) == 20:
                            break
                    break
    assert seen == list(range(20))
