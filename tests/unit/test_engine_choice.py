"""Which engine a stream goes to; the choice looks at nothing but what the clients know."""

from __future__ import annotations

import pytest

from gateway_shim.engine_choice import pick
from gateway_shim.engine_client import SERVED_STREAMS, EngineClient, EngineState
from proto import engine_pb2 as pb


def engine(
    name: str = "e", *, sessions: int = 0, busy: float = 0.0, free: int = 0, gpu: float = 0.0, room: int = 8
) -> EngineClient:
    client = EngineClient(f"unix:/{name}")
    client.state = EngineState.READY
    client.sessions = client._sessions_then = sessions
    device = pb.Device(memory_free_bytes=free, utilization_compute=gpu)
    client.info = pb.ServerInfo(sessions=sessions, busy=busy, device=device, limits=pb.Limits(max_sessions=room))
    return client


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"sessions": 1}, {"sessions": 2}),
        ({"sessions": 3, "busy": 0.5}, {"sessions": 1, "busy": 0.95}),
        ({"sessions": 3, "busy": 0.5}, {"sessions": 1, "gpu": 97.0}),
        ({"sessions": 5, "busy": 0.95}, {"sessions": 2, "room": 2}),
        ({"busy": 0.1}, {"busy": 0.4}),
        ({"free": 20 << 30}, {"free": 10 << 30}),
    ],
)
def test_where_there_is_most_room(better: dict[str, float], worse: dict[str, float]) -> None:
    good, bad = engine(**better), engine(**worse)  # type: ignore[arg-type]
    assert pick([good, bad]) is pick([bad, good]) is good


@pytest.mark.parametrize("state", [state for state in EngineState if state is not EngineState.READY])
def test_none_but_ready_ones(state: EngineState) -> None:
    away = engine()
    away.state = state
    assert pick([away]) is None
    busy = engine(sessions=7, busy=1.0)
    assert pick([away, busy]) is busy


def test_sessions_of_other_clients_count() -> None:
    mine, theirs = engine(sessions=1), engine()
    assert theirs.info is not None
    theirs.info.sessions = 2
    assert theirs.all_sessions == 2
    assert pick([theirs, mine]) is mine
    theirs.sessions += 1  # not known there yet
    assert theirs.all_sessions == 3
    mine.sessions = 0  # nor this
    assert mine.all_sessions == 0


async def test_stream_that_comes_back_goes_where_it_was() -> None:
    home, other = engine("home", sessions=3), engine("other")
    assert pick([home, other], "cam") is other
    home._remember("cam")
    assert pick([home, other], "cam") is home
    assert pick([home, other], "another") is other
    assert pick([home, other], "cam", avoid={home}) is other
    assert home.info is not None
    home.info.busy = 0.9
    assert pick([home, other], "cam") is other
    home.info.busy, home.sessions = 0.0, 8
    assert pick([home, other], "cam") is other
    home.sessions, home.state = 3, EngineState.DEAD
    assert pick([home, other], "cam") is other


def test_the_latest_place_counts() -> None:
    first, second = engine("first"), engine("second", sessions=1)
    first._served["cam"], second._served["cam"] = 1.0, 2.0
    assert pick([first, second], "cam") is second


async def test_memory_of_streams_is_bounded() -> None:
    client = engine()
    for number in range(SERVED_STREAMS + 5):
        client._remember("kept")
        client._remember(str(number))
    assert len(client._served) == SERVED_STREAMS
    assert client.served_at("kept")
    assert not client.served_at("0")
