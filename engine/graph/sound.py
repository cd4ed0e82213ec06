"""Sound as it travels, and the waveform of ComfyUI's AUDIO: ``[channels, samples]`` float32, -1..1, on the CPU."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

#: A graph may give this share more or fewer samples than it got: filters and transforms work in whole frames. The
#: sound is stretched over the buffer's time then; more is no rounding but another sound.
MAX_STRETCH: Final = 0.05


class NotSound(ValueError):
    """What the graph put out cannot be heard; the sentence says what it was."""


def to_waveform(samples: bytes, channels: int) -> torch.Tensor:
    """Interleaved s16 as ``[channels, samples]``; memory of its own."""
    interleaved = np.frombuffer(samples, np.int16).reshape(-1, channels)
    return torch.from_numpy(interleaved.T.astype(np.float32) / 32768.0)


def silence(count: int, channels: int) -> torch.Tensor:
    """``[channels, count]``"""
    return torch.zeros(channels, count)


def to_samples(waveform: Any, sample_rate: int, *, count: int, channels: int, rate: int) -> bytes:
    """``waveform`` ``[C, n]`` at ``sample_rate`` as exactly ``count`` samples per channel at ``rate``, interleaved.

    The stream's clock decides how long a buffer is: another rate, or some samples more or fewer (MAX_STRETCH), are
    fitted into its time by linear interpolation. One channel goes to all; of more than wanted the first ones stay.
    Values beyond -1..1 are clipped, NaN is silence. Raises NotSound.
    """
    if not isinstance(waveform, torch.Tensor) or waveform.ndim != 2 or waveform.is_complex():
        shape = tuple(waveform.shape) if isinstance(waveform, torch.Tensor) else type(waveform).__name__
        raise NotSound(f"the graph gave {shape} for sound, a waveform is (channels, samples)")
    given = waveform.shape[1] * rate / sample_rate if sample_rate > 0 else 0
    if not waveform.shape[0] or abs(given - count) > max(count * MAX_STRETCH, 1):
        raise NotSound(
            f"the graph gave {waveform.shape[1]} samples at {sample_rate} Hz for {count} at {rate} Hz; "
            "live sound has the length of its input"
        )
    ready = waveform.detach().to("cpu", torch.float32)
    ready = ready.expand(channels, -1) if ready.shape[0] == 1 else ready[:channels]
    if ready.shape[0] < channels:
        ready = torch.cat([ready, ready[-1:].expand(channels - ready.shape[0], -1)])
    if ready.shape[1] != count:
        ready = torch.nn.functional.interpolate(ready[None], size=count, mode="linear", align_corners=False)[0]
    scaled = torch.nan_to_num(ready, nan=0.0).mul(32768.0).round().clamp(-32768, 32767)
    return scaled.to(torch.int16).T.contiguous().numpy().tobytes()
