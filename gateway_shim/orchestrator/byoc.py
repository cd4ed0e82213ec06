"""Registration of a BYOC capability (protocol.md 3.1): two calls, an orchestrator that never asks back."""

from __future__ import annotations

from typing import Any, Protocol

import aiohttp

from ..settings import Settings

#: An orchestrator answers from memory.
CALL_TIMEOUT_S = 5.0
_SHOWN = 300


class RegistrationFailed(Exception):
    """This attempt did not work; the next one may."""


class RegistrationRefused(RegistrationFailed):
    """The orchestrator understood and said no: somebody has to change a setting, here or there."""


class Registration(Protocol):
    """How one orchestrator learns of us. Both calls may be made at any time, in any order, again and again."""

    name: str  # for people

    async def register(self) -> None:
        """Raises RegistrationFailed or RegistrationRefused."""

    async def unregister(self) -> None:
        """Raises RegistrationFailed."""


class ByocRegistration:
    """The capability of ``settings`` at ``settings.orch_url``, reachable at ``public_url``."""

    def __init__(self, http: aiohttp.ClientSession, settings: Settings, public_url: str) -> None:
        self._http = http
        self._settings = settings
        self._public_url = public_url.rstrip("/")  # the orchestrator appends paths as they are
        self.name = f"{settings.capability_name} ({self._public_url}) at {settings.orch_url}"

    def body(self) -> dict[str, Any]:
        """Exactly the keys of go-livepeer's ExternalCapability (byoc/types.go)."""
        settings = self._settings
        body: dict[str, Any] = {
            "name": settings.capability_name,
            "description": settings.capability_description,
            "url": self._public_url,
            "capacity": settings.capacity,
            "price_per_unit": settings.capability_price_per_unit,
            "price_scaling": settings.capability_price_scaling,
            "currency": settings.capability_currency,
        }
        if settings.auth_token:
            body["token"] = settings.auth_token
        return body

    async def register(self) -> None:
        await self._post("/capability/register", json=self.body())

    async def unregister(self) -> None:
        # The name as plain text, not JSON.
        await self._post(
            "/capability/unregister",
            data=self._settings.capability_name.encode(),
            content_type="text/plain; charset=utf-8",
        )

    async def _post(self, path: str, *, content_type: str = "application/json", **body: Any) -> None:
        headers = {"Content-Type": content_type}
        if self._settings.orch_secret:
            headers["Authorization"] = self._settings.orch_secret  # raw: go-livepeer compares the whole header
        try:
            async with self._http.post(
                self._settings.orch_url + path,
                headers=headers,
                ssl=self._settings.verify_tls,  # orchestrators sign their own certificates
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT_S),
                **body,
            ) as response:
                text = (await response.content.read(_SHOWN)).decode("utf-8", "replace").strip()
                status = response.status
        except TimeoutError as exc:
            raise RegistrationFailed(f"no answer within {CALL_TIMEOUT_S:g} s") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise RegistrationFailed(f"{type(exc).__name__}: {exc}") from exc
        if status == 200:
            return
        message = f"answered {status}: {text}"
        if 400 <= status < 500:
            raise RegistrationRefused(message)
        raise RegistrationFailed(message)
