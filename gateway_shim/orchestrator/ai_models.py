"""The other way an orchestrator learns of us: an entry in its ``aiModels.json`` (protocol.md 4.1)."""

from __future__ import annotations

from typing import Any

from ..settings import Settings


def entries(settings: Settings) -> list[dict[str, Any]]:
    """The file's content for this worker alone, to be written as JSON and given to ``-aiModels``.

    The price is 0: this file counts pixels, the settings count seconds, and go-livepeer wants a bare number.
    The token stands in it in the clear, as the orchestrator needs it.
    """
    entry: dict[str, Any] = {
        "pipeline": settings.pipeline,
        "model_id": settings.model_id,
        "url": settings.public_url() or f"http://THIS-MACHINE:{settings.listen_port}",
    }
    if settings.auth_token:
        entry["token"] = settings.auth_token
    return [entry | {"price_per_unit": 0, "pixels_per_unit": 1, "warm": True, "capacity": settings.capacity}]
