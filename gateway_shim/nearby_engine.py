"""An engine to ask: the one that runs, or one that is started for the question and ended after it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from .engine_client import EngineClient, EngineState
from .localnet.progress import Progress
from .supervise import CannotStart, end_with_parent

#: For an engine that runs to answer; a Unix socket without a listener refuses at once.
ANSWER_S = 2.0
#: For ComfyUI with many packs to load. An engine that died is noticed at once.
LOAD_S = 300.0
#: For a started engine to end after SIGTERM; its own grace is 5 s.
END_S = 15.0
#: Lines of the log that are shown when an engine does not start.
LOG_LINES = 12


@contextlib.asynccontextmanager
async def nearby_engine(
    addresses: Sequence[str], environment: Mapping[str, str], progress: Progress
) -> AsyncIterator[EngineClient]:
    """The first engine of ``addresses`` that answers, or a temporary one; ready, or broken for good.

    environment: for an engine that has to be started. Raises CannotStart.
    """
    for address in filter(_may_answer, addresses):
        async with EngineClient(address) as client:
            if await _answers(client):
                await _loaded(client, None, progress)
                yield client
                return
    progress.say("no engine is running; starting one for this")
    with tempfile.TemporaryDirectory(prefix="headrace-") as directory:
        async with _temporary(Path(directory), environment) as (address, process), EngineClient(address) as client:
            try:
                await _loaded(client, process, progress)
            except CannotStart as exc:
                log = (Path(directory) / "engine.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
                raise CannotStart("\n".join([str(exc), *log])) from None
            yield client


def _may_answer(address: str) -> bool:
    return not address.startswith("unix:") or Path(address.removeprefix("unix:")).is_socket()


async def _answers(client: EngineClient) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_S):
            while client.state is EngineState.ABSENT:
                await client.changed()
    return client.state in (EngineState.LOADING, EngineState.READY, EngineState.BROKEN)


async def _loaded(client: EngineClient, process: asyncio.subprocess.Process | None, progress: Progress) -> None:
    """Until the engine can say something about workflows."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while client.state not in (EngineState.READY, EngineState.BROKEN):
        if process is not None and process.returncode is not None:
            raise CannotStart(f"the engine ended with exit code {process.returncode}")
        waited = loop.time() - began
        if waited > LOAD_S:
            raise CannotStart(f"the engine at {client.address} is not ready after {LOAD_S:.0f} s")
        progress.live(f"the engine is loading, {waited:.0f} s")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.changed()
    progress.end()


@contextlib.asynccontextmanager
async def _temporary(
    directory: Path, environment: Mapping[str, str]
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    address = f"unix:{directory / 'engine.sock'}"
    with (directory / "engine.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "engine",
            "--address",
            address,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(environment),
            # Whoever lies in the folder that we were called from and is named "engine" is not ours.
            cwd=directory,
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
    try:
        yield address, process
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except (TimeoutError, asyncio.CancelledError) as exc:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(exc, asyncio.CancelledError):
            raise
