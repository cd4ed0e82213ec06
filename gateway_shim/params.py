"""What a start or an update asks for, read from every shape that callers use (protocol.md 3.3, 4.4, 5.2, 5.5).

Pure: no clock, no network. Everything wrong is found at once, up to MAX_VIOLATIONS, each a Violation with its path;
numbers stay exact (seeds have 64 bits). Whether a node has an input, and which values it takes, is the engine's
knowledge and checked there.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .errors import InvalidRequest, MalformedRequest, Violation
from .json_text import read_json
from .keys import MAX_VIOLATIONS, RESERVED, Keys, is_document, kind, node_path, shortened, shown

CHANNELS = ("subscribe_url", "publish_url", "control_url", "events_url", "data_url")

_MAX_ID_LENGTH = 256
_SHOWN = 20
#: Characters of a name that is worth comparing with what was meant; the comparison is quadratic.
_MAX_COMPARED = 100
#: Characters of a key times those it is compared with, for all keys of an update: 0.02 to 0.2 s of the event loop.
#: Enough for every key of a workflow that people draw, and for the first ones of a workflow of a thousand nodes.
_COMPARISONS = 500_000
#: What comparing with one more name costs besides.
_COMPARISON = 20


@dataclass(frozen=True)
class StartRequest:
    """One start call. A channel that the caller did not enable is None."""

    stream_id: str
    subscribe_url: str | None = None
    publish_url: str | None = None
    control_url: str | None = None
    events_url: str | None = None
    data_url: str | None = None
    workflow: dict[str, Any] | None = None  # None: the configured default, or pass-through
    width: int | None = None  # pixels, even; None: whatever the session decides
    height: int | None = None
    max_framerate: int | None = None  # frames per second, 1..60
    latency_budget_ms: int | None = None  # None: the setting's
    fallback: str | None = None  # one of keys.POLICIES; None: the setting's
    detect_out_resolution: bool = True
    params: dict[str, Any] = field(default_factory=dict)  # as the caller gave them, unwrapped
    aliases: tuple[str, ...] = ()  # other names that callers know this stream by
    model_id: str = ""

    @property
    def channels(self) -> dict[str, str]:
        """URLs by name, only those that exist. Two starts with one id and equal channels are one start."""
        return {name: url for name in CHANNELS if (url := getattr(self, name))}


@dataclass(frozen=True)
class Update:
    """One change of a running stream. None: leave as it is."""

    workflow: dict[str, Any] | None = None  # replaces the whole workflow
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # node id -> input -> value, on top of it
    width: int | None = None
    height: int | None = None
    max_framerate: int | None = None
    latency_budget_ms: int | None = None
    fallback: str | None = None
    show_loading: bool | None = None
    load_model: bool = False

    @property
    def is_empty(self) -> bool:
        return self == Update()


@dataclass(frozen=True)
class _Node:
    title: str
    class_type: str


def parse_start(body: Any, *, require_id: bool, default_id: str = "") -> StartRequest:
    """Read the body of ``/stream/start`` or ``/live-video-to-video``. Unknown keys are ignored, as peers expect.

    require_id: an id must come with the body or as ``default_id`` (the X-Stream-Id header); else one is made from the
    channels, so that a repeated call gets the same.
    Raises MalformedRequest when the body is no object, InvalidRequest with every wrong field.
    """
    if not isinstance(body, dict):
        raise MalformedRequest(f"the body must be a JSON object, not {kind(body)}")
    wrong: list[Violation] = []
    channels = {name: _channel(body.get(name), name, wrong) for name in CHANNELS}
    stream_id, aliases = _identity(body, default_id, channels, require_id, wrong)
    params = _unwrapped(body.get("params"), "params", wrong)
    keys = Keys(params, "params.", wrong)
    workflow = keys.workflow()
    width, height = keys.size()
    request = StartRequest(
        stream_id=stream_id,
        **channels,
        workflow=workflow or None,
        width=width,
        height=height,
        max_framerate=keys.framerate(),
        latency_budget_ms=keys.latency_budget_ms(),
        fallback=keys.fallback(),
        detect_out_resolution=keys.switch("detect_out_resolution") is not False,
        params=params,
        aliases=aliases,
        model_id=body["model_id"] if isinstance(body.get("model_id"), str) else "",
    )
    _raise_if(wrong, "the start request is not valid")
    return request


def check_hosts(request: StartRequest, allowed: tuple[str, ...]) -> None:
    """Raise InvalidRequest for channels on other hosts than ``allowed`` (host or host:port; empty: any).

    A caller who may name any URL could make us fetch from machines that only we can reach.
    """
    if not allowed:
        return
    wrong = []
    for name, url in request.channels.items():
        parts = urlsplit(url)
        if parts.hostname not in allowed and parts.netloc.rpartition("@")[2].lower() not in allowed:
            wrong.append(
                Violation(
                    name,
                    f"host {parts.hostname!r} is not the orchestrator's; HEADRACE_TRICKLE_HOSTS can allow it",
                    ", ".join(allowed),
                )
            )
    _raise_if(wrong, "a channel is on a host that is not allowed")


def parse_update(body: Any, prompt: Mapping[str, Any]) -> Update:
    """Read an update in any shape of protocol.md 5.5.

    prompt: the running workflow; its node ids and its unique titles are the keys that overrides may have. An update
    that brings a workflow is read against that one.
    Raises MalformedRequest when the body is no object, InvalidRequest with every wrong field: an unknown key here is
    most likely a typing error, and a change that silently does nothing is worse than a refused one.
    """
    if not isinstance(body, dict):
        raise MalformedRequest(f"an update must be a JSON object, not {kind(body)}")
    wrong: list[Violation] = []
    if "params" in body and "params" not in prompt:
        inner = _unwrapped(body["params"], "params", wrong)
        twice = itertools.islice((key for key in inner if key in body and key != "params"), MAX_VIOLATIONS)
        wrong += [Violation(key, f"{key!r} is given both beside and inside 'params'") for key in twice]
        body = {key: value for key, value in body.items() if key != "params"} | inner
    keys = Keys(body, "", wrong)
    workflow = keys.workflow()
    if workflow == {}:
        wrong.append(Violation("prompts", "the workflow has no nodes", "a workflow in ComfyUI's API format"))
    width, height = keys.size()
    update = Update(
        workflow=workflow,
        overrides=_overrides(keys.rest(), nodes_of(workflow or prompt), wrong),
        width=width,
        height=height,
        max_framerate=keys.framerate(),
        latency_budget_ms=keys.latency_budget_ms(),
        fallback=keys.fallback(),
        show_loading=keys.switch("show_loading"),
        load_model=keys.switch("load_model") is True,
    )
    _raise_if(wrong, "the update is not valid; nothing was changed")
    return update


def nodes_of(workflow: Mapping[str, Any]) -> dict[str, _Node]:
    """Node id -> title and class, of a workflow in ComfyUI's API format or of the document its page saves."""
    nodes: dict[str, _Node] = {}
    if is_document(workflow):
        for node in workflow["nodes"]:
            if isinstance(node, dict) and isinstance(node.get("id"), int | str):
                nodes[str(node["id"])] = _Node(str(node.get("title") or ""), str(node.get("type") or ""))
        return nodes
    for node_id, node in workflow.items():
        if isinstance(node, Mapping):
            meta = node.get("_meta")
            title = meta.get("title") if isinstance(meta, Mapping) else None
            nodes[str(node_id)] = _Node(str(title or ""), str(node.get("class_type") or ""))
    return nodes


def _overrides(values: dict[str, Any], nodes: dict[str, _Node], wrong: list[Violation]) -> dict[str, dict[str, Any]]:
    by_title: dict[str, list[str]] = {}
    for node_id, node in nodes.items():
        if node.title:
            by_title.setdefault(node.title, []).append(node_id)
    overrides: dict[str, dict[str, Any]] = {}
    unknown: dict[str, Any] = {}
    for key, value in values.items():
        if len(wrong) + len(unknown) >= MAX_VIOLATIONS:
            break
        matches = [key] if key in nodes else by_title.get(key, [])
        if len(matches) > 1:
            wrong.append(
                Violation(node_path(key), f"{len(matches)} nodes have this title", f"node ids {_some(matches)}")
            )
        elif not matches:
            unknown[key] = value
        else:
            inputs = _inputs(matches[0], value, nodes[matches[0]], wrong)
            known = overrides.setdefault(matches[0], {})
            path = node_path(matches[0])
            twice = itertools.islice(inputs.keys() & known.keys(), MAX_VIOLATIONS)
            wrong += [Violation(f"{path}.inputs.{name}", "is given twice, by node id and by title") for name in twice]
            known.update(inputs)
    if unknown:
        wrong += _unknown(unknown, nodes, by_title)
    return {node_id: inputs for node_id, inputs in overrides.items() if inputs}


def _inputs(node_id: str, value: Any, node: _Node, wrong: list[Violation]) -> dict[str, Any]:
    """The inputs of one override: ``{"inputs": {..}}``, then beside it only what a copied node has, or directly."""
    path = node_path(node_id)
    if not isinstance(value, dict):
        wrong.append(Violation(path, f"is {kind(value)}", "an object of inputs"))
        return {}
    if "class_type" in value and value["class_type"] != node.class_type:
        message = f"the running node is {node.class_type!r}; another class needs the whole workflow in 'prompts'"
        wrong.append(Violation(f"{path}.class_type", message, node.class_type))
    rest = {name: item for name, item in value.items() if name not in ("class_type", "_meta")}
    if not isinstance(rest.get("inputs"), dict):
        return rest
    inputs: dict[str, Any] = rest.pop("inputs")
    beside = itertools.islice(rest, MAX_VIOLATIONS)
    wrong += [Violation(f"{path}.{name}", "stands beside 'inputs'; put it inside") for name in beside]
    return inputs


def _unknown(
    keys: Mapping[str, Any], nodes: Mapping[str, _Node], by_title: Mapping[str, list[str]]
) -> Iterator[Violation]:
    """One for each of ``keys``, with what was probably meant as long as comparing them all costs little."""
    titles = [title for title, ids in by_title.items() if len(ids) == 1]
    allowed = f"nodes {_some([*nodes, *titles])}, or {', '.join(RESERVED)}"
    meant = [name for name in (*RESERVED, *titles, *nodes) if len(name) <= _MAX_COMPARED]
    characters, names = sum(map(len, meant)), len(meant)
    left = _COMPARISONS
    for key, value in keys.items():
        near: list[str] = []
        cost = characters * len(key) + names * _COMPARISON
        if len(key) <= _MAX_COMPARED and cost <= left:
            left -= cost
            near = difflib.get_close_matches(key, meant, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        path = node_path(key) if isinstance(value, dict) else shortened(key)
        yield Violation(path, f"is neither a node of the workflow nor a known key{hint}", allowed)


def _some(names: Sequence[str]) -> str:
    """The first of them, with how many there are besides."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shortened, names[:_SHOWN])) + more


def _identity(
    body: Mapping[str, Any],
    default_id: str,
    channels: Mapping[str, str | None],
    require_id: bool,
    wrong: list[Violation],
) -> tuple[str, tuple[str, ...]]:
    """The stream's id and its other names, in the order that peers prefer."""
    names = []
    for key in ("gateway_request_id", "manifest_id", "stream_id"):
        value = body.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, str) and len(value) <= _MAX_ID_LENGTH and value.isprintable():
            names.append(value)
        else:
            wrong.append(
                Violation(key, f"is {shown(value)}", f"printable text of at most {_MAX_ID_LENGTH} characters")
            )
    if default_id:
        if len(default_id) <= _MAX_ID_LENGTH and default_id.isprintable():
            names.append(default_id)
        else:
            wrong.append(
                Violation(
                    "X-Stream-Id", f"is {shown(default_id)}", f"printable text of at most {_MAX_ID_LENGTH} characters"
                )
            )
    if not names:
        if require_id and not wrong:
            wrong.append(Violation("gateway_request_id", "is missing", "the id of the stream"))
        seed = "\n".join(url or "" for url in channels.values())
        names.append("stream-" + hashlib.sha256(seed.encode()).hexdigest()[:12])
    return names[0], tuple(dict.fromkeys(name for name in names[1:] if name != names[0]))


def _channel(value: Any, name: str, wrong: list[Violation]) -> str | None:
    if value is None or value == "":
        return None
    allowed = "an http or https URL"
    if not isinstance(value, str):
        wrong.append(Violation(name, f"is {kind(value)}", allowed))
        return None
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port out of range, a broken IPv6 address
        valid = False
    if not valid or not value.isprintable() or " " in value:
        wrong.append(Violation(name, f"is {shown(value)}", allowed))
        return None
    return value


def _unwrapped(value: Any, path: str, wrong: list[Violation]) -> dict[str, Any]:
    """The params object; null and absent mean none, and clients also send it as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = read_json(value)
        except MalformedRequest as exc:
            wrong.append(Violation(path, exc.message.replace("the body", "the text"), "a JSON object"))
            return {}
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        wrong.append(Violation(path, f"is {kind(value)}", "a JSON object"))
        return {}
    return value


def _raise_if(wrong: list[Violation], summary: str) -> None:
    if wrong:
        first, others = wrong[0], len(wrong) - 1
        more = f" ({others} more)" if others else ""
        if len(wrong) >= MAX_VIOLATIONS:  # reading stopped there
            more = f" (at least {MAX_VIOLATIONS - 1} more)"
        raise InvalidRequest(f"{summary}: {first.path}: {first.message}{more}", tuple(wrong[:MAX_VIOLATIONS]))
