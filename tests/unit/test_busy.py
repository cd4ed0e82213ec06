"""The mean forgets at its own rate, and a run that is under way counts."""

import math

import pytest

from engine.busy import MEMORY_S, Busy


def test_share_of_the_last_seconds() -> None:
    now = 0.0
    busy = Busy(lambda: now)
    assert busy.share == 0.0
    now += 100.0
    assert busy.share == 0.0
    busy.turns(True)
    now += MEMORY_S
    assert busy.share == pytest.approx(1 - math.exp(-1)), "what is under way counts"
    now += 100 * MEMORY_S
    busy.turns(False)
    assert busy.share == pytest.approx(1.0)
    now += MEMORY_S
    assert busy.share == pytest.approx(math.exp(-1))
    for _ in range(3000):  # 30 fps, 20 ms each
        busy.turns(True)
        now += 0.020
        busy.turns(False)
        now += 0.0133
    assert busy.share == pytest.approx(0.6, abs=0.01)
