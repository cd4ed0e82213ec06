"""The device that graphs run on, in plain numbers. Importing this does not import torch; calling it does."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Memory in bytes, utilization in percent; 0 where unknown. Fields as ``Device`` in ``engine.proto``."""

    type: str = "cpu"
    name: str = ""
    uuid: str = ""
    memory_total_bytes: int = 0
    memory_free_bytes: int = 0
    compute: tuple[int, int] = (0, 0)
    utilization_compute: float = 0.0
    utilization_memory: float = 0.0


def chosen(device: str) -> torch.device:
    """What a setting ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here. Raises ValueError if it is not there."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but torch sees no CUDA device")
    wanted = torch.device("cuda" if device == "auto" else device)
    index = 0 if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device is {device}, but there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def describe(device: torch.device) -> DeviceInfo:
    """The device of the moment; safe on any thread, and cheap on the CPU."""
    if device.type != "cuda":
        page = os.sysconf("SC_PAGE_SIZE")
        return DeviceInfo(
            name=platform.processor() or platform.machine(),
            memory_total_bytes=os.sysconf("SC_PHYS_PAGES") * page,
            memory_free_bytes=os.sysconf("SC_AVPHYS_PAGES") * page,
        )
    import torch

    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    try:
        busy, memory_busy = float(torch.cuda.utilization(device)), float(torch.cuda.memory_usage(device))
    except Exception:  # NVML may be absent, refused, or not know the card; the rest holds without it
        busy = memory_busy = 0.0
    return DeviceInfo(
        type="cuda",
        name=properties.name,
        uuid=str(getattr(properties, "uuid", "")),
        memory_total_bytes=total,
        memory_free_bytes=free,
        compute=(properties.major, properties.minor),
        utilization_compute=busy,
        utilization_memory=memory_busy,
    )
