"""The arithmetic behind the demo's report and the end-to-end tests: it must see what is wrong with a stream."""

import numpy as np
import pytest

from gateway_shim.localnet import measure
from gateway_shim.localnet.measure import SAMPLE_RATE, TICKS, Sound

FRAME = TICKS // 30


def test_tally_of_a_perfect_stream_has_nothing_to_complain_about():
    sent = range(0, 100 * FRAME, FRAME)
    assert measure.tally(sent, list(sent)) == measure.FrameTally(100, 100, 0, 0, 0, 0)


def test_tally_tells_lost_duplicated_reordered_and_retimed_apart():
    received = [0, FRAME, FRAME, 3 * FRAME, 2 * FRAME, 5 * FRAME, 6 * FRAME + 1]
    found = measure.tally(range(0, 7 * FRAME, FRAME), received)
    assert found.sent == 7
    assert found.received == 7
    assert found.lost == 2  # 4, and 6 whose pts was changed
    assert found.duplicated == 1
    assert found.out_of_order == 1
    assert found.unknown == 1


def test_longest_gap_counts_frames_in_a_row():
    assert measure.longest_gap([0, 1, 2, 3, 4, 5, 6], [0, 3, 6]) == 2
    assert measure.longest_gap([0, 1], [0, 1]) == 0
    assert measure.longest_gap([0, 1], []) == 2


def test_percentiles_of_nothing_are_none():
    assert measure.percentile([], 0.5) is None
    assert measure.percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert measure.percentile(list(range(101)), 0.95) == pytest.approx(95)


def test_latency_counts_the_first_arrival_of_a_frame_that_was_sent():
    published = {0: 10.0, FRAME: 10.033}
    received = [(0, 10.1), (0, 10.5), (FRAME, 10.133), (77, 10.2)]
    assert measure.latencies_ms(published, received) == pytest.approx([100, 100])


def bursts(at_s, *, length_s=3.0, pts=0):
    samples = np.zeros(int(length_s * SAMPLE_RATE), np.float32)
    tone = np.sin(2 * np.pi * 1000 * np.arange(SAMPLE_RATE // 10) / SAMPLE_RATE).astype(np.float32)
    for begin in at_s:
        at = round(begin * SAMPLE_RATE)
        samples[at : at + len(tone)] = tone
    return Sound(samples, pts)


def test_onsets_are_found_to_the_millisecond_on_the_streams_own_time_line():
    found = measure.onsets(bursts([0.5, 1.5, 2.5], pts=126_000))
    assert [round(pts) for pts in found] == pytest.approx(
        [126_000 + round(s * TICKS) for s in (0.5, 1.5, 2.5)], abs=90
    )


def test_onsets_of_silence_are_none():
    assert measure.onsets(Sound(np.zeros(100, np.float32), 0)) == []


@pytest.mark.parametrize("late_ms", [-60, 0, 25, 400])
def test_nearest_offset_is_positive_for_late_sound(late_ms):
    due = [0, TICKS, 2 * TICKS]
    begins = [pts + late_ms * TICKS / 1000 for pts in due]
    assert measure.nearest_offset_ms(begins, due) == pytest.approx(late_ms)


def test_nearest_offset_without_sound_or_without_frames_is_unknown():
    assert measure.nearest_offset_ms([], [0]) is None
    assert measure.nearest_offset_ms([0.0], []) is None


@pytest.mark.parametrize("late_ms", [-250, 0, 10, 333])
@pytest.mark.parametrize("head_s", [0.0, 0.7])
def test_lag_is_found_whatever_part_of_the_sound_arrived(late_ms, head_s):
    rng = np.random.default_rng(1)
    reference = Sound(rng.standard_normal(SAMPLE_RATE * 4).astype(np.float32), 126_000)
    skipped = round(head_s * SAMPLE_RATE)
    heard = Sound(0.5 * reference.samples[skipped:], 126_000 + round((head_s + late_ms / 1000) * TICKS))
    assert measure.lag_ms(reference, heard) == pytest.approx(late_ms, abs=0.1)


def test_lag_between_unlike_sounds_is_unknown():
    rng = np.random.default_rng(2)
    one, other = (Sound(rng.standard_normal(SAMPLE_RATE * 2).astype(np.float32), 0) for _ in range(2))
    assert measure.lag_ms(one, other) is None
    assert measure.lag_ms(one, Sound(np.zeros(100, np.float32), 0)) is None


def test_blocks_are_laid_out_by_their_pts_with_silence_between():
    one = np.ones(480, np.float32)
    line = measure.lay_out([(TICKS, one), (TICKS + 1800, 2 * one)])  # 10 ms each, 20 ms apart
    assert line is not None
    assert line.pts == TICKS
    assert len(line.samples) == 1440
    assert line.samples[479] == 1
    assert line.samples[480:960].max() == 0
    assert line.samples[960] == 2
