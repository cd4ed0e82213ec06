"""What a start or an update asks for, read from every shape that callers use (protocol.md 3.3, 4.4, 5.2, 5.5).

Pure: no clock, no network. Everything wrong is found at once, each a Violation with its path; numbers stay exact
(seeds have 64 bits). Whether a node has an input, and which values it takes, is the engine's knowledge and checked
there.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .errors import InvalidRequest, MalformedRequest, Violation
from .json_text import read_json
from .keys import RESERVED, Keys, is_document, kind, shown

CHANNELS = ("subscribe_url", "publish_url", "control_url", "events_url", "data_url")

_MAX_ID_LENGTH = 256
_SHOWN = 20


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
        twice = [key for key in inner if key in body and key != "params"]
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
    for key, value in values.items():
        matches = [key] if key in nodes else by_title.get(key, [])
        if len(matches) > 1:
            wrong.append(
                Violation(f"nodes.{key}", f"{len(matches)} nodes have this title", f"node ids {', '.join(matches)}")
            )
        elif not matches:
            wrong.append(_unknown(key, value, nodes, by_title))
        else:
            inputs = _inputs(matches[0], value, nodes[matches[0]], wrong)
            known = overrides.setdefault(matches[0], {})
            wrong += [
                Violation(f"nodes.{matches[0]}.inputs.{name}", "is given twice, by node id and by title")
                for name in inputs.keys() & known.keys()
            ]
            known.update(inputs)
    return {node_id: inputs for node_id, inputs in overrides.items() if inputs}


def _inputs(node_id: str, value: Any, node: _Node, wrong: list[Violation]) -> dict[str, Any]:
    """The inputs of one override: ``{"inputs": {..}}``, then beside it only what a copied node has, or directly."""
    path = f"nodes.{node_id}"
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
    wrong += [Violation(f"{path}.{name}", "stands beside 'inputs'; put it inside") for name in rest]
    return inputs


def _unknown(key: str, value: Any, nodes: dict[str, _Node], by_title: Mapping[str, list[str]]) -> Violation:
    titles = [title for title, ids in by_title.items() if len(ids) == 1]
    near = difflib.get_close_matches(key, [*RESERVED, *titles, *nodes], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    names = [*nodes, *titles]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    allowed = f"nodes {', '.join(names[:_SHOWN])}{more}, or {', '.join(RESERVED)}"
    path = f"nodes.{key}" if isinstance(value, dict) else key
    return Violation(path, f"is neither a node of the workflow nor a known key{hint}", allowed)


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
        first = wrong[0]
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InvalidRequest(f"{summary}: {first.path}: {first.message}{more}", tuple(wrong))
