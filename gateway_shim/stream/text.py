"""A graph's text as records of the data channel: whole, in as many lines as it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from proto import engine_pb2 as pb

from ..keys import MAX_NODE_ID
from ..trickle.data import LINE_LIMIT_BYTES

#: Room for the record around the text and the node id: its keys, a pts, part numbers.
_ENVELOPE_BYTES: Final = 1024


def records_of(item: pb.TextItem) -> list[dict[str, Any]]:
    """One record, or several with ``part`` (from 1) of ``parts`` when the line would be 64 KiB or longer.

    Readers put the ``text`` of all parts one behind another; gateways stumble over longer lines for ever.
    """
    # Longer ids are refused where workflows come in. Whatever comes from an engine, a part has room for text.
    node = item.node_id[:MAX_NODE_ID]
    record: dict[str, Any] = {"type": "text", "pts": item.pts, "node": node, "text": item.text}
    parts = list(_parts(item.text, LINE_LIMIT_BYTES - _ENVELOPE_BYTES - _size(node)))
    if len(parts) <= 1:
        return [record]
    return [record | {"text": part, "part": number, "parts": len(parts)} for number, part in enumerate(parts, 1)]


def _parts(text: str, limit: int) -> Iterator[str]:
    """Pieces that are at most ``limit`` bytes as JSON; ``limit`` is enough for a character and its quotes, 8."""
    assert limit >= 8, limit
    while _size(text) > limit:
        # A character is 1 to 6 bytes as JSON; so many surely fit, and a few rounds fill the line.
        count = step = (limit - 2) // 6
        while step and count < len(text):
            if _size(text[: count + step]) <= limit:
                count += step
            else:
                step //= 2
        yield text[:count]
        text = text[count:]
    yield text


def _size(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode())
