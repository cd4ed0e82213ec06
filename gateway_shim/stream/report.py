"""What the world may know of one stream: the ``status`` event of protocol.md 4.7, from facts, by one function."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from .events import now_ms
from .generate import Generator
from .inference import Inference
from .intake import Intake
from .ledger import Ledger
from .output import Output
from .state import StreamFacts, StreamState, slow_hint, stream_state

#: Parameters are repeated in every status, each ten seconds, to a gateway that keeps them in memory; a workflow of
#: megabytes is named by its hash alone.
MAX_PARAMS_BYTES = 64 * 1024


class Report:
    """Reads the parts of a stream; changes nothing but the last accepted parameters, which it keeps."""

    def __init__(
        self,
        pipeline: str,
        inference: Inference,
        ledger: Ledger,
        params: Mapping[str, Any],
        clock: Callable[[], float],
    ) -> None:
        self._pipeline = pipeline
        self._inference = inference
        self._ledger = ledger
        self._clock = clock
        self._started_at = clock()
        self._started_at_ms = now_ms()
        self._params_at_ms: int | None = None
        self.running = False
        self.intake: Intake | Generator | None = None
        self.output: Output | None = None
        self._keep(params)

    def updated(self, params: Any) -> dict[str, Any] | None:
        """Parameters were accepted; gives what an event may repeat of them."""
        self._keep(params if isinstance(params, Mapping) else {})
        self._params_at_ms = now_ms()
        return self._params

    def _keep(self, params: Mapping[str, Any]) -> None:
        text = json.dumps(params, sort_keys=True, default=str).encode()
        self._params_hash = hashlib.md5(text, usedforsecurity=False).hexdigest()
        small = len(text) <= MAX_PARAMS_BYTES
        self._params: dict[str, Any] | None = dict(params) if small else {"omitted_bytes": len(text)}

    @property
    def state(self) -> StreamState:
        return stream_state(self._facts())

    def _facts(self) -> StreamFacts:
        now = self._clock()
        inference = self._inference

        def age(moment: float | None) -> float | None:
            return None if moment is None else now - moment

        return StreamFacts(
            running=self.running,
            engine_open=inference.is_open,
            ever_processed=inference.traffic.ever_processed,
            age_s=now - self._started_at,
            input_age_s=age(self.intake.last_input_at if self.intake else None),
            input_fps=self.intake.rate.per_second if self.intake else 0.0,
            output_age_s=age(self.output.last_output_at if self.output else None),
            inference_fps=inference.traffic.rate.per_second,
            error_age_s=age(inference.failures.last_at),
            restart_age_s=age(inference.last_reopen_at),
            workflow_refused=inference.refused is not None,
        )

    def status(self) -> dict[str, Any]:
        """The payload of the ``status`` event, ai-runner's shape and our counters beside it."""
        inference, intake, output = self._inference, self.intake, self.output
        traffic, failures = inference.traffic, inference.failures
        now = now_ms()
        sustainable = traffic.estimate.sustainable_fps(self._clock())
        return {
            "type": "status",
            "pipeline": self._pipeline,
            "state": self.state.value,
            "start_time": self._started_at_ms,
            "last_state_update_time": now,
            "input_status": {
                "last_input_time": self._wall_ms(intake.last_input_at if intake else None),
                "fps": round(intake.rate.per_second, 1) if intake else 0.0,
            },
            "inference_status": {
                "last_output_time": self._wall_ms(output.last_output_at if output else None),
                "fps": round(output.rate.per_second, 1) if output else 0.0,
                "processed_fps": round(traffic.rate.per_second, 1),
                "graph_ms": round(traffic.estimate.graph_ms, 2),
                "lane": inference.lane,
                "latency_budget_ms": round(traffic.budget_s * 1000),
                "sustainable_fps": sustainable and round(sustainable, 1),
                "hint": slow_hint(intake.rate.per_second if intake else 0.0, sustainable, traffic.budget_s),
                "last_params_update_time": self._params_at_ms,
                "last_params": self._params or None,
                "last_params_hash": self._params_hash,
                "params_version": inference.parameters.version,
                "last_error_time": self._wall_ms(failures.last_at),
                "last_error": failures.last,
                "last_restart_time": self._wall_ms(inference.last_reopen_at),
                "last_restart_reason": inference.last_death.reason if inference.last_death else None,
                "last_restart_logs": inference.last_death.log.splitlines() if inference.last_death else None,
                "restart_count": inference.reopened,
            },
            "codec": self._codec(),
            "timing": output.timing.as_json() if output else None,
            "frames": self._ledger.as_json(),
            "lost_output_segments": output.lost_segments if output else 0,
            "last_status_timestamp": now,
            "timestamp": now,
        }

    def _codec(self) -> dict[str, Any]:
        """What decodes and encodes now; null before the first picture. A fallback says why it is not the GPU."""
        decoder = self.intake.decoder if isinstance(self.intake, Intake) else None
        encoder = self.output.encoder if self.output else None
        h264 = encoder.h264 if encoder else None
        return {
            "decoder": decoder and {"device": decoder.device, "fallback": decoder.fallback or None},
            "encoder": h264
            and {
                "name": h264.name,
                "preset": h264.preset,
                "bit_rate": h264.bit_rate,
                "load": round(h264.load, 2),
                "fallback": h264.fallback or None,
            },
        }

    def _wall_ms(self, moment: float | None) -> int | None:
        """A loop time as milliseconds since the Unix epoch."""
        return None if moment is None else round((time.time() - (self._clock() - moment)) * 1000)
