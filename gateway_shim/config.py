"""Settings of the shim: frozen, read once, each from the first source that has it.

Sources in order: command line, environment, the ``[shim]`` table of ``headrace.toml``, default. A variable that is
set but empty counts as not set. Everything wrong is reported together, one sentence each, and nothing starts.

This is the only module of the shim that reads the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from proto import engine_address, run_directory

from . import options as read
from .keys import BUDGET_MS, POLICIES
from .options import Option, option

#: Largest body the gateway passes on is 10 MiB (go-livepeer byoc/stream_gateway.go); the rest is headroom.
BODY_LIMIT_BYTES = 16 * 1024 * 1024

#: From the fastest; hot-path.md section 5 has what each costs.
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium")

_LEVELS = ("debug", "info", "warning", "error")

#: Addresses that mean "all interfaces" and tell nobody how to reach us.
_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104


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


# ---- the settings --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Everything the shim can be told. ``load`` checks; a value given in code is taken as it is."""

    listen_host: str = field(
        default="127.0.0.1", metadata=option("address to listen on", read.name, "a host name or address")
    )
    listen_port: int = field(
        default=8188,
        metadata=option("port to listen on; 0: a free one", read.integer(0, 65535), "a whole number from 0 to 65535"),
    )
    run_dir: Path = field(
        default_factory=run_directory, metadata=option("where sockets and journals lie", read.path, "a directory")
    )
    engine_address: str = field(
        default="",
        metadata=option(
            "gRPC addresses of engines", read.text, "unix:/path/to.sock or host:port, separated by commas"
        ),
    )
    engine_count: int = field(
        default=1,
        metadata=option(
            "engines under run_dir, when engine_address names none",
            read.integer(0, 64),
            "0 to 64",
            "HEADRACE_ENGINES",
        ),
    )
    lane: str = field(
        default="auto",
        metadata=option(
            "how planes get to the engine; auto: shared memory where engine and shim are on one machine",
            read.choice("auto", "bytes"),
            "auto or bytes",
        ),
    )
    # With supervisord's five seconds between two looks, and the second in which it starts another: within ten.
    engine_silence_s: float = field(
        default=3.0,
        metadata=option(
            "silence of a ready engine after which the watchdog restarts it",
            read.seconds(0.1, 3600),
            "seconds, 0.1 to 3600",
        ),
    )
    capacity: int = field(
        default=1,
        metadata=option("streams at once", read.integer(1, 64), "a whole number from 1 to 64", "CAPABILITY_CAPACITY"),
    )
    orch_url: str = field(
        default="",
        metadata=option("orchestrator to register with; none: do not", read.url, "http(s)://host:port", "ORCH_URL"),
    )
    orch_secret: str = field(
        default="",
        repr=False,
        metadata=option("the orchestrator's -orchSecret", read.text, "text", "ORCH_SECRET", secret=True),
    )
    capability_name: str = field(
        default="comfystream",
        metadata=option("name clients ask for", read.name, "text without spaces", "CAPABILITY_NAME"),
    )
    capability_description: str = field(
        default="",
        metadata=option("description sent with the registration", read.text, "text", "CAPABILITY_DESCRIPTION"),
    )
    capability_url: str = field(
        default="",
        metadata=option(
            "where the orchestrator reaches us; a path prefix is allowed",
            read.url,
            "http(s)://host:port",
            "CAPABILITY_URL",
        ),
    )
    capability_price_per_unit: int = field(
        default=0,
        metadata=option(
            "price of one second, in currency / price_scaling",
            read.integer(0, 2**63 - 1),
            "a whole number from 0",
            "CAPABILITY_PRICE_PER_UNIT",
        ),
    )
    capability_price_scaling: int = field(
        default=1,
        metadata=option(
            "divisor of the price", read.integer(1, 2**63 - 1), "a whole number from 1", "CAPABILITY_PRICE_SCALING"
        ),
    )
    # An orchestrator without a price feed for another currency drops the connection unanswered (protocol.md 3.1).
    capability_currency: str = field(
        default="wei",
        metadata=option(
            "wei, eth, or one the orchestrator has a price feed for", read.currency, "letters", "CAPABILITY_CURRENCY"
        ),
    )
    auth_token: str = field(
        default="",
        repr=False,
        metadata=option(
            "bearer token callers must send; none: no check", read.text, "text", "AUTH_TOKEN", secret=True
        ),
    )
    model_id: str = field(
        default="",
        metadata=option(
            "model_id of /version and aiModels.json; by default the capability's name",
            read.model,
            f"text without spaces, none of {', '.join(read.BUILT_IN_MODELS)}, streamdiffusion*",
            "MODEL_ID",
        ),
    )
    pipeline: str = field(
        default="live-video-to-video",
        metadata=option("pipeline of /version and events", read.name, "text without spaces", "PIPELINE"),
    )
    reregister_s: float = field(
        default=60.0,
        metadata=option("how often to register again while idle", read.seconds(1, 86400), "seconds, 1 to 86400"),
    )
    latency_budget_ms: int = field(
        default=400,
        metadata=option(
            "how late a frame may be, in streams that do not say",
            read.integer(*BUDGET_MS),
            "milliseconds, 20 to 30000",
        ),
    )
    fallback: str = field(
        default="auto",
        metadata=option(
            "what viewers see while the graph gives nothing, in streams that do not say: auto: the last picture for "
            "half a second, then the input; hold: the last picture, dimmed; overlay: that with the reason on it",
            read.choice(*POLICIES),
            ", ".join(POLICIES),
        ),
    )
    encoder_preset: str = field(
        default="auto",
        metadata=option(
            "x264 preset: slower is better looking at the same bit rate; auto: superfast, or ultrafast where that is "
            "more than the machine can do",
            read.choice("auto", *PRESETS),
            ", ".join(("auto", *PRESETS)),
        ),
    )
    codec: str = field(
        default="auto",
        metadata=option(
            "where video is decoded and encoded; auto: NVDEC and NVENC where they work",
            read.choice("auto", "cpu", "cuda"),
            "auto, cpu or cuda",
        ),
    )
    codec_threads: int = field(
        default=0,
        metadata=option(
            "threads of each video codec on the CPU; 0: from the cores, the capacity and the picture's size",
            read.integer(0, 64),
            "0 to 64",
        ),
    )
    bit_rate: int = field(
        default=0,
        metadata=option(
            "bit rate of the output's video; 0: one that suits its size and frame rate",
            read.integer(0, 200_000_000),
            "bits per second, 0 to 200000000",
        ),
    )
    input_timeout_s: float = field(
        default=60.0,
        metadata=option("input silence after which a stream ends", read.seconds(1, 86400), "seconds, 1 to 86400"),
    )
    body_limit_bytes: int = field(
        default=BODY_LIMIT_BYTES,
        metadata=option("largest request body", read.integer(1024, 2**30), "bytes, 1024 to 1073741824"),
    )
    default_workflow: Path | None = field(
        default=None,
        metadata=option("workflow of streams that bring none; none: pass-through", read.path, "a JSON file"),
    )
    trickle_hosts: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "hosts, or host:port, that channel URLs may name besides the orchestrator's; * allows any",
            read.hosts,
            "host names separated by commas",
        ),
    )
    verify_tls: bool = field(  # off: orchestrators make their own certificates (go-livepeer server/cert.go)
        default=False, metadata=option("check the orchestrator's certificate", read.switch, "true or false")
    )
    # `headrace up` lets supervisord wait for this and for the end of a stream (manager.END_S, CUT_OFF_S) beyond it.
    drain_s: float = field(
        default=5.0,
        metadata=option("time for streams to end at shutdown", read.seconds(0, 600), "seconds, 0 to 600"),
    )
    # Gateways give a worker up after 30 s of silence (protocol.md 1.8), of which a segment and our start take some.
    resume_within_s: float = field(
        default=20.0,
        metadata=option(
            "silence after which streams of a killed shim still go on in the next one; 0: always handed over",
            read.seconds(0, 600),
            "seconds, 0 to 600",
        ),
    )
    log_format: str = field(
        default="text", metadata=option("form of log lines", read.choice("text", "json"), "text or json")
    )
    log_level: str = field(
        default="info",
        metadata=option("least severity logged", read.choice(*_LEVELS), "debug, info, warning or error"),
    )
    access_log: bool = field(
        default=False, metadata=option("log every request; /health is polled", read.switch, "true or false")
    )
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.engine_address:
            object.__setattr__(self, "engine_address", engine_address(directory=self.run_dir))
        if not self.model_id:
            object.__setattr__(self, "model_id", self.capability_name)

    @property
    def engine_addresses(self) -> tuple[str, ...]:
        """Where the engines are; at least one."""
        if self.engine_address == engine_address(directory=self.run_dir):
            return tuple(engine_address(index, self.run_dir) for index in range(max(1, self.engine_count)))
        return tuple(address for part in self.engine_address.split(",") if (address := part.strip()))

    def public_url(self, port: int | None = None) -> str:
        """Where the orchestrator reaches us, without trailing slash; empty when nobody said and we cannot know.

        port: the one that is really bound, when ``listen_port`` is 0.
        """
        if self.capability_url:
            return self.capability_url.rstrip("/")
        if self.listen_host in _WILDCARDS:
            return ""
        return self.local_url(port)

    def local_url(self, port: int | None = None) -> str:
        """Where programs of this machine reach us."""
        host = "127.0.0.1" if self.listen_host in _WILDCARDS else self.listen_host
        return f"http://{f'[{host}]' if ':' in host else host}:{port or self.listen_port}"

    @property
    def channel_hosts(self) -> tuple[str, ...]:
        """Hosts that channel URLs may name; empty means any.

        With no orchestrator configured (it drives us by ``aiModels.json``) its trickle address is unknown until the
        first start, so any host is allowed then; an allow-list closes that.
        """
        if "*" in self.trickle_hosts:
            return ()
        orchestrator = urlsplit(self.orch_url).hostname
        return (*self.trickle_hosts, orchestrator) if orchestrator else self.trickle_hosts


def options() -> dict[str, Option]:
    """Every setting's name and how it is read, in the order of the table in the README."""
    return {item.name: item.metadata["option"] for item in dataclasses.fields(Settings) if "option" in item.metadata}


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
