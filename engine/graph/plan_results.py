"""What a node returned, as the lists that its outputs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .plan_parts import Parts


class Expands(Exception):
    """The node returned other nodes instead of values."""


def outputs_of(parts: Parts, returned: Sequence[Any], node: Any) -> tuple[list[list[Any]], dict[str, list[Any]]]:
    """One list for each output, and what the node has for the user interface.

    returned: of every call, in order: a tuple, a dict with ``ui`` and ``result``, a V3 NodeOutput, or a blocker.
    Raises Expands, and whatever comes of a node that returns something else, as ComfyUI does.
    """
    results, shown = [], []
    for item in returned:
        if isinstance(item, dict):
            if "ui" in item:
                shown.append(item["ui"])
            if "expand" in item:
                raise Expands
            if "result" not in item:
                continue
            result = item["result"]
        elif isinstance(item, parts.v3_output):
            output: Any = item
            if output.ui is not None:
                shown.append(output.ui if isinstance(output.ui, dict) else output.ui.as_dict())
            if output.expand is not None:
                raise Expands
            if output.result is None:  # a blocker without values too: what follows gets None
                continue
            blocked = output.block_execution
            result = output.result if blocked is None else parts.blocker(blocked)
        else:
            result = item
        if isinstance(result, parts.blocker):
            result = (result,) * len(node.RETURN_TYPES)
        results.append(result)
    ui = {key: [value for one in shown for value in one[key]] for key in shown[0]} if shown else {}
    return _merged(parts, results, node) if results else [], ui


def _merged(parts: Parts, results: Sequence[Any], node: Any) -> list[list[Any]]:
    count = len(results[0])
    flatten = node.OUTPUT_IS_LIST if hasattr(node, "OUTPUT_IS_LIST") else (False,) * count
    merged: list[list[Any]] = []
    for index, flat in zip(range(count), flatten, strict=False):
        values: list[Any] = []
        for result in results:
            value = result[index]
            if flat and not isinstance(value, parts.blocker):
                values.extend(value)
            else:
                values.append(value)
        merged.append(values)
    return merged
