"""``python -m engine``: one engine process, from its first line of log to exit code 0."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import sys
from typing import cast

import cext
import proto.polling  # noqa: F401  first: gRPC reads it when it is imported
from proto import VERSION, WIRE_VERSION, memory, parent

from . import children, logs, unix_socket
from .backend import backend_of
from .config import Settings, SettingsError, read, supervised
from .core import Engine
from .service import Server

logger = logging.getLogger("engine")


class StartRefused(Exception):
    """The engine cannot start; the sentence says why."""


class Broken(Exception):
    """The engine lost a part of itself; a fresh process is the remedy."""


async def serve(settings: Settings) -> bool:
    """Run until SIGTERM or SIGINT, or until the supervisord that started us is gone.

    False: a graph still runs; only the end of the process ends it.
    """
    if settings.pixel_backend != "auto":
        try:
            cext.use_backend(cast(cext.Backend, settings.pixel_backend))
        except ValueError as exc:
            raise StartRefused(f"pixel_backend: {exc}") from None
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if supervised():
        parent.when_gone(stop.set)
    path, address = settings.socket_path, settings.address
    if path is not None:
        unix_socket.make_place(path)
    server = Server(lambda on_settled: Engine(settings, backend_of(settings), on_settled), settings.max_message_bytes)
    try:
        with unix_socket.owner_only() if path is not None else contextlib.nullcontext():
            port = server.bind(address)
    except RuntimeError as exc:
        raise StartRefused(f"cannot listen on {address}: {exc}") from None
    ours = unix_socket.identity(path) if path is not None else None
    if path is None:
        address = f"{address.rpartition(':')[0]}:{port}"
    await server.start()
    logger.info("engine %s, wire version %d, pid %d, on %s", VERSION, WIRE_VERSION, os.getpid(), address)
    ends = [asyncio.create_task(event.wait()) for event in (stop, server.engine.broken)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    logger.info("stopping, up to %.1f s", settings.grace_s)
    ended = await server.stop(settings.grace_s)
    if path is not None and ours is not None:
        unix_socket.remove(path, ours)
    if server.engine.broken.is_set():
        raise Broken
    return ended


def main() -> int:
    try:
        settings = read(sys.argv[1:])
    except SettingsError as exc:
        print(f"engine: {exc}", file=sys.stderr)  # noqa: T201
        return 2
    logs.set_up(settings)
    memory.keep_large_blocks()
    faulthandler.enable()  # a crash in native code says where: it is all that is left of the process
    try:
        with children.watched(settings.grace_s) if supervised() else contextlib.nullcontext():
            ended = asyncio.run(serve(settings))
    except (StartRefused, unix_socket.PlaceTaken) as exc:
        logger.error("%s", exc)
        return 1
    except Broken:
        return 1
    logger.info("stopped")
    if not ended:
        logger.warning("a graph did not end within %.1f s; the process ends without it", settings.grace_s)
        logging.shutdown()
        # Interpreter shutdown would pull modules from under the thread that still runs one.
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
