"""What the event loop is told of connections: aiohttp's own task that fails beside its request is no news."""

import asyncio
import errno
import gc
import logging

import aiohttp
import pytest

from gateway_shim.trickle.connection import on_loop_error


class ClientRequest:
    async def write_bytes(self) -> None:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    async def other(self) -> None:
        raise aiohttp.ClientConnectionResetError("of ours")


ClientRequest.write_bytes.__qualname__ = aiohttp.ClientRequest.write_bytes.__qualname__


@pytest.mark.parametrize(("method", "told"), [("write_bytes", False), ("other", True)])
async def test_only_aiohttps_own_task_fails_silently(
    caplog: pytest.LogCaptureFixture, method: str, told: bool
) -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(on_loop_error)
    try:
        task = asyncio.create_task(getattr(ClientRequest(), method)())
        await asyncio.wait({task})
        del task
        gc.collect()
    finally:
        loop.set_exception_handler(before)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert any("never retrieved" in text for text in errors) is told


async def test_descriptors_that_run_out_are_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(100):
        error = OSError(errno.EMFILE, "Too many open files")
        on_loop_error(loop, {"message": "socket.accept() out of system resource", "exception": error})
    assert len(caplog.records) == 1
    assert "Too many open files" in caplog.text
