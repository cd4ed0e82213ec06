"""Nodes of ours for live sound where ComfyUI has none: core nodes make and change sound, none measures it."""

from __future__ import annotations

import math
from typing import Any, Final

#: What counts as silence, in decibels below full scale: the noise of 16 bits is at -96.
SILENCE_DB: Final = -60.0


class AudioLevel:
    """Takes a buffer of sound to a number that knobs understand, and to words."""

    CATEGORY = "headrace"
    DESCRIPTION = "How loud the sound is: 0 (silence) to 1 (full scale) in equal steps of decibels, and as text."
    RETURN_TYPES = ("FLOAT", "STRING")
    RETURN_NAMES = ("level", "text")
    FUNCTION = "measure"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        silence = {"default": SILENCE_DB, "min": -96.0, "max": -1.0, "tooltip": "decibels that count as silence"}
        return {"required": {"audio": ("AUDIO",)}, "optional": {"silence_db": ("FLOAT", silence)}}

    def measure(self, audio: dict[str, Any], silence_db: float = SILENCE_DB) -> tuple[float, str]:
        """audio: ComfyUI's AUDIO. The loudest channel's mean power counts."""
        waveform = audio["waveform"]
        power = float(waveform.square().mean(dim=-1).max()) if waveform.numel() else 0.0
        decibels = max(10 * math.log10(power), silence_db) if power > 0 else silence_db
        return min(max(1 - decibels / silence_db, 0.0), 1.0), f"{decibels:.1f} dB"
