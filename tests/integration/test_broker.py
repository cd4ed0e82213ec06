"""The broker against plain HTTP clients: each rule of the trickle server, as an orchestrator's would answer."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway_shim.localnet.broker import Broker, BrokerTiming

QUICK = BrokerTiming(keepalive_s=0.02, idle_s=300, sweep_s=60, presence_s=0.02)


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    async with Broker(timing=QUICK) as broker:
        yield broker


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
        yield http


class Upload:
    """A POST whose body is written by hand."""

    def __init__(self, http: aiohttp.ClientSession, url: str, headers: dict[str, str] | None = None) -> None:
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.task = asyncio.create_task(self._run(http, url, headers))

    async def _run(self, http: aiohttp.ClientSession, url: str, headers: dict[str, str] | None) -> Any:
        async with http.post(url, data=self._body(), headers=headers) as response:
            await response.read()
            return response

    async def _body(self) -> AsyncIterator[bytes]:
        yield b""
        while (chunk := await self._chunks.get()) is not None:
            yield chunk

    def write(self, data: bytes) -> None:
        self._chunks.put_nowait(data)

    async def end(self) -> Any:
        self._chunks.put_nowait(None)
        return await self.task

    async def abort(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


async def written(broker: Broker, name: str, seq: int, size: int) -> None:
    def arrived(channel: Any) -> bool:
        segment = channel.segment(seq)
        return segment is not None and segment.size >= size

    await broker.channels[name].wait_for(arrived)


async def fill(http: aiohttp.ClientSession, url: str, count: int, first: int = 0) -> None:
    for seq in range(first, first + count):
        async with http.post(f"{url}/{seq}", data=b"segment %d" % seq) as response:
            assert response.status == 200
            assert response.headers["Lp-Trickle-Seq"] == str(seq)


async def get(http: aiohttp.ClientSession, url: str) -> tuple[int, bytes, Any]:
    async with http.get(url, allow_redirects=False) as response:
        return response.status, await response.read(), response.headers


async def test_bytes_are_relayed_while_the_segment_is_written(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch", "video/MP2T")
    upload = Upload(http, f"{url}/0")
    upload.write(b"one")
    async with http.get(f"{url}/0") as response:
        assert await response.content.readany() == b"one"
        assert response.headers["Content-Type"] == "video/MP2T"
        assert response.headers["Lp-Trickle-Seq"] == "0"
        upload.write(b"two")
        assert await response.content.readany() == b"two"
        answer = await upload.end()
        assert await response.content.read() == b""
    assert answer.status == 200
    assert answer.headers["Lp-Trickle-Seq"] == "0"
    assert "Lp-Trickle-Closed" not in answer.headers


async def test_headers_of_a_pending_get_come_with_the_first_byte(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    pending = asyncio.create_task(get(http, f"{url}/0"))
    await broker.wait_for_reader("ch", 0)
    assert not pending.done()
    await fill(http, url, 1)
    status, body, headers = await pending
    assert (status, body) == (200, b"segment 0")
    assert "Lp-Trickle-Latest" not in headers  # it was the write head when the GET came


@pytest.mark.parametrize(
    ("asked", "served"),
    [(-2, 7), (0, None), (1, None), (2, None), (3, 3), (7, 7), (9, None), (12, None)],
)
async def test_window_of_a_channel_with_eight_segments(
    broker: Broker, http: aiohttp.ClientSession, asked: int, served: int | None
) -> None:
    url = broker.create("ch")
    await fill(http, url, 8)
    status, body, headers = await get(http, f"{url}/{asked}")
    assert headers["Lp-Trickle-Latest"] == "8"
    if served is None:
        assert (status, body.strip(), headers["Lp-Trickle-Seq"]) == (470, b"Entry not found", str(asked))
    else:
        assert (status, body, headers["Lp-Trickle-Seq"]) == (200, b"segment %d" % served, str(served))


@pytest.mark.parametrize("asked", [-1, 8])
async def test_next_segment_is_waited_for(broker: Broker, http: aiohttp.ClientSession, asked: int) -> None:
    url = broker.create("ch")
    await fill(http, url, 8)
    pending = asyncio.create_task(get(http, f"{url}/{asked}"))
    await broker.wait_for_reader("ch", 8)
    await fill(http, url, 1, first=8)
    assert (await pending)[1] == b"segment 8"


@pytest.mark.parametrize("asked", [-2, -1, 0, 1])
async def test_fresh_channel_lets_readers_wait_for_its_first_two_segments(
    broker: Broker, http: aiohttp.ClientSession, asked: int
) -> None:
    url = broker.create("ch")
    pending = asyncio.create_task(get(http, f"{url}/{asked}"))
    await broker.wait_for_reader("ch", max(asked, 0))
    await fill(http, url, 2)
    assert (await pending)[1] == b"segment %d" % max(asked, 0)


async def test_fresh_channel_has_no_third_segment(broker: Broker, http: aiohttp.ClientSession) -> None:
    assert (await get(http, broker.create("ch") + "/2"))[0] == 470


async def test_next_names_the_write_head(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    await fill(http, url, 3)
    status, body, headers = await get(http, f"{url}/next")
    assert (status, body, headers["Lp-Trickle-Latest"]) == (200, b"3", "3")


async def test_write_head_moves_with_the_first_byte(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    upload = Upload(http, f"{url}/0")
    await broker.wait_for_writer("ch", 0)
    assert (await get(http, f"{url}/next"))[1] == b"0"
    upload.write(b"x")
    await written(broker, "ch", 0, 1)
    assert (await get(http, f"{url}/next"))[1] == b"1"
    await upload.end()


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "none/0", 404, "Stream not found"),
        ("GET", "none/next", 404, "Stream not found"),
        ("POST", "none/0", 404, "Stream not found"),
        ("POST", "none", 404, "Stream not found"),
        ("POST", "ch", 200, ""),
        ("DELETE", "none", 400, "Invalid stream"),
        ("DELETE", "none/0", 404, "Stream not found"),
        ("DELETE", "ch/3", 400, "Nonexistent segment"),
        ("GET", "ch/abc", 400, "Invalid idx"),
        ("POST", "ch/abc", 400, "Invalid idx"),
        ("POST", "ch/next", 400, "Invalid idx"),
        ("GET", "ch/1_0", 400, "Invalid idx"),
        ("GET", "ch/", 404, "404 page not found"),
        ("PUT", "ch/0", 405, ""),
        ("GET", "ch", 405, ""),
        ("GET", "ch//0", 307, ""),
    ],
)
async def test_plain_answers(
    broker: Broker, http: aiohttp.ClientSession, method: str, path: str, status: int, text: str
) -> None:
    broker.create("ch")
    async with http.request(method, f"{broker.url}/{path}", allow_redirects=False) as response:
        assert (response.status, (await response.text()).strip()) == (status, text)
        assert ("Allow" in response.headers) == (status == 405)
        if status == 307:
            assert response.headers["Location"] == "/ai/trickle/ch/0"
        if (method, path) == ("POST", "none/0"):
            assert response.headers["Connection"] == "close"


@pytest.mark.parametrize(("method", "seq"), [("GET", -3), ("GET", -9), ("POST", -2), ("POST", -3)])
async def test_connection_drops_for_an_index_below_the_lowest(
    broker: Broker, http: aiohttp.ClientSession, method: str, seq: int
) -> None:
    url = broker.create("ch")
    with pytest.raises(aiohttp.ClientConnectionError):
        await http.request(method, f"{url}/{seq}", data=b"x" if method == "POST" else None)


async def test_post_minus_one_writes_at_the_head(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    await fill(http, url, 3)
    async with http.post(f"{url}/-1", data=b"head") as response:
        assert response.headers["Lp-Trickle-Seq"] == "3"
    assert (await get(http, f"{url}/3"))[1] == b"head"


async def test_empty_post_is_an_empty_segment(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    async with http.post(f"{url}/0") as response:
        assert response.status == 200
    status, body, headers = await get(http, f"{url}/0")
    assert (status, body, headers["Content-Length"]) == (200, b"", "0")
    assert (headers["Lp-Trickle-Seq"], headers["Lp-Trickle-Latest"]) == ("0", "1")
    assert "Lp-Trickle-Closed" not in headers


async def test_channel_deleted_during_a_pending_get(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    pending = asyncio.create_task(get(http, f"{url}/0"))
    await broker.wait_for_reader("ch", 0)
    async with http.delete(url) as response:
        assert response.status == 200
    status, body, headers = await pending
    assert (status, body, headers["Lp-Trickle-Closed"]) == (200, b"", "terminated")
    assert (await get(http, f"{url}/0"))[0] == 404


async def test_channel_deleted_while_a_post_is_idle(broker: Broker, http: aiohttp.ClientSession) -> None:
    upload = Upload(http, broker.create("ch") + "/0")
    await broker.wait_for_writer("ch", 0)
    await broker.delete("ch")
    answer = await upload.task  # before the end of its body
    assert answer.status == 200
    assert answer.headers["Lp-Trickle-Closed"] == "terminated"
    assert answer.headers["Connection"] == "close"


async def test_channel_deleted_while_a_post_has_begun(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    channel = broker.channels["ch"]
    upload = Upload(http, f"{url}/0")
    upload.write(b"one")
    reader = asyncio.create_task(get(http, f"{url}/0"))
    await written(broker, "ch", 0, 3)
    await broker.wait_for_reader("ch", 0)
    await broker.delete("ch")
    assert (await reader)[1] == b"one"
    upload.write(b"two")
    answer = await upload.end()
    assert answer.status == 200
    assert "Lp-Trickle-Closed" not in answer.headers
    assert channel.counters.discarded_bytes == 3
    async with http.post(f"{url}/1", data=b"x") as response:
        assert response.status == 404


async def test_deleted_segment_releases_readers_and_an_idle_post(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    upload = Upload(http, f"{url}/0")
    reader = asyncio.create_task(get(http, f"{url}/0"))
    await broker.wait_for_writer("ch", 0)
    await broker.wait_for_reader("ch", 0)
    async with http.delete(f"{url}/0") as response:
        assert response.status == 200
    answer = await upload.task
    assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert "Lp-Trickle-Closed" not in answer.headers
    assert (await reader)[:2] == (200, b"")
    assert broker.channels["ch"].next_write == 1


async def test_idle_post_is_answered_when_its_slot_is_taken(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    upload = Upload(http, f"{url}/1")
    await broker.wait_for_writer("ch", 1)
    taker = Upload(http, f"{url}/6")
    answer = await upload.task
    assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert broker.channels["ch"].next_write == 2
    await taker.end()


async def test_post_to_a_finished_segment_is_discarded_and_rewinds(
    broker: Broker, http: aiohttp.ClientSession
) -> None:
    url = broker.create("ch")
    await fill(http, url, 4)
    async with http.post(f"{url}/1", data=b"again") as response:
        assert (response.status, response.headers["Connection"]) == (200, "close")
    assert broker.channels["ch"].next_write == 2
    assert broker.channels["ch"].counters.refused_posts == 1
    assert (await get(http, f"{url}/1"))[1] == b"segment 1"


async def test_two_posts_to_one_segment_interleave(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    first, second = Upload(http, f"{url}/0"), Upload(http, f"{url}/0")
    first.write(b"a")
    await written(broker, "ch", 0, 1)
    second.write(b"b")
    await written(broker, "ch", 0, 2)
    first.write(b"c")
    await written(broker, "ch", 0, 3)
    await first.end()
    assert (await get(http, f"{url}/0"))[1] == b"abc"
    second.write(b"d")
    assert (await second.end()).status == 200
    assert (await get(http, f"{url}/0"))[1] == b"abc"


async def abandon(broker: Broker, http: aiohttp.ClientSession, url: str) -> None:
    upload = Upload(http, f"{url}/0")
    upload.write(b"half")
    await written(broker, "ch", 0, 4)
    await upload.abort()
    await broker.channels["ch"].wait_for(lambda channel: channel.counters.aborted_posts == 1)


@pytest.mark.parametrize("release", ["delete", "slot", "reset", "close"])
async def test_aborted_segment_stays_open_until_somebody_ends_it(
    broker: Broker, http: aiohttp.ClientSession, release: str
) -> None:
    url = broker.create("ch")
    await abandon(broker, http, url)
    segment = broker.channels["ch"].segment(0)
    assert segment is not None
    reader = asyncio.create_task(get(http, f"{url}/0"))
    await broker.wait_for_reader("ch", 0)
    await fill(http, url, 2, first=1)
    assert not segment.closed
    if release == "delete":
        await (await http.delete(f"{url}/0")).read()
    elif release == "slot":
        await fill(http, url, 3, first=3)
    elif release == "reset":
        await (await http.post(f"{url}/3", data=b"x", headers={"Lp-Trickle-Reset": "1"})).read()
    else:
        await broker.delete("ch")
    assert (await reader)[1] == b"half"
    assert segment.closed


async def test_abort_before_the_first_byte_leaves_no_trace(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    upload = Upload(http, f"{url}/0")
    await broker.wait_for_writer("ch", 0)
    await upload.abort()
    await broker.channels["ch"].wait_for(lambda channel: channel.at_work("POST", 0) == 0)
    assert broker.channels["ch"].next_write == 0
    await fill(http, url, 1)
    assert (await get(http, f"{url}/0"))[1] == b"segment 0"


async def test_reset_leaves_later_segments_open(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    ahead = Upload(http, f"{url}/4")
    await broker.wait_for_writer("ch", 4)
    await (await http.post(f"{url}/3", data=b"x", headers={"Lp-Trickle-Reset": "1"})).read()
    ahead.write(b"later")
    await ahead.end()
    assert (await get(http, f"{url}/4"))[1] == b"later"


async def test_idle_post_gets_100_continue_again_and_again(broker: Broker) -> None:
    broker.create("ch")
    host, port = broker.origin.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /ai/trickle/ch/0 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(3):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"3\r\nabc\r\n")
    await written(broker, "ch", 0, 3)
    writer.write(b"0\r\n\r\n")
    while b" 100 " in (head := await reader.readuntil(b"\r\n\r\n")):
        pass
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Lp-Trickle-Seq: 0\r\n" in head
    writer.close()
    await writer.wait_closed()


async def test_idle_channels_are_swept_but_not_internal_ones(http: aiohttp.ClientSession) -> None:
    timing = BrokerTiming(idle_s=0.05, sweep_s=0.01, presence_s=0.01)
    async with Broker(timing=timing) as broker:
        url = broker.create("ch")
        broker.create("_changes")
        _, _, headers = await get(http, f"{url}/0")
        assert headers["Lp-Trickle-Closed"] == "terminated"
        assert list(broker.channels) == ["_changes"]


async def test_auto_create_takes_the_mime_type_from_the_request(http: aiohttp.ClientSession) -> None:
    async with Broker(auto_create=True) as broker:
        async with http.post(f"{broker.url}/a", headers={"Expect-Content": "video/MP2T"}) as response:
            assert response.status == 200
        async with http.post(
            f"{broker.url}/b/0", data=b"{}", headers={"Content-Type": "application/json"}
        ) as response:
            assert response.status == 200
        assert {name: channel.mime for name, channel in broker.channels.items()} == {
            "a": "video/MP2T",
            "b": "application/json",
        }


async def test_reader_that_hangs_up_is_noticed(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    pending = asyncio.create_task(get(http, f"{url}/0"))
    await broker.wait_for_reader("ch", 0)
    pending.cancel()
    await broker.channels["ch"].wait_for(lambda channel: channel.at_work("GET", 0) == 0)


async def test_served_within_another_application(http: aiohttp.ClientSession) -> None:
    broker = Broker()
    app = web.Application()
    broker.add_to(app)
    runner = web.AppRunner(app, shutdown_timeout=5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    broker.origin = f"http://{host}:{port}"
    url = broker.create("ch")
    await fill(http, url, 1)
    pending = asyncio.create_task(get(http, f"{url}/1"))
    await broker.wait_for_reader("ch", 1)
    await runner.cleanup()
    assert (await pending)[2]["Lp-Trickle-Closed"] == "terminated"


async def test_restart_drops_connections_and_forgets_channels(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    reader = asyncio.create_task(get(http, f"{url}/0"))
    upload = Upload(http, f"{url}/0")
    await broker.wait_for_reader("ch", 0)
    await broker.wait_for_writer("ch", 0)
    await broker.restart()
    done = await asyncio.gather(reader, upload.task, return_exceptions=True)
    # aiohttp repeats a GET over a pooled connection by itself: it may have met the 404 already.
    assert all(isinstance(one, aiohttp.ClientError) or one[0] == 404 for one in done)
    assert (await get(http, f"{url}/0"))[0] == 404


async def test_restart_with_memory_drops_connections_and_keeps_segments(
    broker: Broker, http: aiohttp.ClientSession
) -> None:
    url = broker.create("ch")
    async with http.post(f"{url}/0", data=b"kept"):
        pass
    upload = Upload(http, f"{url}/1")
    await broker.wait_for_writer("ch", 1)
    await broker.restart(memory=True)
    assert isinstance((await asyncio.gather(upload.task, return_exceptions=True))[0], aiohttp.ClientError)
    assert (await get(http, f"{url}/0"))[1] == b"kept"


async def test_limit_holds_for_its_time_and_not_beyond(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    async with http.post(f"{url}/0", data=bytes(14_000)):
        pass
    clock = asyncio.get_running_loop().time
    broker.faults.limit("GET", "ch", bytes_per_s=28_000, seconds=30)
    for _ in range(2):
        began = clock()
        assert len((await get(http, f"{url}/0"))[1]) == 14_000
        assert clock() - began >= 0.5, "ten packets of 1400 bytes, a twentieth of a second each"
    broker.faults.clear()
    fault = broker.faults.limit("GET", "ch", bytes_per_s=1, seconds=0)
    assert len((await get(http, f"{url}/0"))[1]) == 14_000
    assert not fault.taken.is_set(), "it was over"


async def test_reset_fault_cuts_a_get_after_so_many_bytes(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    await fill(http, url, 1)
    broker.faults.reset("GET", "ch", 0, after_bytes=4)
    async with http.get(f"{url}/0") as response:
        assert await response.content.readexactly(4) == b"segm"
        with pytest.raises(aiohttp.ClientError):
            await response.content.read()
    assert (await get(http, f"{url}/0"))[1] == b"segment 0"


async def test_reset_fault_cuts_a_post_and_leaves_the_segment_open(
    broker: Broker, http: aiohttp.ClientSession
) -> None:
    url = broker.create("ch")
    broker.faults.reset("POST", "ch", after_bytes=2)
    with pytest.raises(aiohttp.ClientError):
        await http.post(f"{url}/0", data=b"abcdef")
    segment = broker.channels["ch"].segment(0)
    assert segment is not None
    assert (segment.data, segment.closed) == (b"ab", False)


async def test_stall_fault_holds_a_get_until_released(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    await fill(http, url, 1)
    fault = broker.faults.stall("GET", "ch", after_bytes=3)
    async with http.get(f"{url}/0") as response:
        assert await response.content.readexactly(3) == b"seg"
        await fault.taken.wait()
        fault.release()
        assert await response.content.read() == b"ment 0"


async def test_corrupt_fault_inverts_bytes_for_one_reader(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    await fill(http, url, 1)
    broker.faults.corrupt("GET", "ch", after_bytes=2, length=3)
    assert (await get(http, f"{url}/0"))[1] == b"se" + bytes(byte ^ 255 for byte in b"gme") + b"nt 0"
    assert (await get(http, f"{url}/0"))[1] == b"segment 0"


async def test_answer_fault_answers_once(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    broker.faults.answer("POST", "ch", status=503)
    async with http.post(f"{url}/0", data=b"x") as response:
        assert response.status == 503
    await fill(http, url, 1)


async def test_segment_that_was_pushed_out_is_said_to_be_lost(broker: Broker, http: aiohttp.ClientSession) -> None:
    url = broker.create("ch")
    await fill(http, url, 6)
    assert (await broker.wait_for_segment("ch", 5)).data == b"segment 5"
    with pytest.raises(LookupError):
        await broker.wait_for_segment("ch", 0)
