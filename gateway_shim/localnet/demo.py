"""``headrace demo``: a clip in real time through broker, shim, engine and back, all on this machine.

Broker and orchestrator live in this process, shim and engine are the real programs under a real supervisord in a run
directory of their own. Nothing of it is left when it ends, however it ends; only the output directory stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from ..supervise import CannotStart, plan
from ..trickle.connection import open_http
from ..trickle.publisher import Publisher
from . import assets, measure, probe, report
from .analysis import Played, analyse
from .live_stream import LiveStream
from .orchestrator import Orchestrator, WorkerRefused
from .probe import Probe
from .programs import ProgramFailed, Programs, free_port, plain_environment
from .progress import Progress
from .source import Published, publish_file

_CAPABILITY = "headrace-demo"
#: The worker's own default, if nobody has it: what the README calls works while the demo plays.
_USUAL_PORT = 8188
#: Loading torch and ComfyUI takes seconds, a cold disk and many custom nodes minutes.
_READY_S = 600.0
#: After the last input frame: for what is still under way to come out.
_SETTLE_S = 5.0
_POLL_S = 0.25
#: In the output directory, in the order in which one looks at them. The sheet needs Pillow, which comes with ComfyUI.
LEAVES = ("out.mp4", "contact-sheet.png", "report.txt", "report.json")


@dataclass(frozen=True)
class Options:
    clip: Path | None
    workflow: Path | None
    seconds: float
    output: Path
    update: dict[str, Any] | None
    size: tuple[int, int] | None


class DemoFailed(Exception):
    """It did not come to a report; the message is one sentence, ``log`` the end of the log that explains it."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


def main(options: Options, environment: Mapping[str, str]) -> int:
    """Run the demo; the exit code. environment: the base of the programs' own."""
    progress = Progress(sys.stdout)
    try:
        return asyncio.run(_until_interrupted(options, environment, progress))
    except DemoFailed as exc:
        progress.end()
        if exc.log:
            sys.stderr.write(f"---- end of its log\n{exc.log.rstrip()}\n----\n")
        sys.stderr.write(f"headrace: {exc}\n")
        return 1


async def _until_interrupted(options: Options, environment: Mapping[str, str], progress: Progress) -> int:
    """Ctrl-C and SIGTERM end the demo in order, once: a second one must not stop the clearing up."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(_run(options, environment, progress), name="demo")
    interrupted = asyncio.Event()

    def interrupt() -> None:
        if not interrupted.is_set():
            interrupted.set()
            progress.say("stopping")
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        if not interrupted.is_set():
            raise
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _run(options: Options, environment: Mapping[str, str], progress: Progress) -> int:
    if not 1 <= options.seconds <= 3600:
        raise DemoFailed(f"--seconds is {options.seconds:g}, it has to be from 1 to 3600")
    # Short: the paths of sockets below it are limited (supervise.MAX_SOCKET_PATH_BYTES).
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        work_dir = Path(folder)
        try:
            path = assets.find_clip(options.clip)
            workflow = assets.load_workflow(options.workflow, options.update)
            if await asyncio.to_thread(assets.must_be_encoded, path):
                progress.say(f"encoding {path.name} as H.264 and AAC first, at most 60 s of it")
            clip = await asyncio.to_thread(assets.load_clip, path, work_dir)
            _make_output(options.output)
        except (assets.NoAsset, OSError) as exc:
            raise DemoFailed(str(exc)) from exc
        width, height = clip.output_size(options.size)
        progress.say(
            f"{clip.name} ({clip.size}) as {width}x{height} through {workflow.name} for {options.seconds:g} s"
        )
        if options.clip is None:
            progress.say(assets.CREDIT)
        if not workflow.update:
            progress.say('nothing changes half way; --update \'{"node": {"input": value}}\' would')
        try:
            played = await _play(options, environment, clip, workflow, work_dir, progress)
        except (ProgramFailed, DemoFailed) as exc:
            _keep_logs(work_dir, options.output)
            raise DemoFailed(str(exc), exc.log) from exc
        except CannotStart as exc:
            raise DemoFailed(str(exc)) from exc
        progress.live("decoding and comparing what went in and what came out")
        found = await asyncio.to_thread(analyse, played, work_dir, options.output)
    progress.live("")
    progress.say(found.as_text())
    left = [options.output / name for name in LEAVES if (options.output / name).is_file()]
    progress.say("  ".join(map(str, left)))
    return 0 if found.frames.received else 1


def _make_output(output: Path) -> None:
    """The folder, without what an earlier run left: a run that fails must not look like that one."""
    output.mkdir(parents=True, exist_ok=True)
    for name in LEAVES:
        (output / name).unlink(missing_ok=True)


def _keep_logs(work_dir: Path, output: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.copytree(work_dir / "run" / "log", output / "logs", dirs_exist_ok=True)


async def _play(
    options: Options,
    environment: Mapping[str, str],
    clip: assets.Clip,
    workflow: assets.Workflow,
    work_dir: Path,
    progress: Progress,
) -> Played:
    width, height = clip.output_size(options.size)
    params = {
        "width": width,
        "height": height,
        "max_framerate": min(60, max(1, math.ceil(clip.rate))),
        "prompts": workflow.prompt,
    }
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(open_http())
        orchestrator = await stack.enter_async_context(Orchestrator(secret="demo"))  # noqa: S106 on loopback
        worker_url = f"http://127.0.0.1:{_port(stack)}"
        settings = {
            "HEADRACE_LISTEN_PORT": worker_url.rpartition(":")[2],
            "ORCH_URL": orchestrator.url,
            "ORCH_SECRET": orchestrator.secret,
            "CAPABILITY_NAME": _CAPABILITY,
            "CAPABILITY_URL": worker_url,
        }
        launch = plan(plain_environment(environment) | settings, work_dir / "run")
        programs = await stack.enter_async_context(Programs(launch))
        await _registered(orchestrator, programs, http, worker_url, progress)
        progress.live("starting the stream")
        try:
            stream = await orchestrator.start_stream(params=params)
        except WorkerRefused as exc:
            raise DemoFailed(f"the worker refuses the stream: {_words(exc.answer.body)}") from exc
        if workflow.update:
            body = json.dumps(workflow.update)
            progress.say(f"while it plays: curl {worker_url}/live/video-to-video/update -d '{body}'")
        try:
            return await _stream(options, clip, workflow, stream, programs, http, worker_url, work_dir, progress)
        finally:
            await stream.stop("demo over")


def _port(stack: contextlib.AsyncExitStack) -> int:
    """For the worker: the usual one, if it is free and no other demo is about to take it."""
    claim = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
    try:
        claim.bind("\0headrace-demo")  # of no file system: gone with us, however we end
    except OSError:
        return free_port()
    return free_port(_USUAL_PORT)


async def _registered(
    orchestrator: Orchestrator, programs: Programs, http: aiohttp.ClientSession, worker_url: str, progress: Progress
) -> None:
    """Until the worker has registered, which it does once its engine is ready."""
    started_at = time.monotonic()
    with _task(orchestrator.registered(_CAPABILITY, timeout_s=_READY_S), "registration") as registered:
        while not registered.done():
            await programs.check()
            status = await _ask(http, worker_url, "/stream/status")
            known = status.get("additional_info", {})
            reason = known.get("reason") if status else "the shim is starting"
            if known.get("engine") == "BROKEN":  # it stays so: an engine does not load its ComfyUI a second time
                raise DemoFailed(
                    "ComfyUI did not load, the end of the engine's log says why; what it needs is in its "
                    "requirements.txt, for the embedded one `pip install 'headrace[comfyui]'` brings it",
                    _engine_log(programs),
                )
            elapsed_s = time.monotonic() - started_at
            progress.live(f"waiting for the worker, {elapsed_s:.0f} s: {reason or 'it registers'}")
            await asyncio.wait([registered], timeout=_POLL_S)
        try:
            registered.result()
        except TimeoutError:
            message = f"the worker was not ready within {_READY_S:g} s"
            raise DemoFailed(message, _engine_log(programs)) from None
    progress.say(f"the worker registered after {time.monotonic() - started_at:.1f} s")


async def _stream(
    options: Options,
    clip: assets.Clip,
    workflow: assets.Workflow,
    stream: LiveStream,
    programs: Programs,
    http: aiohttp.ClientSession,
    worker_url: str,
    work_dir: Path,
    progress: Progress,
) -> Played:
    """Publish and watch; returns when the last frame is out."""
    published = Published()
    viewer = Probe(http, stream.publish_url, work_dir / "out.ts")
    with contextlib.ExitStack() as tasks:
        record = tasks.enter_context((work_dir / "in.ts").open("wb"))
        watching = tasks.enter_context(_task(viewer.run(), "probe"))
        publisher = Publisher(http, stream.subscribe_url, content_type="video/mp2t")
        async with publisher:
            publishing = tasks.enter_context(
                _task(
                    publish_file(
                        publisher, clip.path, duration_s=options.seconds, record=record, published=published
                    ),
                    "source",
                )
            )
            changing: asyncio.Task[report.Change] | None = None
            worker: dict[str, Any] = {}
            while not publishing.done():
                await asyncio.wait([publishing], timeout=_POLL_S)
                await programs.check()
                if stream.ended.is_set() or watching.done():
                    raise DemoFailed("the worker ended the stream too early", _shim_log(programs))
                if changing is not None and changing.done():
                    changing.result()  # a refusal ends the demo here and not after its last second
                if changing is None and workflow.update and published.media_s >= options.seconds / 2:
                    change = _change(http, worker_url, workflow.update, published, viewer)
                    changing = tasks.enter_context(_task(change, "update"))
                worker = await _frames(http, worker_url, stream) or worker
                progress.live(_line(options, published, viewer.arrivals, worker))
            await publishing
        worker = await _settled(http, worker_url, stream, published, viewer) or worker
        found = await changing if changing is not None else None
        await stream.end_input()
        await asyncio.wait([watching], timeout=_SETTLE_S)
        if not watching.done():
            # The worker lets go of its output when the input ends; the channel itself is the orchestrator's.
            await stream.stop("demo over")
            await asyncio.wait([watching], timeout=_SETTLE_S)
    size = clip.output_size(options.size)
    return Played(clip, size, workflow.name, published, viewer.arrivals, found, worker)


async def _settled(
    http: aiohttp.ClientSession, worker_url: str, stream: LiveStream, published: Published, viewer: Probe
) -> dict[str, Any]:
    """Until every frame that was sent has come, or no more come; the worker's account then."""
    deadline = time.monotonic() + _SETTLE_S
    account: dict[str, Any] = {}
    while time.monotonic() < deadline:
        account = await _frames(http, worker_url, stream) or account
        # The last picture's end shows with the one after it, or with the end of the segment.
        if not account.get("in_flight") and len(viewer.arrivals.video) + 1 >= len(published.video):
            break
        await asyncio.sleep(_POLL_S)
    return account


async def _change(
    http: aiohttp.ClientSession, worker_url: str, body: dict[str, Any], published: Published, viewer: Probe
) -> report.Change:
    """Send the update and wait for the first frame made with it to arrive."""
    sent_s, sent_at = published.media_s, time.monotonic()
    async with http.post(f"{worker_url}/live/video-to-video/update", json=body) as answer:
        accepted_ms = (time.monotonic() - sent_at) * 1000
        result = await answer.json(content_type=None)
        if answer.status != 200:
            raise DemoFailed(f"the update is refused: {_words(result)}")
    pts = result.get("effective_pts")
    visible_ms = None
    deadline = sent_at + _SETTLE_S
    while pts is not None and visible_ms is None and time.monotonic() < deadline:
        arrived = next((at for seen, at in viewer.arrivals.video if seen >= pts), None)
        visible_ms = None if arrived is None else (arrived - sent_at) * 1000
        await asyncio.sleep(0.02)
    return report.Change(body, sent_s, accepted_ms, visible_ms, int(result.get("version", 0)), pts)


def _words(body: Any) -> str:
    """What a refusal says, each field that is wrong included."""
    if not isinstance(body, dict):
        return str(body)
    message = str(body.get("message", body))
    parts = [message]
    for error in body.get("errors", []):
        what, _, remedy = str(error.get("message", "")).partition("; ")
        if what not in message:
            parts.append(f"{error.get('path', '')}: {what}".strip(": "))
        if remedy and remedy not in message:
            parts.append(remedy)
        if (allowed := str(error.get("allowed", ""))) and allowed not in message:
            parts.append(f"allowed: {allowed}")
    return "; ".join(parts)


def _line(options: Options, published: Published, arrivals: probe.Arrivals, worker: Mapping[str, Any]) -> str:
    latencies = measure.latencies_ms(published.video, arrivals.video[-50:])
    latency_ms = measure.percentile(latencies, 0.5)
    return (
        f"{published.media_s:5.1f} of {options.seconds:g} s  in {len(published.video)}  out {len(arrivals.video)}  "
        f"processed {worker.get('processed', 0)}  dropped {worker.get('dropped', 0)}  "
        f"latency {'-' if latency_ms is None else f'{latency_ms:.0f}'} ms"
    )


async def _frames(http: aiohttp.ClientSession, worker_url: str, stream: LiveStream) -> dict[str, Any]:
    """The stream's own account of its frames; empty when the worker has none."""
    status = await _ask(http, worker_url, "/stream/status")
    event = status.get("streams", {}).get(stream.id, {})
    if not isinstance(event.get("frames"), dict):
        return {}
    return {**event["frames"], "graph_ms": event.get("inference_status", {}).get("graph_ms")}


async def _ask(http: aiohttp.ClientSession, worker_url: str, path: str) -> dict[str, Any]:
    try:
        async with http.get(worker_url + path, timeout=aiohttp.ClientTimeout(total=5)) as answer:
            body = await answer.json(content_type=None)
            return body if isinstance(body, dict) else {}
    except (aiohttp.ClientError, OSError, ValueError):
        return {}


@contextlib.contextmanager
def _task(work: Any, name: str) -> Iterator[asyncio.Task[Any]]:
    """A task that does not outlive the block. Its exception is for whoever awaits it inside."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


def _engine_log(programs: Programs) -> str:
    return programs.tail(programs.launch.logs["engine:engine-0"])


def _shim_log(programs: Programs) -> str:
    return programs.tail(programs.launch.logs["shim"])
