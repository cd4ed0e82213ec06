"""What goes wrong and when, from a seed alone: the same seed gives the same plan on any machine.

A plan is a recipe of the input and a list of faults with their times; as JSON it can be kept, cut down, given again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .source import Recipe

#: Faults after which bytes, and with them frames and sound, may be gone for good: gaps around them are not ours.
_LOSSY = frozenset({"reset", "answer", "limit", "corrupt", "skip_segment", "repeat_segment", "reset_all"})
#: Faults that end the stream by the protocol's rules; another one is started after them.
ENDING = frozenset({"forget", "delete_output", "delete_control", "answer_404", "kill_shim"})
#: Seconds that have to lie between one of these and the one before: for another stream to start, for a repair.
_APART_S = dict.fromkeys(ENDING, 8.0) | {"hang_engine": 15.0}

_WEIGHTS = {
    "kill_engine": 4,
    "freeze_engine": 3,
    "term_engine": 1,
    "reset": 5,
    "stall": 5,
    "answer": 4,
    "limit": 2,
    "corrupt": 2,
    "reset_all": 1,
    "skip_segment": 2,
    "repeat_segment": 1,
    "hold": 2,
    "pause": 2,
    "jump": 2,
    "restart_clock": 2,
    "vary": 2,
    "update": 4,
    "bad_update": 4,
    "control": 4,
    "stop_other": 2,
    "polls": 2,
    "forget": 0.5,
    "delete_output": 0.5,
    "delete_control": 0.5,
    "answer_404": 0.5,
}
#: By order only: they need what other parts of the house promise (a journal, a listener).
OPTIONAL = ("kill_shim", "hang_engine")
FAULTS = (*_WEIGHTS, *OPTIONAL)

#: A burst of so many seconds of 60 fps is more than the shim takes (60 frames wait in it), and how long it is the
#: measure of lateness after it (gateway_shim/stream/pacing.py: three seconds, and what was late then).
FILLS_S = 1.5
SETTLED_S = 10.0

_CHANNELS = ("", "-out", "-events", "-control")  # suffix of a channel's name
_STATUSES = (400, 408, 429, 470, 500, 502, 503)
BAD_UPDATES = (
    "no_node",
    "no_input",
    "wrong_type",
    "out_of_range",
    "no_class",
    "no_output",
    "not_json",
    "list",
    "deep",
)
#: JSON that may stand in a control segment; the text of some is no JSON at all.
CONTROL = (
    "null", "[]", "0", "-1.5e300", "true", '""', '"keep"', "{}", '{"keep":"alive"}', '{"keep":null}', "[[[[]]]]",
    '{"prompts":null}', '{"prompts":[]}', '{"prompts":"{"}', '{"params":null}', '{"params":{"params":{}}}', "NaN",
    '{"width":-1}', '{"width":512}', '{"max_framerate":"x"}', '{"":{"":""}}', '{"5":null}', '{"5":[]}', "{", "",
    "\x00",     '{"a":1}{"b":2}', '{"' + "x" * 5000 + '":1}',
)  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One fault. ``at``: seconds after the first frame of the run."""

    at: float
    fault: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lossy(self) -> bool:
        """Whether it takes input or output away. Stamps that fall a little overlap, and who is late is dropped."""
        back = self.fault == "jump" and self.arguments["seconds"] < 0
        return back or self.fault in _LOSSY or self.fault in ENDING


@dataclass(frozen=True)
class Plan:
    seed: int
    seconds: float
    graph: str  # "pass", "invert", "slow"
    recipe: Recipe
    events: tuple[Event, ...]

    @property
    def only_kills(self) -> bool:
        """Whether nothing but the loss of the engine happens, so that what it costs can be bounded."""
        return bool(self.events) and all(event.fault == "kill_engine" for event in self.events)

    def as_json(self) -> str:
        """One fault a line, to be read and cut down by people."""
        head = {"seed": self.seed, "seconds": self.seconds, "graph": self.graph, "recipe": asdict(self.recipe)}
        lines = [json.dumps({"at": e.at, "fault": e.fault, **e.arguments}) for e in self.events]
        body = ",\n    ".join(lines)
        return json.dumps(head)[:-1] + ', "events": [\n    ' + body + "\n]}\n"


def load(path: Path) -> Plan:
    """A plan from a file that `Plan.as_json` wrote. Raises ValueError for one that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        events = []
        for each in found["events"]:
            at, fault = each.pop("at"), each.pop("fault")
            if fault not in FAULTS:
                raise ValueError(f"there is no fault {fault!r}; there are {', '.join(FAULTS)}")
            events.append(Event(at, fault, each))
        return Plan(found["seed"], found["seconds"], found["graph"], Recipe(**found["recipe"]), tuple(events))
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"{path} is no plan: {exc!r}") from exc


def chaos(seed: int, seconds: float, graph: str, faults: Sequence[str] = ()) -> Plan:
    """Random faults, one every second or so, in the first nine tenths. faults: only these."""
    chance = random.Random(seed)
    recipe = Recipe(
        fps=chance.choice([24, 25, 30, 30, 30, 60]),
        audio=chance.choice(["aac", "opus"]),
        b_frames=chance.choice([0, 0, 2]),
        segment_s=chance.choice([1.0, 2.0]),
        first_pts=chance.choice(
            [9_000, 126_000, 126_000, chance.randrange(1 << 33), (1 << 33) - chance.randrange(20 * 90_000)]
        ),
        vfr=chance.random() < 0.2,
    )
    names = list(faults) or list(_WEIGHTS)
    weights = [_WEIGHTS.get(name, 1) for name in names]
    events = []
    at, ended_at = 1.0 + chance.expovariate(1.0), -8.0
    while at < seconds * 0.9:
        name = chance.choices(names, weights)[0]
        if name in _APART_S:
            if at - ended_at < _APART_S[name] or at > seconds * 0.8:
                name = "polls" if not faults else ""
            else:
                ended_at = at
        if name:
            events.append(Event(round(at, 3), name, _arguments(name, chance)))
        at += 0.2 + chance.expovariate(1.2)
    return Plan(seed, seconds, graph, recipe, tuple(events))


def kills(seed: int, count: int, seconds: float, graph: str) -> Plan:
    """The engine is killed ``count`` times, evenly but for a little chance."""
    chance = random.Random(seed)
    share = seconds / count
    events = [
        Event(round(share * (index + 0.25) + chance.uniform(-0.1, 0.1) * share, 3), "kill_engine")
        for index in range(count)
    ]
    return Plan(seed, seconds, graph, Recipe(), tuple(events))


def soak(seed: int, minutes: float, graph: str) -> Plan:
    """Steady load with an honest fault every half minute: none that takes bytes away."""
    chance = random.Random(seed)
    seconds = minutes * 60
    if graph == "slow":
        # Lateness is judged: camera and viewer share the machine and shall not be late themselves.
        recipe = Recipe(fps=60, width=192, height=144)
        # And memory: the shim holds at once what it may ever hold, so that all growth after that is a leak.
        return Plan(seed, seconds, graph, recipe, (Event(1.0, "hold", {"seconds": FILLS_S}),))
    recipe = Recipe()
    names = ["update", "bad_update", "control", "stop_other", "polls", "kill_engine", "freeze_engine", "vary"]
    weights = [4, 3, 3, 1, 2, 1, 1, 1]
    events = []
    at = 10.0
    while at < seconds - 30:
        name = chance.choices(names, weights)[0]
        events.append(Event(round(at, 3), name, _arguments(name, chance)))
        at += chance.uniform(15, 45)
    return Plan(seed, seconds, graph, recipe, tuple(events))


def _arguments(fault: str, chance: random.Random) -> dict[str, Any]:
    channel = chance.choices(_CHANNELS, [4, 4, 1, 1])[0]
    method = {"": "GET", "-out": "POST", "-events": "POST", "-control": "GET"}[channel]
    match fault:
        case "reset" | "stall":
            found = {
                "channel": channel,
                "method": method,
                "after_bytes": chance.choice([0, chance.randrange(60_000)]),
            }
            return found | ({"seconds": round(chance.uniform(0.1, 2.0), 2)} if fault == "stall" else {})
        case "answer":
            return {"channel": channel, "method": method, "status": chance.choice(_STATUSES)}
        case "answer_404":
            return {"channel": chance.choice(["", "-out"])}
        case "limit":
            channel = chance.choice(["", "-out"])
            return {
                "channel": channel,
                "method": {"": "GET", "-out": "POST"}[channel],
                "bytes_per_s": chance.choice([8_000, 40_000, 150_000]),
                "seconds": round(chance.uniform(1, 4), 2),
            }
        case "corrupt":
            return {"after_bytes": chance.randrange(40_000), "length": chance.choice([1, 188, 5000])}
        case "freeze_engine":
            return {"seconds": round(chance.uniform(0.1, 2.0), 2)}
        case "hold":
            return {"seconds": round(chance.uniform(0.2, 3.0), 2)}
        case "pause":
            return {"seconds": round(chance.uniform(0.2, 4.0), 2)}
        case "jump":
            return {"seconds": chance.choice([0.3, 2.0, 15.0, 3600.0, -0.3, -0.9])}
        case "vary":
            return {"on": chance.random() < 0.7}
        case "update":
            return {"kind": chance.choice(["value", "workflow", "same", "dry_run"]), "value": chance.randrange(100)}
        case "bad_update":
            return {"kind": chance.choice(BAD_UPDATES), "over": chance.choice(["http", "control"])}
        case "control":
            return {"text": chance.choice(CONTROL)}
        case "polls":
            return {"count": chance.choice([1, 10, 50])}
    return {}
