"""Which connections of callers are closed."""

from __future__ import annotations

import pytest

from gateway_shim.connections import Connections
from gateway_shim.routes.own_names import is_own, own_names


class Peer:
    def __init__(self) -> None:
        self.closed = False

    def force_close(self) -> None:
        self.closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_who_says_nothing_for_too_long_is_closed_and_who_is_served_is_not() -> None:
    clock = Clock()
    connections = Connections(idle_s=10, most=100, clock=clock)
    silent, served, back = Peer(), Peer(), Peer()
    everyone = [silent, served, back]
    assert connections.look(everyone) == 0
    with connections.serving(served):
        clock.now = 9.0
        with connections.serving(back):
            pass
        clock.now = 11.0
        assert connections.look(everyone) == 1
        assert (silent.closed, served.closed, back.closed) == (True, False, False)
        clock.now = 20.0
        assert connections.look([served, back]) == 1
        assert back.closed
        assert not served.closed
    clock.now = 29.0
    assert connections.look([served]) == 0, "it waits since its answer"


def test_over_the_most_those_go_that_wait_longest() -> None:
    clock = Clock()
    connections = Connections(idle_s=1000, most=3, clock=clock)
    peers: list[Peer] = []
    for number in range(6):
        clock.now = float(number)
        peers.append(Peer())
        with connections.serving(peers[number]):
            connections.look(peers[number:])
    with connections.serving(peers[0]):
        assert connections.look(peers) == 3
    assert [peer.closed for peer in peers] == [False, True, True, True, False, False]


def test_what_is_gone_is_forgotten() -> None:
    connections = Connections()
    with connections.serving(peer := Peer()):
        connections.look([peer])
        connections.look([])
    connections.look([])
    assert not connections._serving
    assert not connections._waits_since


NAMES = own_names("0.0.0.0", "http://Worker.Example.net:8188/x")


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8188", "a.localhost", "127.0.0.1:1", "[::1]:8188", "10.1.2.3", "[fe80::1%eth0]"),
        *("worker.example.net", "WORKER.example.net.:80"),
    ],
)
def test_own_names(host: str) -> None:
    assert is_own(host, NAMES)


@pytest.mark.parametrize(
    "host",
    ["evil.example:8188", "", "a b", "[::1", "127.0.0.1:1@evil", "localhost.evil.example", "127.0.0.1.nip.io"],
)
def test_strangers_names(host: str) -> None:
    assert not is_own(host, NAMES)
