"""The shared memory of engine sessions as the kernel sees it."""

from __future__ import annotations

import os
from pathlib import Path


def rings(pid: int | str = "self") -> tuple[int, int]:
    """Descriptors and maps of rings that a process holds."""
    links = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            links.append(os.readlink(entry.path))
        except FileNotFoundError:
            continue
    maps = Path(f"/proc/{pid}/maps").read_text()
    return sum("headrace-ring" in link for link in links), maps.count("headrace-ring")
