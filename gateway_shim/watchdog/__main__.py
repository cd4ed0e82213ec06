"""``python -m gateway_shim.watchdog``: an event listener of supervisord, see supervisord.conf.

40 MB and no time between ticks. Exit codes: 0 stopped as asked, 2 the settings are wrong.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from .. import config, logs
from .events import events
from .supervisor import Supervisor
from .watchdog import Watchdog


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> int:
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        settings = config.load()
    except config.SettingsError as exc:
        for sentence in exc.sentences:
            sys.stderr.write(f"headrace: {sentence}\n")
        return 2
    logs.configure(settings.log_format, settings.log_level)
    watchdog = Watchdog(Supervisor(settings.run_dir / "supervisor.sock"), settings.run_dir, settings.engine_silence_s)
    for event in events(sys.stdin, sys.stdout):
        watchdog.handle(event)
    return 0


if __name__ == "__main__":
    sys.exit(main())
