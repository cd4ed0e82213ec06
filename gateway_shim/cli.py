"""The command ``headrace``: what an operator types. Every command imports what it needs and no more.

Exit codes: 0 done, 1 it failed, 2 it was asked wrongly; what went wrong is one sentence on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proto import VERSION, engine_address

from . import config

_EPILOG = """\
Settings come from the command line, then the environment (HEADRACE_<NAME>, and ORCH_URL, ORCH_SECRET, CAPABILITY_*,
AUTH_TOKEN, MODEL_ID), then headrace.toml, then defaults; `headrace config` shows the result and where each came from.
The engine finds ComfyUI through COMFYUI_DIR and takes its own settings as HEADRACE_ENGINE_<NAME>;
`python -m engine --help` lists them."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace", description="ComfyUI workflows on live video of the Livepeer network.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"headrace {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser(
        "up",
        help="run the shim and the engines until Ctrl-C",
        description="Run the shim and the engines under supervisord, in the foreground, until Ctrl-C or SIGTERM.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    up.add_argument("--engines", dest="engine_count", metavar="N", help="engines to run, one for each GPU (1)")
    up.add_argument("--quiet", action="store_true", help="do not print the programs' logs; they are in RUN_DIR/log")
    up.add_argument("--port", dest="listen_port", metavar="PORT", help="short for --listen-port")
    up.add_argument("--workflow", dest="default_workflow", metavar="FILE", help="short for --default-workflow")
    config.add_arguments(up.add_argument_group("settings of the shim"))  # type: ignore[arg-type]
    up.set_defaults(run=_up)

    demo = commands.add_parser(
        "demo",
        help="a clip through the whole chain on this machine",
        description="Play a clip in real time through a small network on this machine: broker, orchestrator, shim, "
        "engine. Changes a parameter half way and leaves the result, a contact sheet and a report.",
        allow_abbrev=False,
    )
    demo.add_argument("--input", type=Path, metavar="FILE", help="a video file (default: the clip of `make demo`)")
    demo.add_argument("--workflow", type=Path, metavar="FILE", help="a ComfyUI workflow (default: the demo's own)")
    demo.add_argument("--seconds", type=float, default=20.0, metavar="S", help="how long it plays (default: 20)")
    demo.add_argument("--output", type=Path, default=Path("demo-out"), metavar="DIR", help="default: demo-out")
    demo.add_argument(
        "--update",
        type=_json_object,
        metavar="JSON",
        help='node override sent half way, {"node": {"input": value}} (default: the demo workflow\'s own)',
    )
    demo.add_argument("--size", type=_size, metavar="WxH", help="output size (default: the clip's, at most 640 wide)")
    demo.set_defaults(run=_demo)

    shown = commands.add_parser(
        "config",
        help="print the settings and where each came from",
        description="Print the shim's settings, secrets hidden, and where each came from.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    config.add_arguments(shown)
    shown.set_defaults(run=_config)

    models = commands.add_parser(
        "ai-models",
        help="print this machine's entry for the orchestrator's aiModels.json",
        description="Print this machine's entry for the orchestrator's aiModels.json (go-livepeer -aiModels).",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    config.add_arguments(models)
    models.set_defaults(run=_ai_models)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return int(width), int(height)


def _settings(arguments: argparse.Namespace) -> config.Settings:
    return config.load(vars(arguments))


def _given(arguments: argparse.Namespace) -> dict[str, str]:
    """What the command line set, as the environment through which the programs get it."""
    names = ["config"]
    for name, option in config.options().items():
        names.append(f"{name}_file" if option.secret else name)
    values = {name: getattr(arguments, name, None) for name in names}
    return {f"HEADRACE_{name.upper()}": str(value) for name, value in values.items() if value is not None}


def _up(arguments: argparse.Namespace) -> int:
    from . import supervise

    settings = _settings(arguments)
    environment = dict(os.environ) | _given(arguments)  # handed on as it is; config.load has read what is ours
    engines = _engines(settings)
    if engines:
        _engine_installed()
    launch = supervise.plan(environment, settings.run_dir, engines=engines)
    supervise.prepare(launch)
    print(
        f"headrace {VERSION}: http://{settings.listen_host}:{settings.listen_port}, {engines} "
        f"engine{'s'[: engines != 1]}, logs in {launch.run_dir}/log; Ctrl-C stops",
        flush=True,
    )
    supervise.execute(launch, follow=not arguments.quiet)


def _engines(settings: config.Settings) -> int:
    """How many to run here: none when the engines' addresses say that they run elsewhere."""
    here = engine_address(0, settings.run_dir) in settings.engine_addresses
    return settings.engine_count if here else 0


def _engine_installed() -> None:
    """Raises CannotStart where only the shim is: its engine would die of an import, again and again."""
    from importlib.util import find_spec

    from .supervise import CannotStart

    missing = [name for name in ("torch", "grpc_reflection") if find_spec(name) is None]
    if missing:
        raise CannotStart(
            f"the engine cannot run here without {' and '.join(missing)}: `pip install 'headrace[engine]'` installs "
            "them; for an engine of another machine give --engine-address"
        )


def _demo(arguments: argparse.Namespace) -> int:
    from .localnet import demo

    _engine_installed()
    options = demo.Options(
        clip=arguments.input,
        workflow=arguments.workflow,
        seconds=arguments.seconds,
        output=arguments.output,
        update=arguments.update,
        size=arguments.size,
    )
    return demo.main(options, dict(os.environ))


def _config(arguments: argparse.Namespace) -> int:
    rows = config.describe(_settings(arguments))
    width = max(len(row.name) for row in rows)
    value_width = max(len(row.value) for row in rows)
    for row in rows:
        print(f"{row.name:{width}}  {row.value:{value_width}}  {row.source}")
    return 0


def _ai_models(arguments: argparse.Namespace) -> int:
    from .orchestrator import ai_models

    print(json.dumps(ai_models.entries(_settings(arguments)), indent=2))
    return 0


def _version(arguments: argparse.Namespace) -> int:
    print(VERSION)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from .supervise import CannotStart

    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except config.SettingsError as exc:
        for sentence in exc.sentences:
            print(f"headrace: {sentence}", file=sys.stderr)
        return 2
    except CannotStart as exc:
        print(f"headrace: {exc}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # `headrace config | head`: the reader has what it wanted. stdout must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
