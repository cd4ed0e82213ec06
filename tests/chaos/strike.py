"""One fault of a plan, done to a run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from gateway_shim.localnet.orchestrator import Orchestrator
from gateway_shim.trickle.connection import open_http
from gateway_shim.trickle.wire import ChannelError

from .appliance import NAME, Appliance
from .plan import ENDING, Event
from .stream import WORKFLOWS, Stream

#: How long a hung engine may stay before we end it ourselves, so that the run goes on.
_HANG_S = 20.0
#: Stamps that fall by less are an overlap, and who is late is dropped (media/timeline.py, MAX_OVERLAP).
_OVERLAP_S = 1.05
#: How long a shim that came back may take to open the streams of its journal.
_RESUME_S = 5.0
_REGISTERED_S = 60.0


class Striker:
    """Faults by name. ``wrong`` collects what was not answered as promised."""

    def __init__(self, appliance: Appliance, graph: str) -> None:
        self._appliance = appliance
        self._graph = graph
        self.wrong: list[str] = []
        self.kills: list[float] = []  # monotonic times at which an engine was taken away
        self._taken: set[int] = set()  # their processes
        self.shim_kills = 0
        self.hang_repaired_s: list[float] = []
        self._side: set[asyncio.Task[None]] = set()
        # Its connections are not to be there when those of the shim are counted.
        self._http = open_http()

    async def strike(self, event: Event, stream: Stream) -> bool:
        """Whether the stream is over by it."""
        if event.lossy:
            seconds = float(event.arguments.get("seconds", 0) or 0)
            stream.excuse(0.0, abs(seconds))
        act: Callable[..., Awaitable[bool | None]] = getattr(self, f"_{event.fault}")
        goes_on = await act(stream, **event.arguments)
        if event.fault in ENDING and not goes_on:
            stream.cut_off = True
        return stream.cut_off

    def beside(self, part: Any) -> None:
        task = asyncio.create_task(part)
        self._side.add(task)
        task.add_done_callback(self._side.discard)

    async def close(self) -> None:
        """Wait for what goes on beside, and let go of all connections."""
        await self._http.close()
        if self._side:
            await asyncio.wait(self._side, timeout=_HANG_S)

    @property
    def _faults(self) -> Any:
        return self._appliance.orchestrator.broker.faults

    # ---- processes

    async def _kill_engine(self, stream: Stream) -> None:
        self._take_away(signal.SIGKILL)

    async def _term_engine(self, stream: Stream) -> None:
        self._take_away(signal.SIGTERM)

    def _take_away(self, number: signal.Signals) -> int | None:
        """None when there is no engine at the moment: supervisord waits before it starts the next one. One that is
        on its way out since a SIGTERM may be killed as well; that is one life."""
        began = time.monotonic()
        if (pid := self._appliance.kill_engine(number)) is not None and pid not in self._taken:
            self._taken.add(pid)
            self.kills.append(began)
        return pid

    async def _freeze_engine(self, stream: Stream, seconds: float) -> None:
        pid = self._appliance.kill_engine(signal.SIGSTOP)

        async def thaw() -> None:
            await asyncio.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        if pid:
            self.beside(thaw())

    async def _hang_engine(self, stream: Stream) -> None:
        pid = self._take_away(signal.SIGSTOP)
        began = time.monotonic()

        async def repaired() -> None:
            while time.monotonic() - began < _HANG_S:
                boots = self._appliance.boots
                if boots[-1].pid != pid and boots[-1].serving_at:
                    self.hang_repaired_s.append(round(boots[-1].began_at - began, 1))
                    return
                await asyncio.sleep(0.1)
            self.hang_repaired_s.append(_HANG_S)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # type: ignore[arg-type]

        if pid is not None:
            self.beside(repaired())

    async def _kill_shim(self, stream: Stream) -> bool:
        """Whether the next shim goes on with the stream, from its journal."""
        pid = self._appliance.shim_pid
        if pid is None:
            return True
        self.shim_kills += 1
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        answered = 0.0
        while time.monotonic() - began < _REGISTERED_S:
            status = await self._appliance.status()
            if status is not None and self._appliance.shim_pid != pid:
                if stream.live.id in status["streams"]:
                    return True
                answered = answered or time.monotonic()
                if time.monotonic() - answered > _RESUME_S:
                    break
            await asyncio.sleep(0.1)
        return False

    # ---- the network

    async def _reset(self, stream: Stream, channel: str, method: str, after_bytes: int) -> None:
        self._faults.reset(method, stream.name + channel, after_bytes=after_bytes)

    async def _stall(self, stream: Stream, channel: str, method: str, after_bytes: int, seconds: float) -> None:
        self._faults.stall(method, stream.name + channel, after_bytes=after_bytes, seconds=seconds)

    async def _answer(self, stream: Stream, channel: str, method: str, status: int) -> None:
        self._faults.answer(method, stream.name + channel, status=status)

    async def _answer_404(self, stream: Stream, channel: str) -> None:
        self._faults.answer("POST" if channel == "-out" else "GET", stream.name + channel, status=404)
        await asyncio.sleep(2 * stream.source.recipe.segment_s + 1)  # met by the next segment

    async def _limit(self, stream: Stream, channel: str, method: str, bytes_per_s: int, seconds: float) -> None:
        self._faults.limit(method, stream.name + channel, bytes_per_s=bytes_per_s, seconds=seconds)

    async def _corrupt(self, stream: Stream, after_bytes: int, length: int) -> None:
        self._faults.corrupt("GET", stream.name, after_bytes=after_bytes, length=length)

    async def _reset_all(self, stream: Stream) -> None:
        await self._appliance.orchestrator.broker.restart(memory=True)

    async def _forget(self, stream: Stream) -> None:
        """The orchestrator crashes and comes back without memory."""
        orchestrator: Orchestrator = self._appliance.orchestrator
        before = self._appliance.worker
        await orchestrator.restart()
        await orchestrator.registered(NAME, after=before, timeout_s=_REGISTERED_S)

    async def _delete_output(self, stream: Stream) -> None:
        await self._appliance.orchestrator.broker.delete(f"{stream.name}-out")

    async def _delete_control(self, stream: Stream) -> None:
        await self._appliance.orchestrator.broker.delete(f"{stream.name}-control")

    # ---- the input

    async def _skip_segment(self, stream: Stream) -> None:
        stream.source.skip_segment()

    async def _repeat_segment(self, stream: Stream) -> None:
        stream.source.repeat_segment()

    async def _hold(self, stream: Stream, seconds: float) -> None:
        stream.source.hold(seconds)

    async def _pause(self, stream: Stream, seconds: float) -> None:
        stream.source.pause(seconds)

    async def _jump(self, stream: Stream, seconds: float) -> None:
        stream.source.jump(seconds)

    async def _restart_clock(self, stream: Stream) -> None:
        if stream.source.restart_clock() < _OVERLAP_S:
            stream.excuse(0.0, 0.0)

    async def _vary(self, stream: Stream, on: bool) -> None:
        stream.source.vary(on)

    # ---- parameters, control, polls

    async def _update(self, stream: Stream, kind: str, value: int) -> None:
        body: Any = {"prompts": WORKFLOWS[self._graph]}
        if kind == "value":
            body = {
                "pass": {"max_framerate": 60},
                "invert": {"5": {"sigma": 0.1 + value / 200}},
                "slow": {"5": {"seconds": 0.14 + value / 5000}},
            }[self._graph]
        self._answered(await self._call(stream, body, dry_run=kind == "dry_run"), range(200, 300), (409, 503), body)

    async def _bad_update(self, stream: Stream, kind: str, over: str) -> None:
        body = _bad(kind)
        if over == "control":
            await self._control(stream, text=json.dumps(body) if not isinstance(body, bytes) else body.decode())
        else:
            self._answered(await self._call(stream, body), range(400, 500), (503,), body)

    async def _call(self, stream: Stream, body: Any, *, dry_run: bool = False) -> tuple[int, str]:
        url = f"{self._appliance.worker.url}/stream/params{'?dry_run=1' if dry_run else ''}"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"X-Stream-Id": stream.live.id, "Content-Type": "application/json"}
        try:
            async with self._http.post(
                url, data=data, headers=headers, timeout=aiohttp.ClientTimeout(total=40)
            ) as answer:
                return answer.status, await answer.text()
        except TimeoutError:
            return 0, "no answer within 40 s"
        except (aiohttp.ClientError, OSError) as exc:
            return 0, repr(exc)

    def _answered(self, answer: tuple[int, str], wanted: range, also: tuple[int, ...], body: Any) -> None:
        """404: the stream ended meanwhile by its own account, of which others complain."""
        status, text = answer
        if status not in wanted and status not in (*also, 404):
            self.wrong.append(f"an update was answered {status}, not {wanted.start}: {str(body)[:80]}: {text[:200]}")

    async def _control(self, stream: Stream, text: str) -> None:
        with contextlib.suppress(ChannelError):
            await stream.live.write_control(text.encode())

    async def _stop_other(self, stream: Stream) -> None:
        url = f"{self._appliance.worker.url}/stream/stop"
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self._http.post(url, data=b"late", headers={"X-Stream-Id": "cam-gone"}) as answer:
                if answer.status != 200:
                    self.wrong.append(f"a late stop of another stream was answered {answer.status}")

    async def _polls(self, stream: Stream, count: int) -> None:
        paths = [
            "/health",
            "/stream/status",
            "/version",
            "/hardware/info",
            "/hardware/stats",
            "/stream/params/schema",
        ]
        asked = (self._appliance.get(paths[i % len(paths)], self._http) for i in range(count))
        found = await asyncio.gather(*asked)
        if not self.shim_kills and any(answer is None for answer in found):
            self.wrong.append(f"{sum(answer is None for answer in found)} of {count} polls were not answered")


def _bad(kind: str) -> Any:
    live = {"class_type": "LoadTensor", "inputs": {}}
    return {
        "no_node": {"77": {"sigma": 1}},
        "no_input": {"1": {"nothing": 1}},
        "wrong_type": {"9": {"images": 3}},
        "out_of_range": {"max_framerate": 1000},
        "no_class": {"prompts": {"1": live, "9": {"class_type": "ThereIsNone", "inputs": {"images": ["1", 0]}}}},
        "no_output": {"prompts": {"1": live}},
        "not_json": b"{not json",
        "list": [1, 2, 3],
        "deep": json.loads('{"prompts":' + "[" * 200 + "]" * 200 + "}"),
    }[kind]
