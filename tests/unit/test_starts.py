"""An engine whose ComfyUI dies while it loads waits before it tries again."""

import asyncio
from pathlib import Path

import pytest

from engine.executor import Executor
from engine.loading import Loading, LoadState
from engine.starts import Starts, pause_s
from tests.fakes.engine_backend import StubBackend


def test_pause_grows_from_the_third_death_in_a_row():
    assert [pause_s(deaths) for deaths in range(9)] == [0, 0, 0, 2, 4, 8, 16, 32, 60]
    assert pause_s(1000) == 60


def test_loads_that_did_not_end_are_counted_and_one_that_did_forgives_them(tmp_path: Path):
    path = tmp_path / "engine-0.starts"
    assert [Starts(path).begin() for _ in range(4)] == [(0, 0), (1, 0), (2, 0), (3, 2)]
    Starts(path).done()
    assert not path.exists()
    assert Starts(path).begin() == (0, 0)


@pytest.mark.parametrize("text", ["", "x", "-3"])
def test_damaged_account_is_none(tmp_path: Path, text: str):
    (tmp_path / "a").write_text(text)
    assert Starts(tmp_path / "a").begin() == (0, 0)


def test_place_that_cannot_be_written_is_no_obstacle(tmp_path: Path):
    assert Starts(tmp_path / "nowhere" / "a").begin() == (0, 0)


@pytest.mark.parametrize("error", [None, ValueError("a pack is broken")])
async def test_load_that_ends_well_or_not_is_forgiven(tmp_path: Path, error: Exception | None):
    path = tmp_path / "a"
    path.write_text("1")
    backend = StubBackend()
    backend.load_error = error
    settled: list[LoadState] = []
    executor = Executor()
    executor.start()
    await Loading(backend, None, settled.append, Starts(path)).run(executor)
    assert await executor.stop(5)
    assert settled == [LoadState.READY if error is None else LoadState.FAILED]
    assert not path.exists()


async def test_load_that_is_held_back_says_why(tmp_path: Path):
    path = tmp_path / "a"
    path.write_text("5")
    backend = StubBackend()
    loading = Loading(backend, None, lambda state: None, Starts(path))
    task = asyncio.create_task(loading.run(Executor()))
    await asyncio.sleep(0)
    assert loading.message().detail == "ComfyUI's load ended 5 processes in a row; the next try is in 8 s"
    assert loading.state is LoadState.LOADING
    task.cancel()
    loading.stop()
    assert not path.exists(), "a stop is no death"
    await asyncio.gather(task, return_exceptions=True)
