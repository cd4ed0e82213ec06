"""One node of a plan: where its inputs come from, how it is called, what it gave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .plan_class import NodeClass
from .plan_limits import NeedsExecutor
from .plan_parts import Parts
from .plan_results import Expands, outputs_of
from .workflow import is_link

_NAN = float("nan")


class Instance:
    """A node's instance, kept for its id and class while prompts change, with its bound methods."""

    def __init__(self) -> None:
        self.node: Any = None
        self.bound: dict[str, Callable[..., Any]] = {}


class Step:
    """A node, compiled. ``outputs`` is None until it ran, and again when it is stale or nobody needs them any more.

    sources: ids it waits for; lazy: by input, the ids it may ask for. is_output, is_async: see NodeClass.
    needs_loop: it cannot be driven by plain calls.
    """

    def __init__(
        self, parts: Parts, node_class: NodeClass, node_id: str, node: Mapping[str, Any], prompt: Any
    ) -> None:
        self._parts = parts
        self._class = node_class
        self.node_id = node_id
        self.class_type = node_class.class_type
        self.is_output = node_class.is_output
        self.is_async = node_class.is_async
        self.lazy_check = node_class.lazy_check
        self.needs_loop = node_class.is_async or node_class.lazy_check or node_class.fingerprint_waits
        self.always_changed = node_class.always_changed
        self.fingerprint = node_class.fingerprint
        self.outputs: list[list[Any]] | None = None
        self.ui: dict[str, list[Any]] = {}
        self.changed: Any = None
        self._prompt = prompt
        self._inputs = node["inputs"]
        linked = {name: value for name, value in self._inputs.items() if is_link(value)}
        self.sources = tuple(link[0] for name, link in linked.items() if not node_class.is_lazy(name))
        self.lazy: dict[str, str] = {name: link[0] for name, link in linked.items() if node_class.is_lazy(name)}
        #: Everything it descends from directly, asked for or not: that is what makes it stale.
        self.parents = tuple(dict.fromkeys(link[0] for link in linked.values()))
        self._links = {name: (link[0], link[1]) for name, link in linked.items() if not node_class.is_raw(name)}
        values = {
            name: None if name in self._links else value
            for name, value in self._inputs.items()
            if name in self._links or node_class.is_declared(name)
        }
        hidden = node_class.hidden_inputs(node_id, prompt)
        self._links = {name: link for name, link in self._links.items() if name not in hidden}
        #: Every argument in ComfyUI's order; None where a link brings it.
        self._template: dict[str, Any] = {**values, **hidden}
        self._fast: tuple[tuple[str, Step, int], ...] = ()
        self._context = parts.context_of("", node_id, 0 if self._template else None)
        self._function = node_class.node_class.FUNCTION
        self._one_list = bool(getattr(node_class.node_class, "INPUT_IS_LIST", False))
        flat = getattr(node_class.node_class, "OUTPUT_IS_LIST", None)
        #: Outputs that a plain tuple may have and become one list of one value each.
        self._plain = 0 if flat is not None and any(flat) else len(flat) if flat is not None else 1 << 30
        self.instance = Instance()

    def connect(self, steps: Mapping[str, Step], instance: Instance, prompt_id: str) -> None:
        """Find the steps that the links lead to. ``instance`` may be one that an earlier plan used."""
        # A class that cannot ask gets no lazy input, unless it waits for that node on account of another one.
        anyone = self.lazy_check or not self._parts.lazy_is_private
        self._fast = tuple(
            (name, steps[source], index)
            for name, (source, index) in self._links.items()
            if anyone or name not in self.lazy or source in self.sources
        )
        self._context = self._context._replace(prompt_id=prompt_id)
        self.instance = instance
        if self._class.asks_for_the_prompt:
            instance.bound.clear()

    def fingerprint_now(self) -> Any:
        """The answer of IS_CHANGED or fingerprint_inputs, from literals alone; a NaN when it raises.

        A list as long as there were calls, or a coroutine that returns one.
        """
        try:
            function = self.instance.bound.get(self.fingerprint)
            if function is None:
                function = self._class.bound(self._class.node_class, self.fingerprint, None)
                self.instance.bound[self.fingerprint] = function
            arguments = {**self._template, **self._class.hidden_inputs(self.node_id, {})}
            if self._one_list:
                arguments = {name: [value] for name, value in arguments.items()}
            token = self._parts.context.set(self._context)
            try:
                value = function(**arguments)
            finally:
                self._parts.context.reset(token)
        except Exception:  # ComfyUI takes that for "changed", every time
            return _NAN
        return self._awaited_fingerprint(value) if asyncio.iscoroutine(value) else self._fingerprint_of(value)

    async def _awaited_fingerprint(self, coroutine: Any) -> Any:
        token = self._parts.context.set(self._context)
        try:
            return self._fingerprint_of(await coroutine)
        except Exception:  # as above
            return _NAN
        finally:
            self._parts.context.reset(token)

    def _fingerprint_of(self, value: Any) -> list[Any]:
        return [None if isinstance(value, self._parts.blocker) else value]

    def run(self) -> None:
        """Call the node with what its sources gave. Raises what it raises, and NeedsExecutor when it expands.

        The way of a node whose inputs are one value each and which returns a tuple, which is nearly every one.
        """
        parts = self._parts
        arguments = self._template.copy()
        for name, source, index in self._fast:
            values = source.outputs
            if values is None or index >= len(values):
                continue
            if len(values[index]) != 1 or isinstance(value := values[index][0], parts.blocker):
                return self.run_lists(self.lists())
            arguments[name] = value
        if self._one_list:
            return self.run_lists(self.lists())
        function = self._bound()
        parts.nodes.before_node_execution()
        token = parts.context.set(self._context)
        try:
            returned = function(**arguments)
        finally:
            parts.context.reset(token)
        if type(returned) is tuple and len(returned) <= self._plain:
            self.outputs, self.ui = [[value] for value in returned], {}
        else:
            self.take([returned])
        return None

    def _bound(self, name: str = "") -> Callable[..., Any]:
        """A method of the instance, which is made when it is first needed."""
        instance = self.instance
        if instance.node is None:
            instance.node = self._class.node_class()
        if not self._class.is_v3:
            return getattr(instance.node, name or self._function)  # type: ignore[no-any-return]
        name = name or self._function
        function = instance.bound.get(name)
        if function is None:
            hidden = self._class.hidden_values(self.node_id, self._prompt)
            function = instance.bound[name] = self._class.bound(instance.node, name, hidden)
        return function

    def lists(self, asked: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The list of every input, in ComfyUI's order. ``asked``: the lazy inputs asked for; None: all links."""
        lists: dict[str, Any] = {name: [value] for name, value in self._template.items()}
        visible = None if asked is None else {*self.sources, *asked.values()}
        for name, source, index in self._fast:
            values = source.outputs if visible is None or source.node_id in visible else None
            lists[name] = values[index] if values is not None and index < len(values) else (None,)
        return lists

    def absent(self, asked: Mapping[str, str]) -> set[str]:
        """Linked inputs that have no value."""
        visible = {*self.sources, *asked.values()}
        return {
            name
            for name, source, index in self._fast
            if source.node_id not in visible or source.outputs is None or index >= len(source.outputs)
        }

    def calls(self, lists: dict[str, Any]) -> Iterator[tuple[int | None, dict[str, Any] | Any]]:
        """What to call the node with, once for each element of the longest list; a blocker instead of arguments."""
        longest = max(map(len, lists.values()), default=0)
        if self._one_list:
            yield 0, self._blocked(lists) or lists
        elif longest == 0:
            yield None, {}
        else:
            for index in range(longest):
                arguments = {name: values[min(index, len(values) - 1)] for name, values in lists.items()}
                yield index, self._blocked(arguments) or arguments

    def _blocked(self, arguments: Mapping[str, Any]) -> Any:
        blocker = self._parts.blocker
        for value in arguments.values():
            if isinstance(value, blocker):
                return value
            if self._one_list:
                inside = next((item for item in value if isinstance(item, blocker)), None)
                if inside is not None:
                    return inside
        return None

    def run_lists(self, lists: dict[str, Any]) -> None:
        """Call the node for every element; blocked ones are skipped and stay blocked."""
        self.take([self._call(self._bound, index, arguments) for index, arguments in self.calls(lists)])

    def _call(self, bound: Callable[[], Callable[..., Any]], index: int | None, arguments: Any) -> Any:
        parts = self._parts
        parts.nodes.before_node_execution()
        if isinstance(arguments, parts.blocker):
            return self._reported(arguments)
        function = bound()
        token = parts.context.set(self._context._replace(list_index=index))
        try:
            return function(**arguments)
        finally:
            parts.context.reset(token)

    def _reported(self, blocker: Any) -> Any:
        if blocker.message is None:
            return blocker
        server = self._parts.server
        report = {
            "prompt_id": self._context.prompt_id, "node_id": self.node_id, "node_type": self.class_type,
            "executed": [], "exception_message": f"Execution Blocked: {blocker.message}",
            "exception_type": "ExecutionBlocked", "traceback": [], "current_inputs": [], "current_outputs": [],
        }  # fmt: skip
        server.send_sync("execution_error", report, server.client_id)
        return self._parts.blocker(None)

    async def start(self, lists: dict[str, Any]) -> list[Any]:
        """Call a coroutine node for every element: results, and tasks for those that did not end at once."""
        started: list[Any] = []
        try:
            for index, arguments in self.calls(lists):
                if isinstance(arguments, self._parts.blocker):
                    self._parts.nodes.before_node_execution()
                    started.append(self._reported(arguments))
                    continue
                started.append(asyncio.create_task(self._awaited(index, arguments)))
                # ComfyUI gives each one a chance to end, or to reach its first wait, before it goes on.
                await asyncio.sleep(0)
                if started[-1].done():
                    started[-1] = started[-1].result()
        except BaseException:
            for task in started:
                if isinstance(task, asyncio.Task):
                    task.cancel()
            raise
        return started

    async def _awaited(self, index: int | None, arguments: dict[str, Any]) -> Any:
        self._parts.nodes.before_node_execution()
        self._parts.context.set(self._context._replace(list_index=index))  # the task's own copy
        try:
            returned = self._bound()(**arguments)
            return await returned if asyncio.iscoroutine(returned) else returned
        except SystemExit as exc:  # out of a task it would end the loop, not the tick
            raise RuntimeError(f"SystemExit: {exc}") from exc

    async def wanted(self, asked: Mapping[str, str]) -> list[str]:
        """The lazy inputs that the node asks for and does not have yet."""
        absent, given = self.absent(asked), self.lists(asked)
        wanted: dict[str, None] = {}
        for index, arguments in self.calls(given):
            names = self._call(lambda: self._bound("check_lazy_status"), index, arguments)
            names = await names if asyncio.iscoroutine(names) else names
            if isinstance(names, list):
                wanted.update((name, None) for name in names if isinstance(name, str))
        return [name for name in wanted if name in absent or name not in given]

    def source_of(self, name: str) -> str:
        """The id of the node behind a lazy input that this one asks for."""
        value = self._inputs.get(name)
        if is_link(value):
            return str(value[0])
        raise self._parts.input_error(f"the node asks for the input {name}, which is not linked")

    def take(self, returned: list[Any]) -> None:
        """Take what the calls returned. Raises NeedsExecutor if the node became other nodes."""
        try:
            self.outputs, self.ui = outputs_of(self._parts, returned, self.instance.node or self._class.node_class)
        except Expands:
            raise NeedsExecutor(self.node_id, self.class_type, "expands into other nodes") from None
