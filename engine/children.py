"""Processes that nodes of custom packs start: none of them outlives its engine."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from proto.parent import STDIN

from . import config, warden

logger = logging.getLogger(__name__)

#: Beyond the grace of an orderly end, for an engine without supervisord: whatever it waits for will not come.
BEYOND_GRACE_S: Final = 10.0


@contextlib.contextmanager
def watched(grace_s: float) -> Iterator[None]:
    """While inside, a warden beside us ends our children should we be killed, and us should supervisord be killed and
    we hang. Leaving ends our children: 3 s at most."""
    mark = uuid.uuid4().hex
    config.mark_children(mark)
    parent = os.dup(STDIN)
    arguments = (os.getpid(), int(os.getpgrp() == os.getpid()), parent, grace_s + BEYOND_GRACE_S, mark)
    command = [sys.executable, "-I", "-S", str(Path(warden.__file__)), *map(str, arguments)]
    try:
        # A session of its own: what ends our group, supervisord or a terminal, leaves it to its work.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[parent], start_new_session=True
        )
    except OSError as exc:
        logger.warning("no warden, children of custom nodes may stay behind when this engine is killed: %s", exc)
        process = None
    finally:
        os.close(parent)
    try:
        yield
    finally:
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(warden.TERM_S + warden.KILL_S + 1.0)
