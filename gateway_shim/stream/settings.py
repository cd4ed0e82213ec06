"""What the operator decided for every stream."""

from __future__ import annotations

from dataclasses import dataclass

from ..media.hardware import ON_CPU, Codecs
from .fallback import Policy

PIPELINE_NAME = "comfystream"


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """The shim's own settings, as far as streams need them; the same for all of its streams."""

    latency_budget_s: float = 0.4  # of streams that do not say
    fallback: Policy = Policy.AUTO  # of streams that do not say
    preset: str = "auto"  # of x264, one of settings.PRESETS, or auto
    bit_rate: int | None = None  # bits per second; None: from size and rate
    codecs: Codecs = ON_CPU  # what the machine has
    codec_threads: int = 0  # of each codec; 0: from the machine and the pictures
    capacity: int = 1  # streams that share the machine
    segment_s: float = 2.0
    input_timeout_s: float = 60.0  # silence after which a stream is over (ai-runner's guardian, protocol.md 6.3)
    pipeline: str = PIPELINE_NAME
