"""By which names this machine may be called.

A name that a stranger owns can lead here too (DNS rebinding): his page then has the origin that it calls, and a
browser lets it do all that our own could.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit


def own_names(listen_host: str, capability_url: str) -> frozenset[str]:
    """Lower case, without port. Addresses are always ours: no page can have one that is not."""
    names = {"localhost", listen_host, socket.gethostname(), _name_of(capability_url)}
    return frozenset(name.lower().rstrip(".") for name in names if name)


def is_own(host: str, names: Collection[str]) -> bool:
    """Whether a Host header names this machine."""
    name = _name_of(f"//{host}")
    if name is None:
        return False
    name = name.rstrip(".")
    return name in names or name.endswith(".localhost") or _is_address(name)


def _name_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # half a bracket
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
