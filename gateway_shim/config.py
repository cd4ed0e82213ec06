"""Where the settings of the shim come from: read once, each from the first source that has it.

Sources in order: command line, environment, the ``[shim]`` table of ``headrace.toml``, default. A variable that is
set but empty counts as not set. Everything wrong is reported together, one sentence each, and nothing starts.

This is the only module of the shim that reads the environment.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import Option
from .settings import Settings, options


class SettingsError(ValueError):
    """What is wrong with the settings, one sentence for each; nothing was started."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = tuple(sentences)


@dataclass(frozen=True)
class Row:
    """One line of ``headrace config``."""

    name: str
    value: str
    source: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One ``--name`` for each setting. Secrets have ``--name-file`` only: arguments are visible to everybody."""
    parser.add_argument("--config", metavar="FILE", help="settings file (default: headrace.toml, when it exists)")
    for name, how in options().items():
        flag = "--" + name.replace("_", "-")
        if how.secret:
            parser.add_argument(f"{flag}-file", metavar="FILE", help=f"file with {how.help}")
        else:
            parser.add_argument(flag, metavar="VALUE", help=f"{how.help} ({how.allowed})")


def load(arguments: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process. Raises SettingsError with one sentence for each thing wrong.

    arguments: what ``add_arguments`` parsed, by name; None means not given.
    environ: the environment, by default this process's.
    """
    arguments = {name: value for name, value in (arguments or {}).items() if value is not None}
    environ = os.environ if environ is None else environ
    wrong: list[str] = []
    file, table = _read_table(arguments.get("config"), environ.get("HEADRACE_CONFIG"), wrong)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, how in options().items():
        found = _find(name, how, arguments, environ, file, table, wrong)
        if found is None:
            continue
        raw, source = found
        try:
            values[name] = how.parse(raw)
        except (ValueError, OverflowError):
            shown = "the secret" if how.secret else repr(raw)
            wrong.append(f"{name} from {source} is {shown}, but must be {how.allowed}.")
        sources[name] = source
    settings = Settings(**values, sources=sources)
    if not wrong:
        wrong += _inconsistencies(settings)
    if wrong:
        raise SettingsError(wrong)
    return settings


def supervised(environ: Mapping[str, str] | None = None) -> bool:
    """Whether supervisord started us, and so holds the other end of our standard input."""
    return bool((os.environ if environ is None else environ).get("SUPERVISOR_ENABLED"))


def describe(settings: Settings) -> list[Row]:
    """Every setting with its value, secrets hidden, and where it came from."""
    rows = []
    for name, how in options().items():
        value = getattr(settings, name)
        if how.secret:
            text = "(set, hidden)" if value else "(not set)"
        elif isinstance(value, tuple):
            text = ",".join(value)
        else:
            text = "" if value is None else str(value)
        rows.append(Row(name, text, settings.sources.get(name, "default")))
    return rows


def _read_table(argument: str | None, variable: str | None, wrong: list[str]) -> tuple[str, dict[str, Any]]:
    """The ``[shim]`` table and the name of its file. A file that was named must exist; the default one need not."""
    named = argument or variable
    file = Path(named or "headrace.toml").expanduser()
    if not named and not file.exists():
        return str(file), {}
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        wrong.append(f"The settings file {file} cannot be read: {exc}.")
        return str(file), {}
    table = document.get("shim", {})
    if not isinstance(table, dict):
        wrong.append(f"[shim] in {file} is {table!r}, but must be a table.")
        return str(file), {}
    known = [name + suffix for name, how in options().items() for suffix in (("", "_file") if how.secret else ("",))]
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            wrong.append(f"{name} in [shim] of {file} is not a setting.{hint}")
    return str(file), table


def _find(
    name: str,
    how: Option,
    arguments: Mapping[str, Any],
    environ: Mapping[str, str],
    file: str,
    table: Mapping[str, Any],
    wrong: list[str],
) -> tuple[Any, str] | None:
    """The raw value and its source, or None when no source has one."""
    if name in arguments:
        return arguments[name], f"command line --{name.replace('_', '-')}"
    variables = (f"HEADRACE_{name.upper()}", *how.environment)
    if how.secret:
        candidates = [
            (arguments.get(f"{name}_file"), f"command line --{name.replace('_', '-')}-file", True),
            *((environ.get(variable), f"environment {variable}", False) for variable in variables),
            *((environ.get(f"{variable}_FILE"), f"environment {variable}_FILE", True) for variable in variables),
            (table.get(name), f"{name} in {file}", False),
            (table.get(f"{name}_file"), f"{name}_file in {file}", True),
        ]
        for value, source, is_file in candidates:
            if not value:
                continue
            return _read_secret(str(value), source, wrong) if is_file else (value, source)
        return None
    for variable in variables:
        if environ.get(variable, "").strip():
            return environ[variable], f"environment {variable}"
    return (table[name], f"{name} in {file}") if name in table else None


def _read_secret(file: str, source: str, wrong: list[str]) -> tuple[str, str] | None:
    try:
        secret = Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as exc:
        wrong.append(f"The file {file} that {source} names cannot be read: {exc}.")
        return None
    if not secret:
        wrong.append(f"The file {file} that {source} names is empty.")
        return None
    return secret, f"{source} ({file})"


def _inconsistencies(settings: Settings) -> list[str]:
    """What only shows when settings are seen together."""
    wrong = []
    if settings.orch_url and not settings.public_url():
        wrong.append(
            f"orch_url is set while listen_host is {settings.listen_host!r}, which tells the orchestrator no "
            "address: set capability_url (environment CAPABILITY_URL) to where it reaches this machine."
        )
    if settings.default_workflow is not None and not settings.default_workflow.is_file():
        wrong.append(
            f"default_workflow from {settings.sources.get('default_workflow', 'default')} is "
            f"{str(settings.default_workflow)!r}, but there is no such file."
        )
    return wrong + [
        f"{name} from {settings.sources.get(name, 'default')} has more than one line."
        for name in ("auth_token", "orch_secret")
        if len(getattr(settings, name).splitlines()) > 1
    ]
