"""From a workflow's text to a graph that runs, and a graph's end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from .backend import HOW_TO_GET_COMFYUI, Graph, GraphFailed, Overrides, PassThrough, Report, Stage
from .errors import Violation, WorkflowRefused, refuse
from .executor import Executor, release_heap
from .graph.workflow import Finding, Prompt, Severity, Workflow, WorkflowError, parse
from .loading import Loading
from .wire import VideoFormat

logger = logging.getLogger(__name__)


class Builder:
    """Does on the executor thread what workflows need of ComfyUI. ``in_use``: whether any session runs."""

    def __init__(self, executor: Executor, loading: Loading, max_nodes: int, in_use: Callable[[], bool]) -> None:
        self._executor = executor
        self._loading = loading
        self._max_nodes = max_nodes
        self._in_use = in_use
        self._builds: set[asyncio.Future[Graph]] = set()

    def cancel(self) -> None:
        """Cancel the builds that have not begun."""
        for build in self._builds:
            build.cancel()

    async def findings(self, workflow_json: str) -> list[Finding]:
        """Everything that is wrong with a workflow. Raises NotReady while ComfyUI loads."""
        try:
            workflow = parse(workflow_json, max_nodes=self._max_nodes)
        except WorkflowError as exc:
            return list(exc.findings)
        findings = [*workflow.warnings, *_unserved(workflow)]
        if workflow.is_pass_through:
            return findings
        if self._loading.problem:
            return [*findings, Finding(Severity.ERROR, "no_comfyui", self._loading.problem, HOW_TO_GET_COMFYUI)]
        return [*findings, *await self._executor.submit(self._loading.ready().check, workflow)]

    async def check(self, prompt: Prompt) -> None:
        """Raises WorkflowRefused, InvalidRequest or NotReady if this engine cannot run ``prompt``."""
        workflow = Workflow(prompt)
        if not workflow.is_pass_through:
            refuse(await self._executor.submit(self._loading.ready().check, workflow))

    def parse(self, workflow_json: str) -> Workflow:
        """Raises WorkflowError or WorkflowRefused for what can be said without ComfyUI."""
        workflow = parse(workflow_json, max_nodes=self._max_nodes)
        refuse(_unserved(workflow))
        return workflow

    async def override(self, prompt: Prompt, overrides: Overrides) -> Prompt:
        """A prompt with the overrides applied. Raises OverrideError, WorkflowError, WorkflowRefused or NotReady."""
        backend = self._loading.ready()
        return await self._executor.submit(backend.override, prompt, overrides)

    async def build(self, prompt: Prompt, video: VideoFormat, report: Report) -> Graph:
        """A warm graph. Raises as ``override``; nothing is left behind then, nor when the caller is cancelled."""
        if Workflow(prompt).is_pass_through:
            return PassThrough(video.width, video.height)
        await self.check(prompt)
        backend = self._loading.ready()
        loop = asyncio.get_running_loop()

        def from_thread(stage: Stage) -> None:
            loop.call_soon_threadsafe(report, stage)

        build = self._executor.submit(backend.build, prompt, video, from_thread)
        self._builds.add(build)
        build.add_done_callback(self._builds.discard)
        try:
            # Shielded: a build that runs cannot be cancelled, and its graph would be nobody's.
            return await asyncio.shield(build)
        except asyncio.CancelledError:
            build.add_done_callback(self._abandon)
            raise
        except GraphFailed as exc:
            where = f"node {exc.node_id} ({exc.class_type}): " if exc.node_id else ""
            path = f"nodes.{exc.node_id}" if exc.node_id else "workflow_json"
            text = f"the workflow failed on its first frame: {where}{exc.message}"
            raise WorkflowRefused(text, [Violation(path, exc.message, exc.code)]) from exc

    def _abandon(self, build: asyncio.Future[Graph]) -> None:
        if not build.cancelled() and build.exception() is None:
            self.discard(build.result())

    def discard(self, graph: Graph) -> None:
        """Close a graph that nobody uses any more; after the run that it may be in."""
        if graph.inline:
            graph.close()
        else:
            self._executor.submit(_close, graph, not self._in_use())


def _unserved(workflow: Workflow) -> list[Finding]:
    return [
        Finding(
            Severity.ERROR,
            "audio_not_served",
            "this engine serves no audio yet",
            "use a workflow whose live input and output are pictures",
            path=f"nodes.{node_id}",
            node_id=node_id,
            class_type=workflow.prompt[node_id]["class_type"],
        )
        for node_id in (*workflow.audio_inputs, *workflow.audio_outputs)
    ]


def _close(graph: Graph, last: bool) -> None:
    try:
        graph.close()
    except Exception:  # a node's own clean-up may raise; the session is gone all the same
        logger.exception("a graph did not close cleanly")
    if last:
        release_heap()
