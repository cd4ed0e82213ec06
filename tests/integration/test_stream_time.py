"""Honest time, from a publisher to a viewer: output pts are input pts, sound stays with its picture to 40 ms, no
sample is lost or doubled, and nothing freezes, whatever the clocks of the source do."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engine.backend import FrameIn, PictureOut, RunResult
from engine.graph.workflow import Prompt
from gateway_shim.localnet.numbered import write_clip
from gateway_shim.localnet.probe import Arrivals
from gateway_shim.stream import pause
from gateway_shim.stream.output import STILL_EVERY_S
from gateway_shim.trickle.subscriber import Subscriber
from tests.fakes.engine_backend import StubBackend, StubGraph, workflow
from tests.fakes.network import LiveStream, Network, network
from tests.fakes.timed import TICKS, Heard, Move, Played, heard, play, steady, write_timed
from tests.fakes.ts_edit import damaged_pts

MAX_OFFSET_MS = 40
#: Longest silence of the output beyond that of the input, on a machine that others use too.
MAX_SILENCE_S = 0.5
FRAME = TICKS // 30
WRAP = 1 << 33
#: Samples that lie before the first picture and are left out: what AAC begins with, and the delay of Opus.
BEFORE_THE_FIRST = 1024 + 312


class EchoGraph(StubGraph):
    """Gives each picture back as it came, after the backend's ``run_s``."""

    def run(self, prompt: Prompt, frames: Sequence[FrameIn]) -> RunResult:
        time.sleep(self.backend.run_s)
        return RunResult([PictureOut(frame.planes, self.video.width, self.video.height) for frame in frames])


class EchoBackend(StubBackend):
    graph_class = EchoGraph


@dataclass
class Result:
    heard: Heard
    played: Played
    arrivals: Arrivals
    frames: dict[str, int]
    lost_samples: int  # that gate and encoder admit to
    timing: dict[str, float]  # as the status has it
    longest_segment_s: float  # until the gateway had read it, from the end of the one before

    def in_sync(self, sounds: int) -> None:
        """The sound of at least so many packets of 20 ms is with its picture."""
        offsets = np.abs(self.heard.offsets_ms)
        assert len(offsets) >= sounds, f"only {len(offsets)} packets of sound were recognised beside a picture"
        assert np.quantile(offsets, 0.99) < MAX_OFFSET_MS
        assert self.timing["av_offset_p99_ms"] < MAX_OFFSET_MS
        stamps = [pts for pts, _ in self.heard.pictures]
        assert stamps == sorted(set(stamps)), "pts only grow"

    def whole(self, joints: Sequence[float] = ()) -> None:
        """No sample is lost or doubled. At a joint of two clocks there may be a packet of silence; one that is half
        silence may not be recognised."""
        away = [step for step in self.heard.steps if not any(abs(step[0] - joint) < 0.1 for joint in joints)]
        assert away == []
        for joint in joints:
            total = sum(seconds for at, seconds in self.heard.steps if abs(at - joint) < 0.1)
            assert -0.04 < total < 0.021, self.heard.steps
        assert self.lost_samples <= BEFORE_THE_FIRST

    def flows(self, pause_s: float = 0.0) -> None:
        """Pictures come all the time; ``pause_s``: longest pause of the input."""
        moments = [at for _, at in self.arrivals.video]
        silence = max(after - before for before, after in itertools.pairwise(moments))
        assert silence < pause_s + MAX_SILENCE_S + self.played.late_s

    @property
    def pts_steps(self) -> list[int]:
        return [after - before for (before, _), (after, _) in itertools.pairwise(self.heard.pictures)]

    def numbers(self) -> list[int]:
        return [number for _, number in self.heard.pictures]

    def pts_of(self, number: int) -> int:
        """When a picture was shown first."""
        return next(pts for pts, each in self.heard.pictures if each == number)


async def run(
    tmp_path: Path,
    times: Sequence[float],
    *,
    graph_s: float | None = None,
    move: Move = lambda at, is_video: 0,
    clip: dict[str, object] | None = None,
    cuts: Sequence[float] = (),
    sound_after_s: float = 0.0,
    burst: bool = False,
    later_s: Callable[[float], float] = lambda at: 0.0,
) -> Result:
    """Play a source through the whole shim. graph_s: time of a graph that gives pictures back as they came; None for
    the engine's own pass-through."""
    path = write_timed(tmp_path / "source.nut", times, **(clip or {}))  # type: ignore[arg-type]
    backend = None
    params = None
    if graph_s is not None:
        backend = EchoBackend()
        backend.run_s = graph_s
        params = {"prompts": json.loads(workflow())}
    async with network(tmp_path, backend=backend) as net:
        stream = await net.start(params=params)
        gateway = asyncio.create_task(longest_segment(net, stream))
        played = await play(
            await stream.publisher(),
            path,
            move=move,
            cuts=cuts,
            sound_after_s=sound_after_s,
            burst=burst,
            later_s=later_s,
        )
        session = net.shim.streams.active["cam"]
        await stream.end_input()
        received = await stream.received()
        encoder = session._output._encoder  # type: ignore[union-attr]
        assert encoder is not None
        lost = encoder.counters.dropped_samples + encoder.counters.dropped_sounds * 1024
        frames = (await stream.event("stream_stopped"))["frames"]
        longest_s = await gateway
    timing = session.status()["timing"]
    return Result(heard(received.path, times), played, received.arrivals, frames, lost, timing, longest_s)


async def longest_segment(net: Network, stream: LiveStream) -> float:
    """What the gateway's watchdog looks at: seconds from asking for a segment to having read it whole (1.8)."""
    longest_s = 0.0
    async with Subscriber(net.http, stream.urls["publish_url"]) as subscriber:
        asked_at = None
        async for segment in subscriber:
            await segment.read(1 << 24)
            now = time.monotonic()
            longest_s = max(longest_s, now - (asked_at or now))
            asked_at = now
    return longest_s


@pytest.mark.parametrize(
    ("rate", "clip"),
    [(30, {}), (24, {"audio": "opus"}), (30, {"b_frames": 2})],
    ids=["30 fps", "24 fps, opus", "b-frames"],
)
async def test_pictures_and_sound_keep_their_time(tmp_path: Path, rate: int, clip: dict[str, object]) -> None:
    times = steady(rate, 3)
    result = await run(tmp_path, times, clip=clip)
    assert result.numbers() == list(range(len(times)))
    assert [pts - result.heard.pictures[0][0] for pts, _ in result.heard.pictures] == [
        round(at * TICKS) for at in times
    ]
    result.whole()
    result.in_sync(120)
    result.flows()


async def test_sound_whose_stamps_are_rounded(tmp_path: Path) -> None:
    """Containers count in milliseconds and worse; samples are counted, so there is no click where a stamp is off."""
    times = steady(30, 3)
    jitter = [0, 500, -600, 300, -100]
    result = await run(
        tmp_path, times, move=lambda at, is_video: 0 if is_video else jitter[round(at * 1000) % len(jitter)]
    )
    assert result.heard.steps == []
    result.in_sync(120)
    assert 1 < result.timing["av_offset_p99_ms"] < 20, "and the metric says by how much"
    assert 0 < result.timing["latency_ms"] <= result.timing["latency_p99_ms"] < 1000


@pytest.mark.parametrize("rate", [60, 30])
async def test_graph_of_seven_pictures_a_second(tmp_path: Path, rate: int) -> None:
    times = steady(rate, 4)
    result = await run(tmp_path, times, graph_s=1 / 7)
    assert len(result.arrivals.video) > 0.9 * len(times), "the cadence is the input's"
    assert result.frames["processed"] > 14, "half of what it can, on a busy machine"
    result.whole()
    result.in_sync(160)
    result.flows()


async def test_variable_frame_rate(tmp_path: Path) -> None:
    gaps = [1 / 60, 1 / 10, 1 / 24, 1 / 60, 1 / 60, 1 / 5, 1 / 30] * 8
    times = [round(at, 3) for at in itertools.accumulate(gaps, initial=0.0)]
    result = await run(tmp_path, times, graph_s=0.01)
    assert result.numbers() == list(range(len(times)))
    result.whole()
    result.in_sync(120)
    result.flows(pause_s=0.2)


@pytest.mark.parametrize(("leap_s", "graph_s"), [(3, 1 / 7), (1000, 0.01), (1000, 1 / 7)])
async def test_clock_that_leaps_forward(tmp_path: Path, leap_s: int, graph_s: float) -> None:
    times = steady(30, 4)
    result = await run(
        tmp_path, times, graph_s=graph_s, move=lambda at, _: leap_s * TICKS if at >= 2 else 0, cuts=[2.0]
    )
    assert sum(step > FRAME * 10 for step in result.pts_steps) == 1, "the leap is kept"
    result.whole([2.0])
    result.in_sync(160)
    result.flows()


#: Offset of a clock that begins again at zero at second ``at``.
def again(at: float, first: int = 0) -> Callable[[float], int]:
    return lambda now: first if now < at else -round(at * TICKS)


@pytest.mark.parametrize(
    ("at", "first", "graph_s"),
    [(2, 0, 0.01), (2, 0, 1 / 7), (2, 5_000_000, 0.01), (1, 0, 0.01)],
    ids=["2 s", "slow graph", "far", "1 s"],
)
async def test_clock_that_begins_again(tmp_path: Path, at: int, first: int, graph_s: float) -> None:
    times = steady(30, 4)
    clock = again(at, first)
    result = await run(tmp_path, times, graph_s=graph_s, move=lambda now, _: clock(now), cuts=[float(at)])
    assert max(result.pts_steps) <= FRAME * 6, "the output's clock goes on"
    if graph_s < 0.1:
        assert result.numbers() == list(range(len(times)))
    result.whole([at])
    result.in_sync(160)
    result.flows()


async def test_clock_that_begins_again_and_again(tmp_path: Path) -> None:
    times = steady(30, 5)
    result = await run(tmp_path, times, graph_s=0.01, move=lambda at, _: -int(at) * TICKS, cuts=[1.0, 2.0, 3.0, 4.0])
    assert max(result.pts_steps) <= FRAME * 6
    assert result.numbers() == list(range(len(times)))
    result.whole([1, 2, 3, 4])
    result.in_sync(200)
    result.flows()


async def test_sound_that_begins_late(tmp_path: Path) -> None:
    times = steady(30, 4)
    result = await run(tmp_path, times, graph_s=0.01, move=lambda at, is_video: 0 if is_video or at >= 1.5 else None)
    assert result.heard.sounds[0][1] == pytest.approx(1.5, abs=0.05)
    result.whole()
    result.in_sync(100)
    result.flows()


async def test_sound_that_stops_and_comes_back(tmp_path: Path) -> None:
    times = steady(30, 4)
    result = await run(
        tmp_path, times, graph_s=0.01, move=lambda at, is_video: None if not is_video and 1 <= at < 2.5 else 0
    )
    assert sum(seconds for _, seconds in result.heard.steps) == pytest.approx(1.5, abs=0.03)
    assert {round(at, 1) for at, _ in result.heard.steps} == {1.0}, "one gap"
    result.in_sync(100)
    result.flows()


@pytest.mark.parametrize("back_at", [2.5, 3.5])
async def test_sound_that_comes_back_on_another_clock(tmp_path: Path, back_at: float) -> None:
    """The clock began again while there was none."""
    times = steady(30, 5)

    def move(at: float, is_video: bool) -> int | None:
        if not is_video and 1.2 <= at < back_at:
            return None
        return 0 if at < 2 else -2 * TICKS

    result = await run(tmp_path, times, graph_s=0.01, move=move, cuts=[2.0])
    assert sum(seconds for _, seconds in result.heard.steps) == pytest.approx(back_at - 1.2, abs=0.03)
    assert {round(at, 1) for at, _ in result.heard.steps} == {1.2}, "one gap"
    result.in_sync(100)
    result.flows()


async def test_damaged_pts_beside_a_sound_dts_freezes_nothing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.ts", frames=90, b_frames=2)
    async with network(tmp_path) as net:
        stream = await net.start()
        await stream.publish_bytes(damaged_pts(clip.read_bytes(), 20, 3600 * TICKS))
        await stream.end_input()
        received = await stream.received()
        frames = (await stream.event("stream_stopped"))["frames"]
    assert received.numbers == list(range(90))
    assert {after - before for before, after in itertools.pairwise(received.pts)} == {FRAME}
    assert frames["dropped"] == 0


@pytest.mark.parametrize("sound_after_s", [0.0, 0.4], ids=["together", "sound later"])
async def test_wrap_of_33_bits(tmp_path: Path, sound_after_s: float) -> None:
    times = steady(30, 4)
    result = await run(
        tmp_path, times, graph_s=0.01, move=lambda at, _: WRAP - 2 * TICKS, sound_after_s=sound_after_s
    )
    assert set(result.pts_steps) <= set(range(FRAME - 90, FRAME + 91)), "no step where the stamps wrap"
    result.whole()
    result.in_sync(160)
    result.flows()


@pytest.mark.parametrize("graph_s", [0.01, 1 / 7], ids=["fast", "slow"])
async def test_segments_in_one_piece(tmp_path: Path, graph_s: float) -> None:
    """What a gateway does that gets whole segments itself."""
    times = steady(30, 6)
    result = await run(tmp_path, times, graph_s=graph_s, burst=True, clip={"gop_s": 2.0})
    assert len(result.arrivals.video) > 0.9 * len(times)
    result.whole()
    result.in_sync(240)
    result.flows(pause_s=2.0)


async def test_sound_far_behind_its_picture_in_the_stream(tmp_path: Path) -> None:
    times = steady(30, 4)
    result = await run(tmp_path, times, graph_s=0.01, sound_after_s=0.7)
    assert result.numbers() == list(range(len(times)))
    result.whole()
    result.in_sync(140)
    result.flows()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> float:
    """Pictures are missed sooner; what the output may be silent for then, and a segment be open for."""
    monkeypatch.setattr(pause, "QUIET_S", 1.0)
    return 1.0 + 0.4 + STILL_EVERY_S


@pytest.mark.parametrize("graph_s", [0.01, None], ids=["graph", "pass-through"])
async def test_pictures_that_stay_away_while_sound_goes_on(
    tmp_path: Path, short_pauses: float, graph_s: float | None
) -> None:
    times = steady(30, 8)
    result = await run(
        tmp_path, times, graph_s=graph_s, move=lambda at, is_video: None if is_video and 2 <= at < 6 else 0
    )
    assert [number for number in range(len(times)) if number not in result.numbers()] == list(range(60, 180))
    assert result.pts_of(180) - result.pts_of(59) == 121 * FRAME, "input pts are kept"
    stills = result.numbers().count(59) - 1
    assert 3 <= stills <= 5
    assert result.frames["repeated"] >= stills
    result.whole()
    result.in_sync(160)
    result.flows(short_pauses)
    assert result.longest_segment_s < 2.0 + short_pauses + MAX_SILENCE_S


@pytest.mark.parametrize("clock", ["goes on", "stands still"])
async def test_input_that_pauses(tmp_path: Path, short_pauses: float, clock: str) -> None:
    times = steady(30, 5)
    pause_s = 5.0

    def gone(at: float) -> float:
        return pause_s if at >= 2 else 0.0

    result = await run(
        tmp_path,
        times,
        graph_s=0.01,
        later_s=gone,
        move=lambda at, _: round(gone(at) * TICKS) if clock == "goes on" else 0,
        cuts=[2.0],
    )
    missing = [number for number in range(len(times)) if number not in result.numbers()]
    if clock == "goes on":
        assert missing == []
        assert result.pts_of(60) - result.pts_of(59) == FRAME + pause_s * TICKS, "input pts are kept"
    else:
        # Only after a moment it is plain that they do not catch up.
        assert missing == list(range(60, 60 + len(missing)))
        assert len(missing) < 20
        assert result.pts_of(149) - result.pts_of(59) < (3 + pause_s + MAX_SILENCE_S) * TICKS
    assert result.numbers().count(59) > 4
    result.in_sync(120)
    result.flows(short_pauses)
    assert result.longest_segment_s < 2.0 + short_pauses + MAX_SILENCE_S


async def test_input_that_comes_late_all_at_once_is_no_other_clock(tmp_path: Path, short_pauses: float) -> None:
    """A line that stalls for longer than pictures are waited for: what they show is over, the stamps stay."""
    times = steady(30, 9)
    result = await run(tmp_path, times, graph_s=0.01, later_s=lambda at: max(0.0, 6 - at) if at >= 2 else 0.0)
    assert result.pts_of(269) - result.pts_of(59) == 210 * FRAME, "input pts are kept"
    result.whole()
    result.in_sync(120)
    result.flows(short_pauses)
    assert result.longest_segment_s < 2.0 + short_pauses + MAX_SILENCE_S
