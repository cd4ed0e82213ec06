"""The contract between the engine and its clients: ``engine.proto``, its generated code, and its constants.

``from proto import engine_pb2 as pb`` gives the messages. Nothing here imports anything of ours.
"""

import os
import tempfile
from pathlib import Path
from typing import Final

#: Version of headrace, semver: the orchestrator and the gateway compare it.
VERSION: Final = "0.1.0"

#: Both ends must agree on this number; it grows with every change that an older peer would misread.
WIRE_VERSION: Final = 1

#: Largest gRPC message either end accepts, in bytes. gRPC's own default, 4 MiB, is one 1080p I420 frame;
#: a batch of four 2160p frames (12.4 MB each) has to fit.
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024


def run_directory() -> Path:
    """Where the two programs of one user meet: sockets and journals, when ``HEADRACE_RUN_DIR`` does not say.

    Short on purpose: the path of a Unix socket may have 107 bytes.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "headrace" if runtime else Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}"


def engine_address(index: int = 0, directory: Path | None = None) -> str:
    """gRPC address of engine ``index`` (0..) under ``directory``, a Unix socket."""
    return f"unix:{(directory or run_directory()) / f'engine-{index}.sock'}"
