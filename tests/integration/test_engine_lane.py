"""Shared memory between a client and the engine: the same pictures as in messages, and nothing that a client says is
believed."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import av
import pytest

from engine.lane import MAX_BYTES, Lane
from engine.wire import VideoFormat
from gateway_shim.engine_client import EngineClient
from gateway_shim.engine_lane import REPLY_SLOTS, REQUEST_SLOTS, EngineLane
from gateway_shim.media.planes import frame_of, planes_of, rows_of
from proto import engine_pb2 as pb
from proto.frames import Frame
from proto.results import Results
from proto.ring import Ring, RingRefused, slot_bytes
from tests.fakes.engine_backend import StubBackend, workflow
from tests.fakes.engine_client import Process, connected, eventually, grey, running_engine, settings_for
from tests.fakes.rings import rings

WIDTH, HEIGHT = 64, 48
VIDEO = pb.VideoFormat(width=WIDTH, height=HEIGHT)


def frame(level: int) -> bytes:
    return grey(WIDTH, HEIGHT, level)


@pytest.fixture
def lane() -> Iterator[EngineLane]:
    made = EngineLane(WIDTH, HEIGHT)
    yield made
    made.close()


def slots_of(process: Process) -> list[int]:
    return [process.results[number].picture.slot for number in process.order]


async def put(process: Process, lane: EngineLane, number: int, level: int) -> None:
    slot = lane.put(number, rows_of(frame_of(frame(level), WIDTH, HEIGHT)))
    await process.frames([pb.Frame(frame_id=number, pts=number, slot=slot)])


async def test_pictures_come_back_in_slots(tmp_path: Path, lane: EngineLane) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, StubBackend()), connected(settings.address) as client:
        for text, expected in (("", 30), (workflow(9), 9)):
            process = await client.open(workflow_json=text, video=VIDEO, shared_memory=lane.offer())
            assert process.opened is not None
            assert process.opened.shared_memory
            await put(process, lane, 1, 30)
            picture = (await process.result(1)).picture
            assert (picture.planes, picture.width, picture.height) == (b"", WIDTH, HEIGHT)
            assert lane._replies.view(picture.slot, len(frame(0)))[0] == expected
            lane.answered(1)
            await process.end_input()
            await process.to_end()


async def pictures(
    responses: AsyncIterator[pb.ProcessResponse | Results], count: int
) -> AsyncIterator[tuple[int, int, av.VideoFrame]]:
    """The next ones with their frame's id and the slot they came in; what is yielded alone holds that."""
    while count:
        response = await anext(responses)
        for result in response.results if isinstance(response, Results) else ():
            picture = result.picture
            assert picture is not None
            assert not isinstance(picture.planes, tuple)
            shown = frame_of(picture.planes, picture.width, picture.height)
            picture.planes = b""
            count -= 1
            yield result.frame_id, picture.slot, shown


async def test_many_pictures_through_the_shim_s_own_client(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    for share in (True, False):
        async with running_engine(settings), EngineClient(settings.address, share_memory=share) as client:
            await client.ready()
            async with client.open(pb.OpenSession(video=VIDEO, max_batch=4)) as session:
                assert session.lane == ("shared_memory" if share else "bytes")
                responses = session.responses()
                for number in range(0, 400, 4):
                    sent = [frame_of(frame((number + k) % 251), WIDTH, HEIGHT) for k in range(4)]
                    frames = [Frame(number + k, number + k) for k in range(4)]
                    await session.send(
                        [session.load(one, rows_of(each)) for one, each in zip(frames, sent, strict=True)]
                    )
                    async for frame_id, slot, last in pictures(responses, 4):
                        assert bool(slot) == share
                        assert planes_of(last) == frame(frame_id % 251)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda offer: offer.MergeFrom(pb.SharedMemory(version=2)),
        lambda offer: offer.MergeFrom(pb.SharedMemory(nonce=bytes(16))),
        lambda offer: offer.MergeFrom(pb.SharedMemory(nonce=b"x")),
        lambda offer: offer.MergeFrom(pb.SharedMemory(owner_pid=1)),
        lambda offer: offer.MergeFrom(pb.SharedMemory(owner_pid=2**63)),
        lambda offer: offer.MergeFrom(pb.SharedMemory(request_fd=-1)),
        lambda offer: offer.MergeFrom(pb.SharedMemory(request_fd=1)),
        lambda offer: offer.MergeFrom(pb.SharedMemory(response_fd=1 << 20)),
        lambda offer: setattr(offer, "request_slots", 0),
        lambda offer: setattr(offer, "response_slots", 0),
        lambda offer: setattr(offer, "slot_bytes", 0),
        lambda offer: setattr(offer, "request_fd", 0),
        lambda offer: offer.MergeFrom(pb.SharedMemory(request_slots=2**31)),
        lambda offer: offer.MergeFrom(pb.SharedMemory(request_slots=2**32 - 1)),
        lambda offer: offer.MergeFrom(pb.SharedMemory(response_slots=1)),
        lambda offer: offer.MergeFrom(pb.SharedMemory(slot_bytes=2**63)),
        lambda offer: offer.MergeFrom(pb.SharedMemory(slot_bytes=4096)),
        lambda offer: offer.Clear(),
    ],
)
async def test_wrong_offers_leave_the_session_with_messages(
    tmp_path: Path, lane: EngineLane, spoil: Callable[[pb.SharedMemory], None]
) -> None:
    settings = settings_for(tmp_path)
    offer = lane.offer()
    spoil(offer)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(video=VIDEO, shared_memory=offer)
        assert process.opened is not None
        assert not process.opened.shared_memory
        await process.frame(1, frame(5))
        assert (await process.result(1)).picture.planes == frame(5)
        await process.frames([pb.Frame(frame_id=2, slot=1)])
        assert (await process.result(2)).failed.code == "bad_frame"


async def test_wrong_slots_fail_their_frame_and_the_session_goes_on(tmp_path: Path, lane: EngineLane) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(7), video=VIDEO, shared_memory=lane.offer(), max_batch=8)
        backend.gate.clear()
        await process.frames(
            [
                pb.Frame(frame_id=1, slot=1),
                pb.Frame(frame_id=2, slot=1),  # again before its result
                pb.Frame(frame_id=3, slot=REQUEST_SLOTS + 1),
                pb.Frame(frame_id=4, slot=2**32 - 1),
                pb.Frame(frame_id=5, slot=2, planes=b"x"),
                pb.Frame(frame_id=6),
                pb.Frame(frame_id=7, slot=2),
            ]
        )
        for number in (2, 3, 4, 5, 6):
            assert (await process.result(number)).failed.code == "bad_frame"
        backend.gate.set()
        assert {(await process.result(number)).picture.width for number in (1, 7)} == {WIDTH}
        await process.frames([pb.Frame(frame_id=8, slot=1)])
        assert (await process.result(8)).picture.slot, "after its result the slot may be used again"


async def test_what_is_refused_leaves_the_slots_of_other_frames_alone(tmp_path: Path, lane: EngineLane) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    async with running_engine(settings, backend) as server, connected(settings.address) as client:
        process = await client.open(
            workflow_json=workflow(7), video=VIDEO, shared_memory=lane.offer(), session_id="s"
        )
        backend.gate.clear()
        await process.frames(
            [pb.Frame(frame_id=1, slot=1), pb.Frame(frame_id=1, slot=2), pb.Frame(frame_id=1, slot=1)]
        )
        # All beyond the three credits have none left; some call themselves the frame that runs.
        await process.frames([pb.Frame(frame_id=number % 5 + 2, slot=1 + number % 3) for number in range(60)])
        held = server.engine.sessions["s"]._lane
        assert held is not None
        state = server.engine.sessions["s"].books

        async def counted() -> bool:
            return state.received == 63

        await eventually(counted)
        assert state.dropped_other > 50
        assert held._frames[1] == 1, "the first frame's slot is its own until its result"
        assert len(set(held._frames.values())) == len(held._frames) <= 3
        backend.gate.set()
        # Not by the helper: it refuses frames with two results, which are this client's own doing.
        call, last = process.call, 0
        await process.end_input()
        while (response := await call.read()) and (response.ByteSize() or True):
            last = max([last, *(result.frame_id for result in response.results.results)])
        assert last == 6
        assert not held._frames


async def test_one_memory_for_both_directions_spoils_only_its_own_pictures(tmp_path: Path, lane: EngineLane) -> None:
    settings = settings_for(tmp_path)
    nonce, size = bytes(range(16)), slot_bytes(len(frame(0)))
    ring = Ring.create(3, size, nonce)
    offer = pb.SharedMemory(version=1, owner_pid=os.getpid(), request_fd=ring.fd, response_fd=ring.fd)
    offer.MergeFrom(pb.SharedMemory(request_slots=3, response_slots=3, slot_bytes=size, nonce=nonce))
    async with running_engine(settings), connected(settings.address) as client:
        odd = await client.open(video=VIDEO, shared_memory=offer)
        other = await client.open(video=VIDEO, shared_memory=lane.offer())
        for number in range(1, 9):
            await odd.frames([pb.Frame(frame_id=number, slot=1 + number % 3)])
            await put(other, lane, number, number)
            assert (await odd.result(number)).WhichOneof("outcome") == "picture"
            slot = (await other.result(number)).picture.slot
            assert lane._replies.view(slot, len(frame(0))) == frame(number)
            lane.answered(number)
    ring.close()


async def test_pages_taken_out_of_a_ring_are_zeros_and_no_death(tmp_path: Path, lane: EngineLane) -> None:
    settings = settings_for(tmp_path)
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(video=VIDEO, shared_memory=lane.offer())
        slot = lane.put(1, rows_of(frame_of(frame(9), WIDTH, HEIGHT)))
        for ring in (lane._requests, lane._replies):
            assert fallocate(ring.fd, 3, 0, 1 << 30) == 0  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        await process.frames([pb.Frame(frame_id=1, slot=slot)])
        picture = (await process.result(1)).picture
        assert lane._replies.view(picture.slot, len(frame(0))) == bytes(len(frame(0)))


async def test_a_picture_stays_as_it_is_for_as_long_as_it_is_shown(tmp_path: Path) -> None:
    """The output repeats pictures and encodes them late; meanwhile the engine fills its slots again."""
    settings = settings_for(tmp_path)
    rng = random.Random(5)
    async with running_engine(settings), EngineClient(settings.address) as client:
        await client.ready()
        async with client.open(pb.OpenSession(video=VIDEO, max_batch=4)) as session:
            assert session.lane == "shared_memory"
            responses = session.responses()
            shown: dict[int, av.VideoFrame] = {}
            slots: set[int] = set()
            for first in range(0, 1200, 4):
                while session.credits < 4:
                    await anext(responses)
                frames = [
                    session.load(Frame(number, number), rows_of(frame_of(frame(number % 251), WIDTH, HEIGHT)))
                    for number in range(first, first + 4)
                ]
                await session.send(frames)
                async for frame_id, slot, picture in pictures(responses, 4):
                    slots.add(slot)
                    shown[frame_id] = picture
                # Some are held long, most not; now and then more than there are slots.
                most = 30 if first // 100 % 3 == 0 else 6
                while len(shown) > most:
                    number = rng.choice(list(shown))
                    assert planes_of(shown.pop(number)) == frame(number % 251), f"picture {number} changed"
            for number, held in shown.items():
                assert planes_of(held) == frame(number % 251), f"picture {number} changed"
            assert {0, *range(1, REPLY_SLOTS + 1)} == slots, "every slot was used, and messages where none was free"


async def test_without_a_free_reply_slot_planes_come_in_the_message(tmp_path: Path, lane: EngineLane) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(video=VIDEO, shared_memory=lane.offer())
        for number in range(REPLY_SLOTS + 2):
            await put(process, lane, number, number)
            await process.result(number)
            lane.answered(number)
        assert sorted(slots_of(process)) == [0, 0, *range(1, REPLY_SLOTS + 1)]
        assert process.results[REPLY_SLOTS + 1].picture.planes == frame(REPLY_SLOTS + 1)
        # One comes back, with some that the client never had.
        wild = [3, 3, 0, 99, 2**32 - 1]
        number = REPLY_SLOTS + 2
        slot = lane.put(number, rows_of(frame_of(frame(1), WIDTH, HEIGHT)))
        batch = pb.FrameBatch(frames=[pb.Frame(frame_id=number, slot=slot)], released_slots=wild)
        process.credits -= 1
        await process.send(pb.ProcessRequest(frames=batch))
        assert (await process.result(number)).picture.slot == 3
        lane.answered(number)
        await put(process, lane, number + 1, 1)
        last = (await process.result(number + 1)).picture
        assert (last.slot, last.planes) == (0, frame(1)), "released twice is released once"


@pytest.mark.parametrize("mode", ["fail", "nothing", "half"])
async def test_slots_of_runs_without_a_picture_are_not_lost(tmp_path: Path, mode: str) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, StubBackend()) as server, connected(settings.address) as client:
        lane = EngineLane(WIDTH, HEIGHT)
        process = await client.open(
            workflow_json=workflow(7, "paint"), video=VIDEO, shared_memory=lane.offer(), session_id="s"
        )
        await client.stub.UpdateSession(
            pb.UpdateSessionRequest(
                session_id="s", overrides=[pb.NodeOverride(node_id="5", input="mode", value_json=f'"{mode}"')]
            )
        )
        for number in range(3 * REPLY_SLOTS):
            slot = lane.put(number, rows_of(frame_of(frame(1), WIDTH, HEIGHT)))
            held = server.engine.sessions["s"]._lane
            assert held is not None
            batch = pb.FrameBatch(frames=[pb.Frame(frame_id=number, slot=slot)], released_slots=list(held._shown))
            process.credits -= 1
            await process.send(pb.ProcessRequest(frames=batch))
            await process.result(number)
            lane.answered(number)
        held = server.engine.sessions["s"]._lane
        assert held is not None
        assert len(held._free) + len(held._shown) == REPLY_SLOTS
        assert not held._frames
        lane.close()


# ---- death

CLIENT = """
import asyncio, sys
from gateway_shim.engine_client import EngineClient
from gateway_shim.media.planes import frame_of, rows_of
from proto import engine_pb2 as pb
from proto.frames import Frame
async def main():
    async with EngineClient(sys.argv[1]) as client:
        await client.ready()
        async with client.open(pb.OpenSession(video=pb.VideoFormat(width=64, height=48))) as session:
            await session.send([session.load(Frame(1, 1), rows_of(frame_of(bytes(64 * 48 * 3 // 2), 64, 48)))])
            print(session.lane, flush=True)
            await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_session_that_ends_in_the_middle_of_a_run_is_no_failure_of_its_graph(
    tmp_path: Path, lane: EngineLane, caplog: pytest.LogCaptureFixture
) -> None:
    settings, backend = settings_for(tmp_path), StubBackend()
    before = rings()
    async with running_engine(settings, backend) as server, connected(settings.address) as client:
        process = await client.open(workflow_json=workflow(7), video=VIDEO, shared_memory=lane.offer())
        assert rings()[1] == before[1] + 2
        backend.gate.clear()
        backend.running.clear()
        await put(process, lane, 1, 9)
        await asyncio.to_thread(backend.running.wait)
        process.call.cancel()

        async def ended() -> bool:
            return not server.engine.sessions

        await eventually(ended)
        backend.gate.set()

        async def gone() -> bool:  # without the collector: what holds pictures lets go of them
            return rings() == before

        await eventually(gone)
    assert "the graph" not in caplog.text


async def test_two_hundred_sessions_leave_no_descriptor_and_no_memory(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, StubBackend()) as server, EngineClient(settings.address) as client:
        await client.ready()
        before = None
        for number in range(200):
            request = pb.OpenSession(video=VIDEO, workflow_json=workflow(7) if number % 2 else "")
            async with client.open(request) as session:
                assert session.lane == "shared_memory"
                await session.send([session.load(Frame(1, 1), rows_of(frame_of(frame(9), WIDTH, HEIGHT)))])
                if number % 4 < 2:  # the others end with a frame under way
                    while not isinstance(await anext(responses := session.responses()), Results):
                        pass
                    await responses.aclose()

            async def ended() -> bool:
                return not server.engine.sessions

            await eventually(ended)
            if before is None:
                before = rings(), len(os.listdir("/proc/self/fd"))
        del session, responses

        async def gone() -> bool:
            return (rings(), len(os.listdir("/proc/self/fd"))) == before

        await eventually(gone)
        assert before is not None
        assert before[0] == (0, 0)


async def test_a_killed_client_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    shm = sorted(os.listdir("/dev/shm"))
    gc.collect()
    before = rings()
    async with running_engine(settings) as server:
        for _ in range(3):
            client = await asyncio.create_subprocess_exec(
                sys.executable, "-c", CLIENT, settings.address, stdout=subprocess.PIPE
            )
            assert client.stdout is not None
            assert await client.stdout.readline() == b"shared_memory\n"
            assert rings()[1] == before[1] + 2
            client.kill()
            await client.communicate()

            async def gone() -> bool:
                gc.collect()
                return not server.engine.sessions and rings() == before

            await eventually(gone)
    assert sorted(os.listdir("/dev/shm")) == shm


async def test_a_killed_engine_leaves_nothing_behind_and_no_picture_is_lost(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    command = [sys.executable, "-P", "-m", "engine", "--address", settings.address, "--comfyui-dir", "none"]
    gc.collect()
    before = rings()
    engine = await asyncio.create_subprocess_exec(*command, "--log-level", "warning")
    async with EngineClient(settings.address) as client:
        await client.ready()
        async with client.open(pb.OpenSession(video=VIDEO)) as session:
            await session.send([session.load(Frame(1, 1), rows_of(frame_of(frame(9), WIDTH, HEIGHT)))])
            responses = session.responses()
            response = await anext(responses)
            assert isinstance(response, Results)
            picture = response.results[0].picture
            assert picture is not None
            shown = frame_of(picture.planes, WIDTH, HEIGHT)  # type: ignore[arg-type]  # one piece
            engine.kill()
            await engine.wait()
        del response, picture, responses, session
        assert planes_of(shown) == frame(9), "the memory is there as long as the picture"
        del shown

        async def gone() -> bool:
            gc.collect()
            return rings() == before

        await eventually(gone)


async def test_an_engine_that_names_wrong_slots_is_not_believed(lane: EngineLane) -> None:
    from proto.results import Picture

    for wrong in (Picture(slot=99, width=2, height=2), Picture(slot=1, width=9000, height=9000), Picture(slot=1)):
        with pytest.raises(ValueError, match="slot"):
            lane.picture(wrong)
    held = lane.picture(Picture(slot=1, width=WIDTH, height=HEIGHT))
    with pytest.raises(ValueError, match="in use"):
        lane.picture(Picture(slot=1, width=WIDTH, height=HEIGHT))
    assert lane.released() == []
    del held
    with pytest.raises(ValueError, match="in use"):  # the engine does not know yet
        lane.picture(Picture(slot=1, width=WIDTH, height=HEIGHT))
    assert lane.released() == [1]
    lane.picture(Picture(slot=1, width=WIDTH, height=HEIGHT))


def test_no_session_maps_more_than_its_bound() -> None:
    video = VideoFormat(4096, 4096)
    most = MAX_BYTES // slot_bytes(video.frame_bytes)
    offer = pb.SharedMemory(version=1, owner_pid=os.getpid(), request_fd=0, response_fd=0, nonce=bytes(16))
    offer.MergeFrom(pb.SharedMemory(request_slots=1, response_slots=most, slot_bytes=slot_bytes(video.frame_bytes)))
    with pytest.raises(RingRefused, match="limit"):
        Lane.attach(offer, video)
    offer.response_slots -= 1
    with pytest.raises(RingRefused, match="no ring"):
        Lane.attach(offer, video)


def test_ring_sizes_come_from_the_format() -> None:
    lane = EngineLane(1280, 720)
    try:
        assert lane.offer().slot_bytes == slot_bytes(1280 * 720 * 3 // 2)
        assert isinstance(lane._requests, Ring)
    finally:
        lane.close()
