"""A real engine process with a stand-in for ComfyUI: ``python -m tests.fakes.engine_process [ADDRESS] [--run-s S]``.

The graph's ``mode`` also takes "abort" and "abort_later", crashes in native code, "hang_later", a sixth run that does
not return, and "fail_once", a build that fails where there is no file ``marker`` yet. Its ``level`` and all else are
those of ``engine_backend``. ``--load-s S``: of each build.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from engine import __main__ as program
from engine.backend import Building, FrameIn, Report, RunResult
from engine.graph.workflow import Prompt
from engine.wire import VideoFormat
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

    def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Building:
        inputs = prompt["5"]["inputs"]
        if inputs.get("mode") == "fail_once":
            marker = Path(inputs["marker"])
            mode = "paint" if marker.exists() else "fail"
            marker.touch()
            prompt = prompt | {"5": prompt["5"] | {"inputs": inputs | {"mode": mode}}}
        return (yield from super().build(prompt, video, report))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("address", nargs="?", default="")
    parser.add_argument("--run-s", type=float, default=0.0)
    parser.add_argument("--load-s", type=float, default=0.0)
    arguments = parser.parse_args()
    backend = DeadlyBackend()
    backend.load_s = arguments.load_s
    backend.run_s = arguments.run_s
    sys.argv[1:] = ["--comfyui-dir", "none", "--log-level", "warning"]
    if arguments.address:
        sys.argv += ["--address", arguments.address]
    with mock.patch.object(program, "backend_of", return_value=backend):
        return program.main()


if __name__ == "__main__":
    sys.exit(main())
