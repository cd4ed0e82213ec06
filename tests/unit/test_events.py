"""Error events: what comes with every frame is told once a second, what answers a caller each time."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_shim.stream import events
from gateway_shim.stream.events import MOST_ANSWERS, Events

now = [0.0]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))


def of(stream: Events, reason: str) -> list[dict[str, Any]]:
    return [event for event in stream.recent if event.get("reason") == reason]


def test_errors_of_one_kind_once_a_second_and_how_many_were_left_out() -> None:
    now[0] = 100.0
    stream = Events(None, dict)
    for _ in range(30):
        stream.error("node_failed", "it failed")
    stream.error("bad_picture", "another kind")
    assert len(of(stream, "node_failed")) == len(of(stream, "bad_picture")) == 1
    now[0] = 101.0
    stream.error("node_failed", "it failed again")
    assert [event.get("left_out") for event in of(stream, "node_failed")] == [None, 29]


def test_every_refused_update_is_answered_as_far_as_there_is_room() -> None:
    now[0] = 200.0
    stream = Events(None, dict)
    stream.recent = stream.recent.__class__(maxlen=1000)
    for number in range(MOST_ANSWERS + 5):
        stream.error("update_refused", f"mistake {number}")
    answers = of(stream, "update_refused")
    assert [event["message"] for event in answers] == [f"mistake {number}" for number in range(MOST_ANSWERS)]
    now[0] = 201.0
    stream.error("update_refused", "one more")
    assert of(stream, "update_refused")[-1]["left_out"] == 5
