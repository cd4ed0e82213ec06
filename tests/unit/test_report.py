"""The demo's report: everything a viewer would have noticed is in it, and it fits on a screen."""

import json
from dataclasses import replace

import pytest

from gateway_shim.localnet.measure import FrameTally
from gateway_shim.localnet.report import Change, Report

GOOD = Report(
    clip="bigbuckbunny.mp4",
    workflow="demo.json",
    size="640x360 at 25 fps",
    seconds=20.0,
    frames=FrameTally(500, 500, 0, 0, 0, 0),
    longest_gap=0,
    latency_p50_ms=33.2,
    latency_p95_ms=57.0,
    latency_max_ms=211.0,
    av_offset_ms=-1.25,
    av_method="input and output sound correlated",
    segments=10,
    keyless_segments=0,
    gaps=0,
    source_late_s=0.01,
    change=Change({"4": {"blend_factor": 0.85}}, 10.0, 21.0, 24.0, 2, 1_026_000),
    worker={"processed": 500, "graph_ms": 14.0},
)


def test_good_run_is_called_good_on_one_screen():
    text = GOOD.as_text()
    assert "Every frame arrived, once and in order." in text
    assert "1 ms early" in text
    assert "visible after 24 ms" in text
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 80
    assert GOOD.shortfalls == []
    assert json.loads(json.dumps(GOOD.as_json()))["change"]["effective_pts"] == 1_026_000


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"frames": FrameTally(500, 490, 10, 0, 0, 0), "longest_gap": 4},
            "10 of 500 frames were lost, at most 4 in a row",
        ),
        ({"frames": FrameTally(500, 501, 0, 1, 0, 0)}, "1 frames arrived twice"),
        ({"frames": FrameTally(500, 500, 0, 0, 3, 0)}, "3 frames arrived after a later one"),
        ({"frames": FrameTally(500, 500, 1, 0, 0, 1)}, "a pts that was never sent"),
        ({"frames": FrameTally(500, 0, 500, 0, 0, 0)}, "Nothing came out at all"),
        ({"worker": {"passed_through": 7, "reasons": {"passed_through": {"late": 7}}}}, "unprocessed (late: 7)"),
        ({"worker": {"failed": 2}}, "2 frames failed in the graph"),
        ({"worker": {"repeated": 9}}, "9 frames are a repetition"),
        ({"av_offset_ms": 41.0}, "41 ms apart"),
        ({"misnumbered": 5}, "5 frames show another picture"),
        ({"keyless_segments": 1}, "do not begin with a keyframe"),
        ({"source_late_s": 1.5}, "fell 1.5 s behind real time"),
        ({"change": replace(GOOD.change, visible_ms=None)}, "no frame made with it arrived"),
    ],
)
def test_whatever_went_wrong_is_said(changed, sentence):
    report = replace(GOOD, **changed)
    assert any(sentence in shortfall for shortfall in report.shortfalls)
    assert sentence in report.as_text()
    assert "Every frame arrived" not in report.as_text()
