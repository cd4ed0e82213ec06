"""What the README says, for tests: its commands have to work and its answers have to be the real ones.

A fenced block is run when its opening fence says so: ```` ```sh test ````. A third word names what has to be there
for it, such as a running stream: ```` ```sh test live ````. A ```` ```json answer ```` is what the block before it
prints.

``python -m tests.readme`` prints docs/settings.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    marks: frozenset[str]
    text: str
    line: int  # of its first line, from 1


def blocks(path: Path) -> list[Block]:
    """Every fenced block of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        line = text.count("\n", 0, match.start("body")) + 1
        found.append(Block(language, frozenset(marks), match["body"], line))
    return found


def commands(path: Path, *needs: str) -> list[Block]:
    """Blocks marked to be run by a shell, in order; those that need exactly ``needs``, by default nothing."""
    return [block for block in blocks(path) if block.language == "sh" and block.marks == {"test", *needs}]


def answer(path: Path, to: Block) -> Block | None:
    """The ``json answer`` block that follows a command, if the next block is one."""
    after = [block for block in blocks(path) if block.line > to.line]
    return after[0] if after and "answer" in after[0].marks else None


# ---- settings


@dataclass(frozen=True)
class Setting:
    """One setting of either program, as an operator meets it."""

    table: str  # of headrace.toml
    name: str
    variables: tuple[str, ...]  # first the one that wins
    default: str
    meaning: str
    allowed: str


#: Defaults that are computed, in words.
_COMPUTED = {
    ("shim", "run_dir"): "`$XDG_RUNTIME_DIR/headrace`, else `/tmp/headrace-UID`",
    ("shim", "engine_address"): "`unix:RUN_DIR/engine-N.sock`",
    ("shim", "model_id"): "`capability_name`",
    ("engine", "address"): "`unix:RUN_DIR/engine-0.sock`",
    ("engine", "comfyui_dir"): "what `make comfyui` installed, else `none`",
}


def settings() -> Iterator[Setting]:
    """All there are, read from the two modules that define them."""
    from engine import config as engine
    from gateway_shim import settings as shim

    for item in dataclasses.fields(shim.Settings):
        if (how := item.metadata.get("option")) is None:
            continue
        own = f"HEADRACE_{item.name.upper()}"
        yield Setting("shim", item.name, (own, *how.environment), _shown("shim", item), how.help, how.allowed)
    for item in dataclasses.fields(engine.Settings):
        variable = item.metadata["env"] or f"HEADRACE_ENGINE_{item.name.upper()}"
        yield Setting("engine", item.name, (variable,), _shown("engine", item), item.metadata["help"], "")


def _shown(table: str, item: dataclasses.Field[object]) -> str:
    if words := _COMPUTED.get((table, item.name)):
        return words
    if item.default in (None, "", ()):
        return ""
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"


def settings_page() -> str:
    """docs/settings.md."""
    every = list(settings())
    lines = [
        "# Settings",
        "",
        "Written by `make settings` from `gateway_shim/settings.py` and `engine/config.py`.",
        "",
        "Each comes from the first place that has it: command line, environment, `headrace.toml`, default. A",
        "variable that is set but empty counts as not set. `headrace config` prints what both programs make of them.",
        "",
        "## Shim: `headrace up --NAME`, table `[shim]`",
        "",
        "The argument of `listen_port` is `--listen-port`. Secrets are never arguments and may be files:",
        "`ORCH_SECRET_FILE`, `--orch-secret-file`. Of several variables the first that is set wins.",
        "",
        "| setting | environment | default | meaning | allowed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in (one for one in every if one.table == "shim"):
        names = ", ".join(f"`{name}`" for name in one.variables)
        lines.append(f"| `{one.name}` | {names} | {one.default} | {one.meaning} | {one.allowed} |")
    lines += [
        "",
        "## Engine: environment, table `[engine]`",
        "",
        "`headrace up` hands its environment on, so these are set there or in `headrace.toml`.",
        "",
        "| setting | environment | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for one in (one for one in every if one.table == "engine"):
        lines.append(f"| `{one.name}` | `{one.variables[0]}` | {one.default} | {one.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(settings_page(), end="")
