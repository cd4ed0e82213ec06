"""The benchmark of the plan, short: its goals hold, and a plan that computes something else fails it."""

import pytest
import torch

from bench import plan


@pytest.fixture(autouse=True)
def threads(host):
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_plan_costs_a_fraction_of_the_executor():
    results = plan.run(rounds=12, frames=200)
    assert results["plan_chain20_x_executor"] <= 0.1
    assert results["plan_sd15_x_executor"] <= 0.2
    assert "chain20" in plan.table(results)


def test_a_wrong_picture_fails_the_benchmark(monkeypatch):
    monkeypatch.setattr(plan.Idle, "run", lambda self, name, in0=None, **others: (in0 + 0.1, name))
    with pytest.raises(AssertionError, match="changed the picture"):
        plan.run(rounds=1, frames=1)
