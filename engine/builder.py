"""From a workflow's text to a graph that runs, and a graph's end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

from .backend import (
    HOW_TO_GET_COMFYUI,
    Aside,
    Building,
    Graph,
    GraphFailed,
    Overrides,
    PassThrough,
    Report,
    Stage,
)
from .ends import require_ends
from .errors import EngineError, Violation, WorkflowRefused, refuse
from .executor import Executor, release_heap
from .graph import overrides as graph_overrides
from .graph.workflow import Finding, Prompt, Reading, Severity, Workflow, WorkflowError, decode, is_drawing, read
from .loading import PROGRESS_INTERVAL_S, Loading, LoadState
from .wire import VideoFormat

logger = logging.getLogger(__name__)

#: Graphs after whose end frozen garbage is collected although streams run, 0.2 s without a run: a V3 node leaves a
#: class in a circle, 54 kB a swap of ten such nodes, which only a stream without any pause would ever pile up.
RELEASE_EVERY: Final = 100


class Builder:
    """Does on the executor thread what workflows need of ComfyUI.

    loader: the thread for what may lie beside running graphs. quiet: waits until no frame wants the executor thread,
    or for as long as a build can stand aside. in_use: whether any session runs. on_failure: called when a graph
    failed.
    """

    def __init__(
        self,
        executor: Executor,
        loader: Executor,
        loading: Loading,
        *,
        max_nodes: int,
        quiet: Callable[[], Awaitable[None]],
        in_use: Callable[[], bool],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._executor = executor
        self._loader = loader
        self._loading = loading
        self._max_nodes = max_nodes
        self._quiet = quiet
        self._in_use = in_use
        self._on_failure = on_failure
        self._steps: set[asyncio.Future[Any]] = set()
        self._turn = asyncio.Lock()
        self._discarded = 0

    @property
    def busy(self) -> bool:
        """Whether a step of a build is under way."""
        return bool(self._steps)

    def cancel(self) -> None:
        """Cancel the steps of builds that have not begun."""
        for step in self._steps:
            step.cancel()

    async def findings(self, workflow_json: str) -> tuple[list[Finding], Prompt | None]:
        """Everything that is wrong with a workflow, and the prompt that would run, if it could be read.

        Raises NotReady while ComfyUI loads.
        """
        try:
            document = decode(workflow_json)
            if is_drawing(document) and not self._loading.problem:
                self._loading.ready()
            reading = await self._read(document)
        except WorkflowError as exc:
            return list(exc.findings), None
        return await self._findings(reading), reading.prompt if reading.is_sound else None

    async def _read(self, document: object) -> Reading:
        """A document of ComfyUI's editor is converted if ComfyUI is there."""
        definitions = None
        if is_drawing(document) and self._loading.state is LoadState.READY:
            known = await self._executor.submit(self._loading.ready().definitions)
            definitions = {definition.class_type: definition for definition in known}
        return read(document, max_nodes=self._max_nodes, definitions=definitions)

    async def _findings(self, reading: Reading) -> list[Finding]:
        findings = list(reading.findings)
        if reading.prompt is None:
            return findings
        workflow = Workflow(reading.prompt)
        if reading.is_sound and workflow.is_pass_through:
            return findings
        if self._loading.problem:
            return [*findings, Finding(Severity.ERROR, "no_comfyui", self._loading.problem, HOW_TO_GET_COMFYUI)]
        more = await self._executor.submit(self._loading.ready().check, workflow)
        # An input that the drawing lost is also a missing one; once is enough.
        said = {(item.node_id, item.input) for item in findings if item.input and item.severity is Severity.ERROR}
        return findings + [item for item in more if (item.node_id, item.input) not in said]

    async def check(self, prompt: Prompt) -> None:
        """Raises WorkflowRefused, InvalidRequest or NotReady if this engine cannot run ``prompt``."""
        workflow = Workflow(prompt)
        if not workflow.is_pass_through:
            refuse(await self._executor.submit(self._loading.ready().check, workflow))

    async def workflow(self, workflow_json: str, report: Report) -> Workflow:
        """Read a workflow; one of the editor waits until ComfyUI is there to convert it.

        Raises WorkflowError or WorkflowRefused with everything that can be said at the moment.
        """
        document = decode(workflow_json)
        if is_drawing(document):
            await self._loading.wait(report)
        reading = await self._read(document)
        if reading.is_sound and reading.prompt is not None:
            return reading.workflow()
        ready = self._loading.state is LoadState.READY
        raise WorkflowError(await self._findings(reading) if ready else reading.findings)

    async def override(self, prompt: Prompt, layers: Sequence[Overrides]) -> Prompt:
        """A prompt with the layers applied, one on top of the other, each of them valid by itself.

        Raises OverrideError, WorkflowError, WorkflowRefused or NotReady.
        """
        backend = self._loading.ready()

        def apply() -> Prompt:
            changed = prompt
            if len(layers) > 1:  # ComfyUI validates the last state only; nobody will see the others
                known = {definition.class_type: definition for definition in backend.definitions()}
                for layer in layers[:-1]:
                    changed = graph_overrides.apply(changed, layer, known)
            return backend.override(changed, layers[-1])

        return await self._executor.submit(apply)

    async def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Graph:
        """A warm graph, made between the frames of the running ones.

        Raises as ``override``; nothing is left behind then, nor when the caller is cancelled.
        """
        try:
            return await self._build(prompt, video, report)
        except (EngineError, WorkflowError):
            raise
        except Exception as exc:  # ours or ComfyUI's: the client is refused; over a lost engine it would try for ever
            logger.exception("a workflow failed unexpectedly while it was loaded")
            text = f"the engine failed over this workflow ({type(exc).__name__}); its log says how"
            raise WorkflowRefused(text, [Violation("workflow_json", text, "internal")]) from exc

    async def _build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Graph:
        workflow = Workflow(prompt)
        require_ends(workflow, video)
        if workflow.is_pass_through:
            return PassThrough(video.width, video.height)
        await self.check(prompt)
        backend = self._loading.ready()
        loop = asyncio.get_running_loop()
        reports = _Repeated(report)

        def from_thread(stage: Stage) -> None:
            loop.call_soon_threadsafe(reports, stage)

        building = backend.build(prompt, video, from_thread)
        error: Exception | None = None
        try:
            while True:
                async with self._in_turn(reports):
                    await self._quiet()
                    step: Graph | Aside | None = await self._step(
                        self._executor.submit(_advance, building, error), reports
                    )
                if not isinstance(step, Aside | None):
                    return step
                error = None
                if step is not None:
                    try:
                        await self._step(self._loader.submit(step.call), reports)
                    except Exception as exc:  # the build knows what its own work may raise
                        error = exc
        except asyncio.CancelledError:
            # Behind the step that is under way, if any; a step that ends the build hands its graph over.
            self._executor.submit(_abandon, building)
            raise
        except GraphFailed as exc:
            self._on_failure()
            where = f"node {exc.node_id} ({exc.class_type}): " if exc.node_id else ""
            path = f"nodes.{exc.node_id}" if exc.node_id else "workflow_json"
            text = f"the workflow failed while it was loaded and warmed: {where}{exc.message}"
            raise WorkflowRefused(text, [Violation(path, exc.message, exc.code)]) from exc

    @contextlib.asynccontextmanager
    async def _in_turn(self, reports: _Repeated) -> AsyncIterator[None]:
        """One build at a time: a frame waits for one step, not for one of each stream that opens."""
        while True:
            try:
                async with asyncio.timeout(PROGRESS_INTERVAL_S):
                    await self._turn.acquire()
                break
            except TimeoutError:
                reports.again()
        try:
            yield
        finally:
            self._turn.release()

    async def _step(self, step: asyncio.Future[Any], reports: _Repeated) -> Any:
        """The step's result. Not cancelled with the caller: what runs cannot be, and would be nobody's."""
        self._steps.add(step)
        step.add_done_callback(self._steps.discard)
        try:
            while not step.done():
                await asyncio.wait({step}, timeout=PROGRESS_INTERVAL_S)
                reports.again()
        except asyncio.CancelledError:
            step.add_done_callback(self._discard_result)
            raise
        return step.result()

    def _discard_result(self, step: asyncio.Future[Any]) -> None:
        if not step.cancelled() and step.exception() is None and not isinstance(step.result(), Aside | None):
            self.discard(step.result())

    def discard(self, graph: Graph) -> None:
        """Close a graph that nobody uses any more; after the run that it may be in."""
        if graph.inline:
            graph.close()
            return
        self._discarded += 1
        self._executor.submit(_close, graph, not self._in_use() or self._discarded % RELEASE_EVERY == 0)


class _Repeated:
    """Says the last stage again while a step takes long: a client takes silence for a hang."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last = Stage("planning")

    def __call__(self, stage: Stage) -> None:
        self._last = stage
        self._report(stage)

    def again(self) -> None:
        if self._last.name != "ready":
            self._report(self._last)


def _advance(building: Building, error: Exception | None) -> Graph | Aside | None:
    try:
        return next(building) if error is None else building.throw(error)
    except StopIteration as end:
        graph: Graph = end.value
        return graph


def _abandon(building: Building) -> None:
    try:
        building.close()
    except Exception:  # a node's own clean-up may raise; nobody waits for the graph any more
        logger.exception("a graph that was being built did not close cleanly")


def _close(graph: Graph, last: bool) -> None:
    try:
        graph.close()
    except Exception:  # a node's own clean-up may raise; the session is gone all the same
        logger.exception("a graph did not close cleanly")
    if last:
        release_heap()
