"""The journal: what a killed shim leaves is read whole or not at all, and is nobody else's."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_shim.errors import NotReady
from gateway_shim.params import StartRequest
from gateway_shim.stream import keeper as keeper_module
from gateway_shim.stream.journal import FOLDER, Facts, Journal, Kept, Position, Shape
from gateway_shim.stream.keeper import Keeper
from gateway_shim.stream.manager import Streams
from gateway_shim.stream.resume import MAX_RESUMES, why_not
from gateway_shim.stream.session import StreamSettings

FACTS = Facts(
    StartRequest("cam", publish_url="http://o/ai/trickle/cam-out", aliases=("kamera",), params={"width": 64}),
    {"1": {"class_type": "LoadTensor", "inputs": {"seed": 2**63}}},
    7,
    Shape(64, 48, True, "bt709", True),
    (1.5,),
)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    opened = Journal.open(tmp_path)
    assert opened is not None
    return opened


def test_what_was_written_is_read(journal: Journal, tmp_path: Path) -> None:
    position = Position(123.5, 9 << 33, 2**34, -90_000, 12, 3)
    record = journal.record("cam")
    record.write(FACTS)
    record.reached(position._replace(pts=1 << 60))
    record.reached(position)  # the shorter text leaves nothing of the longer one
    (kept,) = journal.read()
    assert (kept.facts, kept.position) == (FACTS, position)
    record.remove()
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["lock"]


def test_files_are_their_users_alone(journal: Journal, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        record = journal.record("../../elsewhere")
        record.write(FACTS)
        record.reached(Position(1.0))
    finally:
        os.umask(before)
    paths = list((tmp_path / FOLDER).iterdir())
    assert len(paths) == 3, "an id chooses no path"
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert stat.S_IMODE((tmp_path / FOLDER).stat().st_mode) & 0o022 == 0


def test_workflow_is_kept_once_and_large_parameters_not_at_all(journal: Journal) -> None:
    workflow = {"1": {"class_type": "X", "inputs": {"text": "y" * 200_000}}}
    request = replace(FACTS.request, workflow=workflow, params={"prompts": workflow})
    journal.record("cam").write(replace(FACTS, request=request, prompt=workflow))
    (kept,) = journal.read()
    assert kept.facts.prompt == workflow
    assert kept.facts.request == replace(request, workflow=None, params={})


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "[]",
            "null",
            '{"format": 1}',
            '{"format": 2}',
            "9" * 5000,
            '{"format":1,"request":{"aliases":[]}}',
        ),
        "[" * 5000,
        '{"format":1,"request":{"stream_id":"bad","publish_url":"http://o","aliases":[]},"prompt":{},"version":1e999}',
        '{"format":1,"request":{"stream_id":5,"publish_url":"http://o","aliases":[]},"prompt":{},"version":1,'
        '"shape":null,"resumed_at":[]}',
    ],
)
def test_what_cannot_be_read_is_removed_and_the_rest_is_not(journal: Journal, tmp_path: Path, text: str) -> None:
    journal.record("cam").write(FACTS)
    folder = tmp_path / FOLDER
    for name in ("bad.json", "bad.pos", "orphan.pos", "half.part"):
        (folder / name).write_text(text)
    (kept,) = journal.read()
    assert kept.facts == FACTS
    assert len(list(folder.iterdir())) == 2, "the record and the lock"


def test_stream_that_ends_while_it_is_written_stays_forgotten(journal: Journal, tmp_path: Path) -> None:
    record = journal.record("cam")

    class End:
        def __str__(self) -> str:
            record.remove()
            return "over"

    record.write(replace(FACTS, prompt={"1": End()}))
    record.write(FACTS)
    assert journal.read() == []
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", "{", "[1]", "5", "null", '"at"', "{}", "[" * 5000, "\0" * 256),
        *('{"at": "x"}', '{"nobody": 1}', '{"at": 1, "nobody": 1}', '{"at": null}', '{"at": [1]}'),
        *('{"at": NaN}', '{"at": -Infinity}', '{"at": 1' + "0" * 400 + "}"),
        *('{"at": 1, "pts": "2"}', '{"at": 1, "pts": 2.5}', '{"at": 1, "source": [2]}', '{"at": 1, "offset": null}'),
        *('{"at": 1, "input_seq": NaN}', '{"at": 1, "control_seq": true}'),
    ],
)
def test_without_a_position_the_stream_is_as_old_as_its_record(
    journal: Journal, tmp_path: Path, text: str | None
) -> None:
    journal.record("cam").write(FACTS)
    (path,) = (tmp_path / FOLDER).glob("*.json")
    os.utime(path, (1000, 1000))
    if text is not None:
        path.with_suffix(".pos").write_text(text)
    (kept,) = journal.read()
    assert kept.position == Position(1000)


async def test_record_that_makes_no_stream_is_handed_over_and_the_others_go_on(
    journal: Journal, tmp_path: Path
) -> None:
    """The policies of another version, for one."""
    requests = [
        StartRequest("strange", control_url="http://localhost:9/c", fallback="by magic"),
        StartRequest("stranger", control_url="http://localhost:9/c", latency_budget_ms="soon"),  # type: ignore[arg-type]
        StartRequest("good", control_url="http://localhost:9/c"),
    ]
    for request in requests:
        record = journal.record(request.stream_id)
        record.write(replace(FACTS, request=request))
        record.reached(Position(time.time()))
    async with Streams([], capacity=3, settings=StreamSettings(), journal=journal) as streams:
        streams.take_up(journal.read(), 20.0)
        assert list(streams.active) == ["good"]
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["lock"]


async def test_stream_is_known_to_be_taken_up_before_it_does_anything(journal: Journal) -> None:
    """One that kills its shim with the first byte would be taken up for ever."""
    known: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def first(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not known.done():
            (kept,) = journal.read()
            known.set_result(len(kept.facts.resumed_at))
        writer.close()

    broker = await asyncio.start_server(first, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{broker.sockets[0].getsockname()[1]}/cam"
    silent_since = time.time() - 5
    record = journal.record("cam")
    record.write(replace(FACTS, request=StartRequest("cam", subscribe_url=url, publish_url=url + "-out")))
    record.reached(Position(silent_since))
    (kept,) = journal.read()
    async with broker, Streams([], capacity=1, settings=StreamSettings(), journal=journal) as streams:
        streams.take_up([kept], 20.0)
        assert await known == len(FACTS.resumed_at) + 1


async def test_stream_whose_record_cannot_be_written_has_no_successor(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not counted, it could be taken up for ever; and the disk may take the next write."""
    record = journal.record("cam")
    record.write(FACTS)
    record.reached(Position(time.time()))
    (kept,) = journal.read()
    keeper = Keeper(kept.facts.request, kept.record, kept)
    keeper.parameters = SimpleNamespace(prompt={}, version=1)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        await keeper.taken_up()
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["lock"]


async def test_update_that_could_not_be_written_is_written_later(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "WRITE_AGAIN_S", 0.01)
    keeper = Keeper(FACTS.request, journal.record("cam"), None)
    keeper.parameters = SimpleNamespace(prompt={}, version=1)
    failing = [True]
    real = os.open

    def at_first_full(*arguments: Any) -> int:
        if failing[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "open", at_first_full)
    await keeper.keep()
    assert journal.read() == []
    failing[0] = False
    keeping = asyncio.create_task(keeper.run())
    async with asyncio.timeout(10):
        while not journal.read():  # noqa: ASYNC110  a file
            await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_stream_waits_for_the_end_of_its_own_hand_over(journal: Journal) -> None:
    """Whose last act is to remove the record: of the new stream, if that were there already."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await answer.wait()
        writer.close()

    broker = await asyncio.start_server(slow, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{broker.sockets[0].getsockname()[1]}/cam-out"
    request = StartRequest("cam", publish_url=url)
    record = journal.record("cam")
    record.write(replace(FACTS, request=request))
    record.reached(Position(time.time() - 100))
    async with broker, Streams([], capacity=1, settings=StreamSettings(), journal=journal) as streams:
        streams.take_up(journal.read(), 20.0)
        await asked.wait()
        starting = asyncio.create_task(streams.start(request))
        await asyncio.sleep(0.05)
        assert not starting.done()
        answer.set()
        with pytest.raises(NotReady):
            await starting
    assert journal.read() == []


def test_journal_belongs_to_one_shim(journal: Journal, tmp_path: Path) -> None:
    assert Journal.open(tmp_path) is None
    journal.close()
    again = Journal.open(tmp_path)
    assert again is not None
    again.close()


def test_disk_that_takes_nothing_costs_one_line(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = journal.record("cam")
    (tmp_path / FOLDER).rename(tmp_path / "gone")
    for _ in range(10):
        record.write(FACTS)
        record.reached(Position(1.0))
    record.remove()
    assert len(caplog.records) == 1


def kept_of(silent_s: float, *resumed_before_s: float) -> Kept:
    now = time.time()
    facts = replace(FACTS, resumed_at=tuple(now - before_s for before_s in resumed_before_s))
    return Kept(facts, Position(now - silent_s), None)  # type: ignore[arg-type]  # nothing is written here


def test_what_goes_on_and_what_is_handed_over() -> None:
    assert why_not(kept_of(5), 20) is None
    assert "silence" in str(why_not(kept_of(21), 20))
    assert "silence" in str(why_not(kept_of(0), 0)), "0: always handed over"
    assert why_not(kept_of(-3600), 20) is None, "a clock that was set back"
    assert "resumed" in str(why_not(kept_of(1, *range(MAX_RESUMES)), 20))
    assert why_not(kept_of(1, *range(500, 500 + MAX_RESUMES)), 20) is None, "long ago"
