"""How one setting is read and checked: the readers that ``settings`` names in its table.

A reader takes text, or what TOML gives, and raises ValueError for nonsense; ``config`` writes the sentence about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

#: Model ids for which an orchestrator would try to pull an image of its own (go-livepeer ai/worker/docker.go).
BUILT_IN_MODELS = ("comfyui", "noop", "segment_anything_2", "scope")


@dataclass(frozen=True)
class Option:
    """How one setting is read. ``parse`` takes text, or what TOML gives, and raises ValueError for nonsense."""

    help: str
    parse: Callable[[Any], Any]
    allowed: str
    environment: tuple[str, ...] = ()  # names besides HEADRACE_<FIELD>, which goes first
    secret: bool = False  # never shown, never an argument; also read from the file that <NAME>_FILE names


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value.strip()


def integer(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        number = int(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return parse


def seconds(low: float, high: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
        if not low <= number <= high:  # also refuses NaN
            raise ValueError
        return number

    return parse


def choice(*names: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        given = text(value).lower()
        if given not in names:
            raise ValueError
        return given

    return parse


def switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    given = text(value).lower()
    if given in ("1", "true", "yes", "on"):
        return True
    if given in ("0", "false", "no", "off"):
        return False
    raise ValueError


def path(value: Any) -> Path:
    return Path(text(value)).expanduser()


def name(value: Any) -> str:
    given = text(value)
    if not given or not given.isprintable() or any(character.isspace() for character in given):
        raise ValueError
    return given


def model(value: Any) -> str:
    given = name(value)
    if given in BUILT_IN_MODELS or given.startswith("streamdiffusion"):
        raise ValueError
    return given


def currency(value: Any) -> str:
    given = text(value)
    if not given.isalpha():
        raise ValueError
    return given


def url(value: Any) -> str:
    """Without trailing slash: peers append paths by plain concatenation."""
    given = text(value).rstrip("/")
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError
    _ = parts.port  # raises ValueError outside 0..65535
    return given


def hosts(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list):
        raise ValueError
    hosts = tuple(text(name).lower() for name in names if text(name))
    if any(character in host for host in hosts for character in "/@ "):
        raise ValueError
    return hosts


def option(
    summary: str, parse: Callable[[Any], Any], allowed: str, *environment: str, secret: bool = False
) -> dict[str, Option]:
    return {"option": Option(summary, parse, allowed, environment, secret)}
