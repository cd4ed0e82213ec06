"""``python -m gateway_shim``: the shim until SIGTERM or SIGINT, or until the supervisord that started it is gone.

Exit codes: 0 stopped as asked, 1 could not listen, 2 the settings are wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys

import proto.polling  # noqa: F401  first: gRPC reads it when it is imported
from proto import VERSION, memory, parent

from . import config, garbage, logs
from .settings import Settings
from .shim import serve

logger = logging.getLogger(__name__)


async def _run(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if config.supervised():
        parent.when_gone(stop.set)
    await serve(settings, stop)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway_shim", description="The shim of headrace.")
    parser.add_argument("--version", action="version", version=f"headrace {VERSION}")
    config.add_arguments(parser)
    arguments = vars(parser.parse_args())
    try:
        settings = config.load(arguments)
        logs.configure(settings.log_format, settings.log_level)
        memory.keep_large_blocks()
        garbage.settle()
        asyncio.run(_run(settings))
    except config.SettingsError as exc:
        for sentence in exc.sentences:
            sys.stderr.write(f"headrace: {sentence}\n")
        return 2
    except OSError as exc:
        sys.stderr.write(f"headrace: cannot serve: {exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
