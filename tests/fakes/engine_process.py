"""A real engine process with a stand-in for ComfyUI: ``python -m tests.fakes.engine_process [ADDRESS] [--run-s S]``.

The graph's ``mode`` also takes "abort" and "abort_later", crashes in native code, and "hang_later", a sixth
run that does not return. Its ``level`` and everything else are those of ``engine_backend``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from unittest import mock

from engine import __main__ as program
from engine.backend import FrameIn, RunResult
from engine.graph.workflow import Prompt
from tests.fakes.engine_backend import StubBackend, StubGraph


class DeadlyGraph(StubGraph):
    runs_left = 5

    def run(self, prompt: Prompt, frames: Sequence[FrameIn]) -> RunResult:
        mode = prompt["5"]["inputs"].get("mode")
        if mode == "abort":
            os.abort()
        if mode == "abort_later":  # after an update has been answered
            time.sleep(1.5)
            os.abort()
        if mode == "hang_later":
            self.runs_left -= 1
            if self.runs_left < 0:
                time.sleep(3600)
        self.backend.log.clear()  # a soak of the process would measure the test's own notes
        return super().run(prompt, frames)


class DeadlyBackend(StubBackend):
    graph_class = DeadlyGraph


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("address", nargs="?", default="")
    parser.add_argument("--run-s", type=float, default=0.0)
    arguments = parser.parse_args()
    backend = DeadlyBackend()
    backend.run_s = arguments.run_s
    sys.argv[1:] = ["--comfyui-dir", "none", "--log-level", "warning"]
    if arguments.address:
        sys.argv += ["--address", arguments.address]
    with mock.patch.object(program, "backend_of", return_value=backend):
        return program.main()


if __name__ == "__main__":
    sys.exit(main())
