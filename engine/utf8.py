"""Text that a message can carry. What nodes say may hold half of a surrogate pair, from a lone escape in JSON or from
the name of a file that is not UTF-8; protobuf raises for it, wherever the message is made."""

from __future__ import annotations


def utf8(text: str) -> str:
    """``text`` with a question mark for what UTF-8 does not have."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
