"""The device that graphs run on, in plain numbers. Importing this does not import torch; calling it does."""

from __future__ import annotations

import contextlib
import functools
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


def cpu_device() -> DeviceInfo:
    """This machine's processor, from ``/proc``."""
    memory = {}
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        memory = dict(line.split(":", 1) for line in lines if ":" in line)

    def size(name: str) -> int:
        return int(memory.get(name, "0 kB").split()[0]) * 1024

    return DeviceInfo("cpu", _cpu_name(), "", size("MemTotal"), size("MemAvailable"))


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


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
        return cpu_device()
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
        uuid=_uuid(str(getattr(properties, "uuid", ""))),
        memory_total_bytes=total,
        memory_free_bytes=free,
        compute=(properties.major, properties.minor),
        utilization_compute=busy,
        utilization_memory=memory_busy,
    )


def is_lost(device: torch.device) -> bool:
    """Whether CUDA has given the process up: from an illegal access or a failed assertion in a kernel on, every call
    fails with that error. Waits for what runs there; want of memory is no such error."""
    if device.type != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        return False
    except RuntimeError:  # torch.AcceleratorError is one
        return True
    return False


def _uuid(bare: str) -> str:
    """As NVIDIA's tools and orchestrators write it (protocol.md 4.3); torch leaves the prefix out."""
    return f"GPU-{bare}" if bare and not bare.startswith(("GPU-", "MIG-")) else bare
