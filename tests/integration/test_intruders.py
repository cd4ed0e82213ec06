"""Callers that nobody wants: pages of other sites, half requests, bodies that do not come."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from gateway_shim.routes import context
from tests.fakes.network import Network, network


async def call(net: Network, head: str, body: bytes = b"", *, hang_up: bool = False) -> bytes:
    """The answer to a request as it stands here; nothing where the caller hangs up."""
    port = int(net.shim.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    await writer.drain()
    if hang_up:
        writer.transport.abort()
        return b""
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


GET = "GET /stream/status HTTP/1.1\nConnection: close\n"
STOP = "POST /stream/stop HTTP/1.1\nConnection: close\nContent-Length: 0\n"


@pytest.mark.parametrize(
    "headers",
    [
        "Host: evil.example:8188\nOrigin: http://evil.example:8188\n",  # its name leads here
        "Host: evil.example:8188\n",
        "Host: 127.0.0.1\nOrigin: http://[::1\n",
        "Host: 127.0.0.1\nOrigin: null\n",
        "Host: 127.0.0.1:8188@evil\n",
        "Host: [::1\n",
    ],
)
async def test_a_page_that_got_here_by_a_name_of_its_own_is_refused(tmp_path: Path, headers: str) -> None:
    async with network(tmp_path) as net:
        await net.start()
        for request in (GET, STOP):
            answer = await call(net, request + headers)
            assert answer.startswith(b"HTTP/1.1 403"), answer
        assert list(net.shim.streams.active) == ["cam"]


async def test_with_a_token_or_its_own_name_a_worker_may_be_called_anything(tmp_path: Path) -> None:
    async with network(tmp_path, auth_token="secret") as net:
        answer = await call(net, GET + "Host: any.name\nAuthorization: Bearer secret\n")
        assert answer.startswith(b"HTTP/1.1 200"), answer
    async with network(tmp_path, capability_url="http://my.name:8188") as net:
        assert (await call(net, GET + "Host: my.name:8188\n")).startswith(b"HTTP/1.1 200")
        assert (await call(net, GET + "Host: my.name:1\nOrigin: http://my.name:1\n")).startswith(b"HTTP/1.1 200")


async def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "BODY_S", 0.2)
    async with network(tmp_path) as net:
        head = "POST /stream/params HTTP/1.1\nHost: localhost\nContent-Length: 100\n"
        answer = await call(net, head, b'{"half":')
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert b"Connection: close" in answer
        assert b"body_too_slow" in answer


async def test_an_answer_that_ends_the_connection_says_so(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        head = "POST /stream/params HTTP/1.1\nHost: localhost\nContent-Encoding: gzip\nContent-Length: 4\n"
        answer = await call(net, head, b"{}{}")
        assert answer.startswith(b"HTTP/1.1 400"), answer
        assert b"Connection: close" in answer


async def test_a_caller_that_hangs_up_is_no_incident(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with network(tmp_path) as net:
        for _ in range(5):
            await call(net, "POST /stream/params HTTP/1.1\nHost: localhost\nContent-Length: 9\n", b"{", hang_up=True)
        assert (await net.get("/health"))["status"] == "IDLE"
    assert "incident" not in caplog.text


async def test_a_size_that_the_engine_has_not_is_refused_at_the_start(tmp_path: Path) -> None:
    async with network(tmp_path) as net:
        body = {"gateway_request_id": "big", "publish_url": net.broker.create("big", "video/MP2T")}
        status, answer = await net.post("/stream/start", {**body, "params": {"width": 8192, "height": 4096}})
        assert (status, answer["errors"]) == (
            422,
            [{"path": "params.width", "message": "is 8192", "allowed": "at most 4096"}],
        )
        assert not net.shim.streams.active
