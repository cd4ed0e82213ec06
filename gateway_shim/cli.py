"""The command ``headrace``: what an operator types. Every command imports what it needs and no more.

Exit codes: 0 done, 1 it failed, 2 it was asked wrongly or could not be answered; what went wrong is one sentence on
stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from proto import VERSION, engine_address

from . import config
from .settings import Settings, options

if TYPE_CHECKING:
    from proto import engine_pb2 as pb

    from .engine_client import EngineClient

Answer = TypeVar("Answer")

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

    check = commands.add_parser(
        "check",
        help="say what is wrong with a workflow",
        description="Check a workflow, in ComfyUI's API format or as its editor saves it, on the engine that runs; "
        "without one an engine is started for the check. Exit code 0: it runs, 1: it does not, 2: it could not be "
        "checked.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    check.add_argument("workflow", metavar="FILE", help="the workflow; - reads it from standard input")
    nodes = commands.add_parser(
        "nodes",
        help="list the node classes of the engine's ComfyUI",
        description="List the node classes of the engine's ComfyUI; of a single one, everything about it.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    nodes.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="only classes that begin so")
    for question, run in ((check, _check), (nodes, _nodes)):
        question.add_argument("--json", action="store_true", help="print JSON")
        question.add_argument("--config", metavar="FILE", help="settings file (default: headrace.toml)")
        question.add_argument("--engine", dest="engine_addresses", metavar="ADDRESS", help="ask this engine")
        question.set_defaults(run=run)

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


def _settings(arguments: argparse.Namespace) -> Settings:
    return config.load(vars(arguments))


def _given(arguments: argparse.Namespace) -> dict[str, str]:
    """What the command line set, as the environment through which the programs get it."""
    names = ["config"]
    for name, option in options().items():
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
    _port_is_free(settings)
    launch = supervise.plan(environment, settings.run_dir, engines=engines, drain_s=settings.drain_s)
    supervise.prepare(launch)
    print(
        f"headrace {VERSION}: http://{settings.listen_host}:{settings.listen_port}, {engines} "
        f"engine{'s'[: engines != 1]}, logs in {launch.run_dir}/log; Ctrl-C stops",
        flush=True,
    )
    supervise.execute(launch, follow=not arguments.quiet)


def _port_is_free(settings: Settings) -> None:
    """Raises CannotStart where it is taken: supervisord would start the shim again and again."""
    from .supervise import CannotStart

    family = socket.AF_INET6 if ":" in settings.listen_host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.listen_host, settings.listen_port))
        except socket.gaierror:
            return  # the shim says what is wrong with the name
        except OSError as exc:
            raise CannotStart(
                f"port {settings.listen_port} of {settings.listen_host} cannot be had ({exc.strerror}); end the "
                "program that has it, perhaps another headrace, or give --listen-port"
            ) from None


def _engines(settings: Settings) -> int:
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
    settings = _settings(arguments)
    tables = {"shim": [(row.name, row.value, row.source) for row in config.describe(settings)]}
    if _engines(settings):
        tables["engine"] = _engine_settings(arguments, settings)
    rows = [row for table in tables.values() for row in table]
    width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for number, (name, table) in enumerate(tables.items()):
        print("\n" * bool(number) + f"[{name}]")
        for setting, value, source in table:
            print(f"{setting:{width}}  {value:{value_width}}  {source}")
    return 0


def _engine_settings(arguments: argparse.Namespace, settings: Settings) -> list[tuple[str, str, str]]:
    """Asked of the engine's own code, which this program never imports; for the first engine of `headrace up`."""
    environment = dict(os.environ) | _given(arguments) | {"HEADRACE_RUN_DIR": str(settings.run_dir)}
    command = [sys.executable, "-P", "-m", "engine.config"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise config.SettingsError([done.stderr.strip()])
    return [(name, value, source) for name, value, source in (line.split("\t") for line in done.stdout.splitlines())]


def _ai_models(arguments: argparse.Namespace) -> int:
    from .orchestrator import ai_models

    print(json.dumps(ai_models.entries(_settings(arguments)), indent=2))
    return 0


#: For a check: ComfyUI lists its model folders anew, which may lie on a slow disk.
_ANSWER_S = 60.0


def _check(arguments: argparse.Namespace) -> int:
    from . import findings as report

    try:
        name = arguments.workflow
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        return _refuse(f"{arguments.workflow} cannot be read: {exc}")
    if not text.strip():
        return _refuse(f"{arguments.workflow} is empty")
    answer = _ask(arguments, lambda engine: engine.check(text, _ANSWER_S))
    if isinstance(answer, str):
        return _refuse(answer)
    found, comfyui = answer
    if arguments.json:
        print(json.dumps(report.as_json(found, comfyui), indent=2, ensure_ascii=False))
    else:
        print(report.as_text("workflow" if name == "-" else Path(name).name, found, comfyui))
    return 1 if any(map(report.is_error, found)) else 0


def _nodes(arguments: argparse.Namespace) -> int:
    from . import findings as report

    answer = _ask(arguments, lambda engine: engine.nodes(arguments.prefix, _ANSWER_S))
    if isinstance(answer, str):
        return _refuse(answer)
    known, _ = answer
    exact = [node for node in known if node.class_type == arguments.prefix]
    known = exact or known
    if arguments.json:
        print(json.dumps(report.nodes_json(known), indent=2, ensure_ascii=False))
    else:
        print("\n".join(report.node_lines(known)) or f"no class begins with {arguments.prefix!r}")
    return 0 if known else 1


def _ask(
    arguments: argparse.Namespace, question: Callable[[EngineClient], Awaitable[Answer]]
) -> tuple[Answer, pb.ComfyUI] | str:
    """An engine's answer, with its ComfyUI; or the sentence that says why there is none."""
    import asyncio

    from proto import engine_pb2 as pb

    from .errors import HeadraceError
    from .localnet.programs import embedded_comfyui
    from .localnet.progress import Progress
    from .nearby_engine import nearby_engine
    from .supervise import CannotStart

    settings = _settings(arguments)
    environment = dict(os.environ)  # handed on as it is, made independent of the current directory
    environment["COMFYUI_DIR"] = environment.get("COMFYUI_DIR") or embedded_comfyui()
    file = arguments.config or environment.get("HEADRACE_CONFIG") or "headrace.toml"
    if Path(file).is_file():
        environment["HEADRACE_CONFIG"] = str(Path(file).absolute())

    async def ask() -> tuple[Answer, pb.ComfyUI]:
        async with nearby_engine(settings.engine_addresses, environment, Progress(sys.stderr)) as engine:
            answer = await question(engine)
            return answer, engine.info.comfyui if engine.info is not None else pb.ComfyUI()

    try:
        return asyncio.run(ask())
    except (HeadraceError, CannotStart) as exc:
        return str(exc)


def _refuse(sentence: str) -> int:
    print(f"headrace: {sentence}", file=sys.stderr)
    return 2


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
