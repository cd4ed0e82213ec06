"""Versions of a session's parameters, and the way back from those that fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.backend import GraphFailed, PassThrough
from engine.errors import NoSuchSession, UpdateReverted
from engine.graph.workflow import Prompt
from engine.parameters import PROBATION_RUNS, Parameters, Revision, links_of

FAILED = GraphFailed("told to")


def prompt(level: int) -> Prompt:
    return {"5": {"class_type": "Level", "inputs": {"image": ["1", 0], "level": level}}}


class Bench:
    """Parameters with the graphs that they discarded."""

    def __init__(self) -> None:
        self.discarded: list[Any] = []
        self.graph = PassThrough(2, 2)
        self.parameters = Parameters(prompt(0), self.graph, self.discarded.append)

    def adopt(self, level: int, graph: Any = None) -> Revision:
        self.parameters.adopt(prompt(level), graph or self.parameters.current.graph)
        return self.parameters.current

    def level(self) -> int:
        level: int = self.parameters.current.prompt["5"]["inputs"]["level"]
        return level

    def succeed(self, times: int = 1) -> None:
        for _ in range(times):
            self.parameters.succeeded(self.parameters.current, 0)

    def fail(self) -> str | None:
        return self.parameters.failed(self.parameters.current, FAILED)


@pytest.mark.parametrize("runs", [0, 1, PROBATION_RUNS - 1])
def test_failure_within_the_probation_restores(runs: int) -> None:
    bench = Bench()
    bench.adopt(1)
    bench.succeed(runs)
    assert "told to" in str(bench.fail())
    assert (bench.level(), bench.parameters.current.version) == (0, 3)


def test_failure_after_the_probation_is_the_frames_own() -> None:
    bench = Bench()
    bench.adopt(1)
    bench.succeed(PROBATION_RUNS)
    assert bench.fail() is None
    assert bench.level() == 1


def test_the_last_one_that_worked_comes_back_not_the_last_proven() -> None:
    bench = Bench()
    for level in (1, 2, 3):  # a slider being drawn: no value lives for the whole probation
        bench.adopt(level)
        bench.succeed()
    bench.adopt(4)
    bench.adopt(5)  # neither ran
    assert bench.fail() is not None
    assert bench.level() == 3


def test_failing_parameters_are_never_a_way_back() -> None:
    bench = Bench()
    assert bench.fail() is None
    bench.adopt(1)
    assert bench.fail() is None, "there is nothing that worked"
    assert bench.level() == 1


def test_late_result_of_an_older_version_decides_nothing() -> None:
    bench = Bench()
    old = bench.adopt(1)
    bench.adopt(2)
    assert bench.parameters.failed(old, FAILED) is None
    assert bench.level() == 2
    bench.parameters.succeeded(old, 0)
    assert bench.fail() is not None
    assert bench.level() == 0


def test_every_graph_is_discarded_once_and_none_that_is_used() -> None:
    bench = Bench()
    graphs = [PassThrough(2, 2) for _ in range(4)]
    bench.adopt(1, graphs[0])
    assert bench.discarded == [], "the first one is the way back"
    bench.adopt(2, graphs[1])
    assert [id(each) for each in bench.discarded] == [id(graphs[0])], "it never made a picture"
    bench.succeed(PROBATION_RUNS)
    assert id(bench.discarded[-1]) == id(bench.graph)
    bench.adopt(3, graphs[2])
    bench.fail()
    assert id(bench.discarded[-1]) == id(graphs[2])
    bench.adopt(4, graphs[3])
    bench.succeed()
    bench.parameters.close(NoSuchSession("over"))
    assert len(bench.discarded) == len({id(each) for each in bench.discarded}) == 5


async def test_who_waits_hears_of_the_reversal() -> None:
    bench = Bench()
    version = bench.adopt(1).version
    waiting = asyncio.create_task(bench.parameters.effective_pts(version, 10))
    await asyncio.sleep(0)
    bench.fail()
    with pytest.raises(UpdateReverted):
        await waiting


def test_links_tell_graphs_apart_and_values_do_not() -> None:
    assert links_of(prompt(1)) == links_of(prompt(2)) == {("5", "image"): ("1", 0)}
    other = prompt(1)
    other["5"]["inputs"]["image"] = ["1", 1]
    assert links_of(other) != links_of(prompt(1))
