"""JSON as it may come from anybody: exact numbers, bounded depth, text that can be written again.

Pure. ``json.loads`` alone lets NaN, Infinity, lone surrogates and any depth through, and each of them ends the stream
or the reader of its events somewhere behind us.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from .errors import MalformedRequest

#: Deeper than any workflow; shallower than what Python's own recursion stands when the value is walked or written.
MAX_DEPTH: Final = 100


def read_json(text: str | bytes) -> Any:
    """A JSON value with exact numbers.

    Raises MalformedRequest for what is not JSON, NaN and Infinity, numbers beyond float, more than ``MAX_DEPTH``
    levels, and strings that are no text (lone surrogates).
    """
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_refuse_constant)
    except RecursionError:
        raise MalformedRequest("the body is nested too deeply") from None
    except ValueError as exc:  # JSONDecodeError and UnicodeDecodeError among them
        raise MalformedRequest(f"the body is not JSON: {exc}") from None
    _check(value)
    return value


def _check(value: Any) -> None:
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise MalformedRequest(f"the body is nested more than {MAX_DEPTH} levels deep")
        if isinstance(item, str):
            _check_text(item)
        elif isinstance(item, list):
            waiting += [(each, depth + 1) for each in item]
        elif isinstance(item, dict):
            for key, each in item.items():
                _check_text(key)
                waiting.append((each, depth + 1))


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedRequest(f"{text!r} is no text: it holds half of a surrogate pair") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond the range of numbers")
    return number


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
