"""Sound over the contract: buffers in, the same moments out, with and without pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from proto import engine_pb2 as pb
from tests.fakes.engine_client import Process, connected, grey, running_engine, settings_for
from tests.fakes.sound_backend import SoundBackend, as_json

SOUND = pb.AudioFormat(sample_rate=48_000, channels=2, time_base=pb.Rational(numerator=1, denominator=90_000))
FRAME = grey(64, 48, 50)


def block(number: int, samples: int = 960) -> pb.AudioBlock:
    """``number``: the first sample's, at 48 kHz."""
    values = np.arange(number, number + samples, dtype=np.int16)
    return pb.AudioBlock(pts=round(number * 1.875), samples=np.repeat(values, 2).tobytes())


async def send(process: Process, *blocks: pb.AudioBlock) -> None:
    await process.send(pb.ProcessRequest(audio=pb.AudioBatch(blocks=blocks)))


def heard(process: Process) -> list[tuple[int, list[int]]]:
    return [(item.pts, (-np.frombuffer(item.samples, np.int16)[::2]).tolist()) for item in process.sounds]


async def test_sound_alone_paces_the_graph_and_keeps_its_time(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), SoundBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=as_json(buffer_ms=50, picture=False, text="hi"), audio=SOUND)
        opened = process.opened
        assert opened is not None
        assert opened.audio_input
        assert not opened.HasField("video_output")
        assert opened.audio_output.block_samples == 2400
        await process.frame(0, FRAME)
        assert (await process.result(0)).dropped.reason == pb.Dropped.REASON_NO_OUTPUT
        for number in range(6):
            await send(process, block(number * 960))
        await process.end_input()
        await process.to_end()
    assert heard(process) == [
        (0, list(range(2400))), (4500, list(range(2400, 4800))), (9000, list(range(4800, 5760))),
    ]  # fmt: skip
    assert [(item.pts, item.text) for item in process.texts] == [(0, "hi"), (4500, "hi"), (9000, "hi")]


async def test_session_without_pictures(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings, SoundBackend()), connected(settings.address) as client:
        process = await client.open(workflow_json=as_json(buffer_ms=20, picture=False), audio=SOUND, video=None)
        await send(process, block(0), block(960))
        await process.end_input()
        await process.to_end()
    assert [pts for pts, _ in heard(process)] == [0, 1800]


async def test_pictures_pace_the_graph_and_sound_comes_when_a_buffer_is_there(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), SoundBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=as_json(buffer_ms=20), audio=SOUND)
        assert process.opened is not None
        assert (process.opened.video_output.width, process.opened.video_output.height) == (64, 48)
        await send(process, block(0), block(960), block(1920, 100))
        await process.frame(0, FRAME)
        assert (await process.result(0)).HasField("picture")
        await process.frame(1, FRAME)
        assert (await process.result(1)).HasField("picture")
        assert backend.runs == 2
        assert heard(process) == [(0, list(range(1920)))], "the two buffers that were complete, in one piece"
        await process.end_input()
        await process.to_end()


async def test_sound_that_nobody_takes_is_ignored(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    async with running_engine(settings), connected(settings.address) as client:
        process = await client.open(audio=SOUND)
        assert process.opened is not None
        assert not process.opened.audio_input
        await send(process, block(0))
        await process.frame(0, FRAME)
        assert (await process.result(0)).HasField("picture")
        await process.end_input()
        await process.to_end()
    assert not process.sounds


async def test_client_learns_that_a_new_workflow_takes_other_things(tmp_path: Path) -> None:
    settings, backend = settings_for(tmp_path), SoundBackend()
    async with running_engine(settings, backend), connected(settings.address) as client:
        process = await client.open(workflow_json=as_json(sound=False), audio=SOUND)
        assert process.opened is not None
        assert process.opened.audio_input
        assert not process.opened.HasField("audio_output")
        first = await client.stub.UpdateSession(
            pb.UpdateSessionRequest(session_id=process.session_id, workflow_json=as_json(picture=False, buffer_ms=20))
        )
        await send(process, block(0))
        response = await process.until("opened")
        assert response.opened.version == first.version
        assert response.opened.audio_output.block_samples == 960
        assert not response.opened.HasField("video_output")
        await process.until("audio")
    assert heard(process) == [(0, list(range(960)))]
