"""The parts of the benchmarks on small inputs: what they count is right, and a wrong output is no figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

import cext
from bench import alone, appliance, goals, kernels, lanes, latency, material, peers, trip
from bench.timed import Moments, Page
from gateway_shim.localnet import numbered, probe
from gateway_shim.localnet.source import Published
from gateway_shim.media.encode import Encoder, EncoderSettings
from proto.ring import Ring

WIDTH, HEIGHT = 128, 96


def encoded(path: Path, numbers: list[int]) -> tuple[Path, list[int]]:
    """A stream of ours, and the sizes of its writes."""
    encoder = Encoder(EncoderSettings(WIDTH, HEIGHT, audio=False, segment_s=0.5))
    content = material.Content(WIDTH, HEIGHT)
    chunks = []
    for at, number in enumerate(numbers):
        frame = av.VideoFrame.from_ndarray(content.planes(number), format="yuv420p")
        chunks += encoder.video(frame, 126_000 + at * 3000)
    chunks += encoder.flush()
    path.write_bytes(b"".join(chunk.data for chunk in chunks))
    return path, [len(chunk.data) for chunk in chunks]


def watched(path: Path, frames: int) -> appliance.Watched:
    pts = [126_000 + at * 3000 for at in range(frames)]
    arrivals = probe.Arrivals(video=[(each, 0.0) for each in pts])
    return appliance.Watched([], Published(dict.fromkeys(pts, 0.0)), arrivals, path, frames={"processed": frames})


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return material.write_size(tmp_path / "clip.mp4", WIDTH, HEIGHT, 400_000)


def test_a_clip_carries_its_numbers_and_goes_over_into_itself(clip: Path) -> None:
    numbers = probe.numbers(clip)
    assert sorted(numbers.by_pts.values()) == list(range(material.FRAMES))
    content = material.Content(WIDTH, HEIGHT)
    luma = [content.planes(number)[HEIGHT // 4 : HEIGHT].astype(int) for number in (0, 1, material.FRAMES - 1)]
    steps = [float(np.abs(luma[0] - other).mean()) for other in luma[1:]]
    assert steps[1] < 2 * steps[0], "the seam of the loop is no cut"


def test_the_pictures_of_an_output_are_its_writes(tmp_path: Path) -> None:
    path, sizes = encoded(tmp_path / "out.ts", list(range(40)))
    assert trip.pictures(path.read_bytes()) == sizes


def test_a_piece_is_written_when_the_last_of_its_pictures_has_come() -> None:
    taken = [(0, 100), (0, 450), (1, 50), (1, 400)]  # the second ends in the fourth picture
    assert trip.pieces(taken, [100, 200, 200, 100, 400]) == [(0, 100, 1), (0, 450, 4), (1, 50, 4), (1, 400, 5)]


def test_a_right_output_passes(tmp_path: Path, clip: Path) -> None:
    path, _ = encoded(tmp_path / "out.ts", list(range(30)))
    assert appliance.check(watched(path, 30), 30, clip) < appliance.MAX_MEAN_ERROR


@pytest.mark.parametrize(
    ("numbers", "frames", "says"),
    [
        ([*range(12), 13, *range(13, 30)], 30, "carries number"),
        (list(range(29)), 30, "can be decoded"),
    ],
)
def test_a_wrong_output_is_no_figure(tmp_path: Path, clip: Path, numbers: list[int], frames: int, says: str) -> None:
    path, _ = encoded(tmp_path / "out.ts", numbers)
    with pytest.raises(appliance.WrongOutput, match=says):
        appliance.check(watched(path, frames), frames, clip)


def test_frames_that_were_not_processed_are_no_figure(tmp_path: Path, clip: Path) -> None:
    path, _ = encoded(tmp_path / "out.ts", list(range(30)))
    found = watched(path, 30)
    found.frames["processed"] = 29
    with pytest.raises(appliance.WrongOutput, match="not all were processed"):
        appliance.check(found, 30, clip)


def test_a_machine_that_is_too_slow_shows_pictures_twice_as_often_as_the_account_says(
    tmp_path: Path, clip: Path
) -> None:
    path, _ = encoded(tmp_path / "out.ts", [*range(12), 11, *range(13, 25), 24, *range(26, 30)])
    found = watched(path, 30)
    found.frames.update(processed=28, repeated=2)
    assert appliance.check(found, 30, clip, processed=False) < appliance.MAX_MEAN_ERROR
    found.frames["repeated"] = 1
    with pytest.raises(appliance.WrongOutput, match="picture 25 carries number 24"):
        appliance.check(found, 30, clip, processed=False)
    path, _ = encoded(path, [*range(12), 10, *range(13, 30)])
    with pytest.raises(appliance.WrongOutput, match="picture 12 carries number 10"):
        appliance.check(found, 30, clip, processed=False)


def test_another_picture_with_the_right_number_is_no_figure(tmp_path: Path) -> None:
    path, _ = encoded(tmp_path / "out.ts", list(range(30)))
    other = numbered.write_clip(tmp_path / "other.mp4", frames=material.FRAMES, width=WIDTH, height=HEIGHT)
    with pytest.raises(appliance.WrongOutput, match="levels"):
        appliance.check(watched(path, 30), 30, other)


def test_time_is_that_of_the_calling_thread(tmp_path: Path) -> None:
    page = Page(tmp_path / "page", create=True)
    slept = page.timed("decode", lambda: time.sleep(0.05))

    def busy() -> None:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass

    worked = page.timed("encode", busy)
    threads = [threading.Thread(target=call) for call in (slept, worked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = Page(tmp_path / "page").read()
    assert read["decode"][1] == read["encode"][1] == 1
    assert read["decode"][0] < 20e6
    assert 50e6 <= read["encode"][0] < 80e6


def test_cpu_of_another_process_is_its_own() -> None:
    code = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass\nprint(1); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.2 <= appliance.cpu_s(process.pid) < 1.5
        process.communicate("\n")


def test_memory_counts_all_slots_whether_something_was_in_them_or_not() -> None:
    before = appliance.memory_bytes(os.getpid())
    ring = Ring.create(8, 4 << 20, bytes(16))
    try:
        grown = appliance.memory_bytes(os.getpid()) - before
        assert 32 << 20 <= grown < 36 << 20
        ring.view(3, 4 << 20)[:] = bytes(4 << 20)
        assert appliance.memory_bytes(os.getpid()) - before - grown < 4 << 20  # only what made it
    finally:
        ring.close()


def reading(frames: int, scale: float) -> appliance.Reading:
    stages = {
        "decode": 2.0,
        "encode": 6.0,
        "ts": 0.1,
        "mux": 0.1,
        "copy": 0.2,
        "forward": 0.5,
        "graph": 0.1,
        "back": 0.5,
    }
    ns = {name: int(value * frames * scale * 1e6) for name, value in stages.items()}
    return appliance.Reading(frames / 30, frames, 9.0e-3 * frames * scale, 1.5e-3 * frames * scale, ns, {})


def test_the_ratio_leaves_out_codec_and_http() -> None:
    rows = trip.per_frame([reading(frames, 1.0) for frames in (20, 40, 60, 80)])
    found = trip.figures(rows, 0.4, "trip_overhead", "720p")
    assert found["trip_overhead_720p_x_codec"] == pytest.approx((9.0 + 1.5 - 8.0 - 0.4) / 8.0)
    parts = trip.stages(rows, 0.4, "720p")
    total = parts.pop("cpu_total_720p_ms")
    assert sum(parts.values()) == pytest.approx(total)
    assert total == pytest.approx(10.5)
    assert parts["cpu_python_720p_ms"] == pytest.approx(10.5 - 9.5 - 0.4)


def test_codec_alone_gives_milliseconds(clip: Path) -> None:
    found = alone.codec(clip, 1)
    assert 0 < found["decode_ms"] < 50
    assert 0 < found["encode_ms"] < 50


def moments(frames: int) -> dict[str, dict[int, tuple[float, ...]]]:
    return {
        "came": {at: (at / 30,) for at in range(frames)},
        "decoded": {at: (at / 30 + 0.002, at / 30 + 0.005) for at in range(frames)},
        "left": {at: (at / 30 + 0.020,) for at in range(frames)},
    }


def test_latency_is_from_the_last_byte_in_to_the_picture_out() -> None:
    found = latency.inside(moments(40), 40, "inside_720p")
    assert found["latency_inside_720p_p50_ms"] == pytest.approx(20)
    assert found["decode_lag_inside_720p_ms"] == pytest.approx(2)


def test_a_frame_without_its_times_is_no_figure() -> None:
    gap = moments(40)
    del gap["left"][20]
    with pytest.raises(appliance.WrongOutput, match="39 of 40"):
        latency.inside(gap, 40, "inside_720p")


def test_moments_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "moments"
    moments = Moments(path)
    moments.decoded(3000, 1.6, 1.7)
    moments._file.close()
    assert latency.read(path) == {"came": {}, "decoded": {3000: (1.6, 1.7)}, "left": {}}


def test_other_ways_are_compared_with_ours_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "POOL_BYTES", 1)
    found = peers.run(1, {"512": (WIDTH, HEIGHT)})
    for way in ("swscale", "torch"):
        for direction in ("forward", "back"):
            assert found[f"kernel_peer_{way}_{direction}_512_x_ours"] > 0
    assert "swscale" in peers.table(found)


def test_a_way_that_gives_another_picture_is_no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "POOL_BYTES", 1)
    ways = peers.Ways(WIDTH, HEIGHT)
    monkeypatch.setattr(ways, "_torch", lambda index: np.zeros((HEIGHT, WIDTH, 3), np.float32))
    with pytest.raises(AssertionError, match="torch differs"):
        peers.check(ways)


def test_a_kernel_that_gives_another_picture_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "POOL_BYTES", 1)
    pool = kernels.pool_of(WIDTH, HEIGHT)
    kernels.check(pool)
    monkeypatch.setitem(kernels.FORWARD_ERROR, "float32", 1e-9)
    with pytest.raises(AssertionError, match=r"forward.* is off by"):
        kernels.check(pool)
    monkeypatch.undo()
    monkeypatch.setattr(cext, "image_to_i420", lambda image, planes: planes.arrays[1].fill(0))
    with pytest.raises(AssertionError, match=r"back.* is off by"):
        kernels.check(pool)


def test_memcpy_is_there_and_back_of_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.8])
    copies = lanes.Copies(lanes.pictures(WIDTH, HEIGHT))
    for back in copies._back:
        back[:] = 0
    monkeypatch.setattr(lanes, "cpu_s", lambda _: next(clock))
    assert copies.round_ms(batches=8) == pytest.approx(1000 * 0.8 / 32)
    for source, back in zip(copies._sources, copies._back, strict=True):
        assert np.array_equal(source, back)


def test_the_command_line_refuses_parts_that_are_none() -> None:
    root = Path(appliance.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-m", "bench", "--only", "kernels,fun"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "fun" in ran.stderr


RESULTS = Path(appliance.__file__).parent / "results"

#: What runs are compared by, of whatever version.
KEYS = {
    *(f"kernel_{way}_{size}_x_limit" for way in ("forward", "back") for size in kernels.SIZES),
    *("lane_bytes_s_per_gb", "lane_shm_720p_x_memcpy", "lane_shm_1080p_x_memcpy"),
    *(f"trip_overhead_{size}_x_codec" for size in material.SIZES),
    *("latency_inside_720p_p50_ms", "latency_inside_720p_p99_ms", "first_picture_ms"),
    *("plan_chain20_x_executor", "plan_sd15_x_executor"),
}


def test_committed_results_are_flat_and_have_the_keys() -> None:
    whole = [path for path in RESULTS.glob("*.json") if "scaling" not in path.name and "gpu" not in path.name]
    assert whole
    for path in RESULTS.glob("*.json"):
        values = json.loads(path.read_text())
        assert all(isinstance(value, int | float) for value in values.values()), path.name
        assert path not in whole or set(values) >= KEYS, path.name


def test_every_goal_is_of_a_figure_that_a_whole_run_gives() -> None:
    [path] = RESULTS.glob("*-epyc.json")
    values = json.loads(path.read_text())
    assert {goal.key for goal in goals.GOALS if "avx" not in goal.key} <= set(values)


def test_goals_are_held_missed_or_not_measured() -> None:
    found = {"trip_overhead_512_x_codec": 0.28, "trip_overhead_720p_x_codec": 0.204, "scaling_512_4_real_time": 0.0}
    verdicts = {goal.key: goal.verdict(found) for goal in goals.GOALS if goal.part in ("trip", "scaling")}
    assert verdicts["trip_overhead_512_x_codec"] == "held"
    assert verdicts["trip_overhead_720p_x_codec"] == verdicts["scaling_512_4_real_time"] == "MISSED"
    assert verdicts["memory_stream_720p_mb"] == "not measured"
    table = goals.table(found, ["trip"])
    assert table.endswith("1 of 3 goals held")
    assert "0.204      <= 0.2  MISSED" in table


def test_kernels_give_their_keys_checked_at_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    monkeypatch.setattr(kernels, "POOL_BYTES", 1)
    monkeypatch.setattr(kernels, "SIZES", dict.fromkeys(kernels.SIZES, (WIDTH, HEIGHT)))
    monkeypatch.setattr(kernels, "check", lambda pool: checked.append(len(pool)))
    found = kernels.run(1)
    assert {key for key in KEYS if key.startswith("kernel")} <= set(found)
    assert len(checked) == 2
