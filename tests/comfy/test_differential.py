"""One life, three ways: ComfyUI's executor as it is, with our cache keys, and the plan.

All must agree, frame by frame: what the sinks took, which nodes ran, which one failed and how.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .lives import Frame, assert_alike, changed, executor_test_nodes, life, node

#: ComfyUI's own test nodes by name, once loaded.
PACK = {}


@pytest.fixture
def lab(host):
    """The host with the nodes of ``graph_nodes`` and ComfyUI's own test nodes."""
    import nodes

    from .graph_nodes import CLASSES

    if not PACK:
        before = dict(nodes.NODE_CLASS_MAPPINGS)
        assert host.run(nodes.load_custom_node(str(executor_test_nodes(host))))
        PACK.update({name: cls for name, cls in nodes.NODE_CLASS_MAPPINGS.items() if name not in before})
    assert not host.add_nodes({**PACK, **CLASSES})
    return host


def live(**nodes):
    """A graph over the level of the live picture (``level``)."""
    return {"live": node("LoadTensor"), "level": node("DiffLevel", image=["live", 0], mark=0), **nodes}


def catch(source, mark=0, output=0):
    return node("DiffCatch", value=[source, output], mark=mark)


def static(value, mark=0):
    return node("DiffConstant", value=value, mark=mark)


# Each is (prompt of the first frame, levels, further prompts by frame, moods by frame, runner that auto ends with).
SCENARIOS = {}


def scenario(prompt, levels=(0.2, 0.8, 0.8, 0.2), updates=None, moods=None, runner="plan"):
    def frames():
        return [
            Frame(level, prompt if not number else (updates or {}).get(number), (moods or {}).get(number, {}))
            for number, level in enumerate(levels)
        ]

    return frames, runner


def named(name, *args, **kwargs):
    SCENARIOS[name] = scenario(*args, **kwargs)


def image(size=8, **inputs):
    return node("StubImage", **{"content": "WHITE", "height": size, "width": size, "batch_size": 1, **inputs})


def mask(value):
    return node("StubMask", value=value, height=8, width=8, batch_size=1)


# ComfyUI's own test nodes.
def mix(value):
    return {
        "live": node("LoadTensor"),
        "white": image(),
        "mask": mask(value),
        "mix": node("TestLazyMixImages", image1=["live", 0], image2=["white", 0], mask=["mask", 0]),
        "save": node("SaveTensor", images=["mix", 0]),
    }


for value in (0.0, 0.5, 1.0):
    named(f"lazy mix with a mask of {value}", mix(value))
named("lazy mix whose mask changes", mix(0.0), updates={1: mix(1.0), 2: mix(0.5), 3: mix(0.0)})
NESTED = {
    **mix(0.5),
    "inner": node("TestLazyMixImages", image1=["white", 0], image2=["black", 0], mask=["other", 0]),
    "black": image(content="BLACK"),
    "other": mask(1.0),
}
NESTED["mix"] = node("TestLazyMixImages", image1=["inner", 0], image2=["live", 0], mask=["mask", 0])
named("lazy mix of a lazy mix", NESTED, updates={2: changed(NESTED, other={"value": 0.0})})


def custom(flag):
    return {
        "still": node("StubConstantImage", value=0.5, height=8, width=8, batch_size=1),
        "changed": node("TestCustomIsChanged", image=["still", 0], should_change=flag),
        "caught": catch("changed"),
    }


named("IS_CHANGED says no", custom(False))
named("IS_CHANGED says NaN", custom(True))
named("IS_CHANGED changes its mind", custom(False), updates={1: custom(True), 3: custom(False)})
CONSTANTS = {**custom(False), "changed": node("TestIsChangedWithConstants", image=["still", 0], value=0.5)}
named("IS_CHANGED of a literal", CONSTANTS, updates={2: changed(CONSTANTS, changed={"value": 0.25})})
VARIADIC = {
    "live": node("LoadTensor"), "white": image(), "black": image(content="BLACK"),
    "mean": node("TestVariadicAverage", input1=["live", 0], input2=["white", 0], input3=["black", 0]),
    "save": node("SaveTensor", images=["mean", 0]),
}  # fmt: skip
named("undeclared links", VARIADIC)
VALIDATED = {"v": node("TestCustomValidation5", input1=0.5, input2=0.25), "caught": catch("v")}
named("a node with its own validation", VALIDATED, updates={2: changed(VALIDATED, v={"input1": 0.75})})


def mixed(value):
    return {"mixed": node("TestMixedExpansionReturns", input1=value), "caught": catch("mixed")}


named("a node that may expand and does not, as tuple", mixed(0.05))
named("a node that may expand and does not, as dict", mixed(0.15))
named("a node that expands", mixed(0.5), runner="pinned")
named("a node that expands later", mixed(0.05), updates={1: mixed(0.5), 3: mixed(0.05)}, runner="pinned")
CYCLE = {
    "white": image(), "black": image(content="BLACK"),
    "cycle": node("TestDynamicDependencyCycle", input1=["white", 0], input2=["black", 0]),
    "caught": catch("cycle"), "free": catch("white", 1),
}  # fmt: skip
named("an expansion with a cycle", CYCLE, levels=(0, 0), runner="pinned")
SOCKET = {
    "live": node("LoadTensor"),
    "out": node("TestOutputNodeWithSocketOutput", image=["live", 0], value=0.5),
    "more": node("TestOutputNodeWithSocketOutput", image=["out", 0], value=0.25),
    "save": node("SaveTensor", images=["more", 0]),
}
named("output nodes with outputs", SOCKET, updates={2: changed(SOCKET, more={"value": 1.0})})


def blocker(block, verbose):
    return live(
        b=node("TestExecutionBlocker", input=["level", 0], block=block, verbose=verbose),
        after=node("DiffAdd", a=["b", 0], b=["level", 0], mark=1),
        caught=catch("after"),
        free=catch("level", mark=1),
    )


named("a blocker comes and goes", blocker(True, False), updates={1: blocker(False, False), 3: blocker(True, True)})
named("a blocker with a message", blocker(True, True))
LISTED = live(
    one=static(1.0), two=static(2.0, 1),
    many=node("TestMakeListNode", value1=["level", 0], value2=["one", 0], value3=["two", 0]),
    gathered=node("TestAccumulateNode", to_add=["many", 0]),
    long=node("TestAccumulationGetLengthNode", accumulation=["gathered", 0]),
    caught=catch("long"), whole=catch("many", mark=1),
)  # fmt: skip
named("a list and back", LISTED)
MAPPED = live(
    some=node("DiffPair", a=["level", 0], b=["level", 0], mark=3),
    more=node("TestMakeListNode", value1=["level", 0], value2=["some", 0], value3=["level", 0]),
    added=node("DiffAdd", a=["some", 1], b=["more", 0], mark=2),
    caught=catch("added"),
)
named("lists of different lengths", MAPPED)
ACCUMULATED = live(
    one=node("TestAccumulateNode", to_add=["level", 0]),
    two=node("TestAccumulateNode", to_add=["level", 0], accumulation=["one", 0]),
    head=node("TestAccumulationHeadNode", accumulation=["two", 0]),
    back=node("TestAccumulationToListNode", accumulation=["two", 0]),
    caught=catch("back"), first=catch("head", mark=1, output=1),
)  # fmt: skip
named("accumulations", ACCUMULATED)
CONDITION = {
    "five": node("StubInt", value=5), "six": node("StubInt", value=6),
    "less": node("TestIntConditions", a=["five", 0], b=["six", 0], operation="<"), "caught": catch("less"),
}  # fmt: skip
named("conditions over static values", CONDITION, updates={1: changed(CONDITION, five={"value": 7})})
LOOP = live(
    open=node("TestForLoopOpen", remaining=3, initial_value1=["level", 0]),
    add=node("DiffAdd", a=["open", 2], b=["level", 0], mark=1),
    close=node("TestForLoopClose", flow_control=["open", 0], initial_value1=["add", 0]),
    caught=catch("close"),
)
named("a loop", LOOP, levels=(0.1, 0.2), runner="pinned")
WHILE = live(
    yes=node("TestIntConditions", a=1, b=2, operation=">"),
    open=node("TestWhileLoopOpen", condition=True, initial_value0=["level", 0]),
    close=node("TestWhileLoopClose", flow_control=["open", 0], condition=["yes", 0], initial_value0=["open", 1]),
    caught=catch("close"),
)
named("a loop that looks at the prompt", WHILE, levels=(0.1, 0.2), runner="executor")
SLEEPS = live(
    a=node("TestSleep", value=["level", 0], seconds=0.02),
    b=node("TestSleep", value=["level", 0], seconds=0.01),
    sum=node("DiffAdd", a=["a", 0], b=["b", 0], mark=0),
    caught=catch("sum"),
)
named("two that sleep", SLEEPS, levels=(0.1, 0.2))
named(
    "an error after a wait",
    live(e=node("TestAsyncError", value=["level", 0], error_after=0.01), caught=catch("e")), levels=(0.1, 0.2),
)  # fmt: skip
named("an error at once", live(e=node("TestSyncError", value=["level", 0]), caught=catch("e")), levels=(0.1, 0.2))
named(
    "a timeout",
    live(e=node("TestAsyncTimeout", value=["level", 0], timeout=0.1, operation_time=5.0), caught=catch("e")),
    levels=(0.1,),
)


def lazy_check(condition):
    return live(
        one=static(1.0),
        l=node("TestAsyncLazyCheck", input1=["one", 0], input2=["level", 0], condition=condition),
        caught=catch("l"),
    )


named(
    "a lazy check that waits", lazy_check(True), levels=(0.1, 0.2, 0.3),
    updates={1: lazy_check(False), 2: lazy_check(True)},
)  # fmt: skip
BATCH = {
    "live": node("LoadTensor"),
    "batch": node("TestAsyncBatchProcessing", images=["live", 0], process_time_per_item=0.01),
    "save": node("SaveTensor", images=["batch", 0]),
}
named("a batch with waits and a progress bar", BATCH, levels=(0.1, 0.2))
PROGRESS = live(
    a=node("TestAsyncProgressUpdate", value=["level", 0], sleep_seconds=0.02),
    b=node("TestSyncProgressUpdate", value=["a", 0], sleep_seconds=0.02),
    caught=catch("b"),
)
named("progress through ComfyUI's API", PROGRESS, levels=(0.1, 0.2))

# Our own nodes, one question each.
NOISE = {
    "z": image(content="NOISE", size=6), "a": image(content="NOISE", size=7), "m": image(content="NOISE", size=5),
    "one": catch("a"), "two": catch("m", 1), "three": catch("z", 2), "four": catch("a", 3),
}  # fmt: skip
named("the order of random draws", NOISE)
DRAWS = live(
    d1=node("DiffDraw", a=["level", 0], mark=1), d2=node("DiffDraw", a=["level", 0], mark=2),
    d3=node("DiffDraw", a=["d2", 0], mark=3), d4=node("DiffDraw", a=["static", 0], mark=4), static=static(0.5),
    sum=node("DiffAdd", a=["d1", 0], b=["d3", 0], mark=0), caught=catch("sum"), other=catch("d4", 1),
)  # fmt: skip
named("the order of live random draws", DRAWS, updates={2: changed(DRAWS, static={"value": 0.25})})
DEEP = live(
    s0=node("DiffDraw", a=["level", 0], mark=1), s1=node("DiffAdd", a=["s0", 0], b=["level", 0], mark=2),
    s2=node("DiffAdd", a=["s1", 0], b=["level", 0], mark=3), t0=node("DiffDraw", a=["level", 0], mark=4),
    t1=node("DiffAdd", a=["t0", 0], b=["level", 0], mark=5), far=catch("s2"), near=catch("t1", 1),
)  # fmt: skip
named("what is nearer to an output draws first", DEEP)
FAILS = live(
    before=static(0.1), after=static(0.2, 1),
    fail=node("DiffFail", a=["level", 0], above=0.5, mark=0),
    sum=node("DiffAdd", a=["fail", 0], b=["after", 0], mark=1),
    caught=catch("sum"), free=catch("before", 1), last=catch("level", 2),
)  # fmt: skip
named("a failure and its retry", FAILS)
named("a failure at the first frame", FAILS, levels=(0.9, 0.9, 0.2, 0.9, 0.1))
named("a failure with an override", FAILS, updates={2: changed(FAILS, fail={"above": 0.9})})
COUNTED = live(
    still=static(0.5), count=node("DiffCount", a=["still", 0], mark=0),
    lives=node("DiffCount", a=["level", 0], mark=1),
    caught=catch("count"), other=catch("lives", 1),
)  # fmt: skip
named("an override there and back", COUNTED, updates={1: changed(COUNTED, still={"value": 0.1}), 2: COUNTED})
named(
    "a link moves", COUNTED,
    updates={1: changed(COUNTED, count={"a": ["level", 0]}), 3: changed(COUNTED, count={"a": ["still", 0]})},
)  # fmt: skip
SHORT = {key: value for key, value in COUNTED.items() if key not in ("count", "caught")}
named("a node goes and comes back", COUNTED, updates={1: SHORT, 2: COUNTED})
OTHER = {**COUNTED, "count": node("DiffAdd", a=["still", 0], b=["still", 0], mark=4)}
named("an id changes its class", COUNTED, updates={1: OTHER, 2: COUNTED})
MOODY = live(
    still=static(0.5), moody=node("DiffMoody", a=["still", 0], mark=7),
    after=node("DiffCount", a=["moody", 0], mark=0),
    caught=catch("after"),
)  # fmt: skip
MOODS = {
    0: {7: 1},
    1: {7: 1},
    2: {7: [2, "x"]},
    3: {7: [2, "x"]},
    4: {7: ValueError()},
    5: {7: ValueError()},
    6: {7: 1},
}
named("IS_CHANGED in every mood", MOODY, levels=[0] * 8, moods=MOODS)
UNLINKED = changed(MOODY, after={"a": ["still", 0]})
named(
    "IS_CHANGED changes while nobody needs it", MOODY, levels=[0] * 6, updates={1: UNLINKED, 3: MOODY},
    moods={0: {7: 1}, 1: {7: 1}, 2: {7: 2}, 3: {7: 1}},
)  # fmt: skip
LATER = {**MOODY, "moody": node("DiffMoodyLater", a=["still", 0], mark=7)}
named("IS_CHANGED that waits", LATER, levels=[0] * 5, moods={0: {7: 1}, 1: {7: 1}, 2: {7: 2}, 3: {7: 2}})
WHERE = live(
    many=node("DiffPair", a=["level", 0], b=["level", 0], mark=0),
    where=node("DiffWhere", a=["many", 1], mark=0), once=node("DiffWhere", a=["level", 0], mark=1),
    caught=catch("where"), other=catch("once", 1),
)  # fmt: skip
named("hidden inputs and the executing context", WHERE)
RAW = live(
    still=static(1.0), raw=node("DiffRaw", a=["still", 0], mark=0), caught=catch("raw"),
    loose=node("DiffLoose", extra=["level", 0], z=2.0, mark=0), other=catch("loose", 1),
)  # fmt: skip
named("links as such, undeclared inputs, their order", RAW)
named("undeclared literals stay away", live(loose=node("DiffLoose", more=5, z=2.0, mark=0), caught=catch("loose")))
SHOWN = live(
    s=node("DiffShown", a=["level", 0], mark=0), only=node("DiffShown", a=["level", 0], mark=9),
    caught=catch("s"), other=catch("only", 1),
)  # fmt: skip
named("results for the user interface", SHOWN)
for kind, what in enumerate(("None", "no values", "a number", "too much", "a blocker in a dict", "a blocker")):
    odd = live(odd=node("DiffOdd", a=["level", 0], mark=kind), caught=catch("odd"), free=catch("level", 1))
    named(f"a node that returns {what}", odd, levels=(0.1, 0.2))
EMPTY = live(
    none=node("DiffNothing", a=["level", 0], mark=0), sum=node("DiffSum", values=["none", 0], mark=1),
    caught=catch("sum"), add=node("DiffAdd", a=["none", 0], b=["level", 0], mark=0), free=catch("level", 2),
)  # fmt: skip
named("an empty list for a node that takes lists", EMPTY)
named("an empty list for one that does not", {**EMPTY, "bad": catch("add", 3)}, levels=(0.1, 0.2))
HALF = live(
    still=static(0.9), blocked=node("DiffBlock", a=["pair", 1], above=0.5, message="", mark=0),
    pair=node("DiffPair", a=["level", 0], b=["still", 0], mark=0),
    add=node("DiffAdd", a=["blocked", 0], b=["level", 0], mark=1),
    caught=catch("add"), sum=node("DiffSum", values=["blocked", 0], mark=0), other=catch("sum", 1),
    whole=catch("pair", 2, output=1),
)  # fmt: skip
named("a list of which one is blocked", HALF)
FLAT = {
    **HALF,
    "again": node("DiffPair", a=["blocked", 0], b=["level", 0], mark=8),
    "flat": catch("again", 4, output=1),
}
named("a blocker in a node that flattens", FLAT)
SWITCHED = live(
    one=static(1.0), two=node("DiffCount", a=["level", 0], mark=5),
    s=node("DiffSwitch", which=["level", 0], a=["one", 0], b=["two", 0], mark=0),
    t=node("DiffSwitch", which=["level", 0], a=["s", 0], b=["one", 0], mark=1),
    caught=catch("t"),
)  # fmt: skip
named("lazy switches, live", SWITCHED)
SHARED = {**SWITCHED, "other": catch("two", 1)}
named("a lazy source that another node needs anyway", SHARED)
for mark in range(5):
    v3 = live(
        v=node("DiffV3", a=["level", 0], mark=mark), caught=catch("v"), other=catch("v", 1, output=1),
        free=catch("level", 2),
    )  # fmt: skip
    named(f"a V3 node, way {mark}", v3, levels=(0.1, 0.2))
HIDDEN = live(v=node("DiffV3", a=["level", 0], mark=0), caught=catch("v", output=1))
named("a V3 node sees the prompt of the moment", HIDDEN, updates={2: {**HIDDEN, "more": static(0.5)}})
STILL = {"still": static(0.5), "v": node("DiffV3", a=["still", 0], mark=0), "caught": catch("v", output=1)}
named("fingerprint_inputs", STILL, levels=[0] * 6, moods={1: {0: 1}, 2: {0: 1}, 3: {0: ValueError()}, 4: {0: 2}})
V3LATER = live(v=node("DiffV3Later", a=["level", 0], mark=1), caught=catch("v"))
named("a V3 node, lazy, async, with a list", V3LATER, updates={2: changed(V3LATER, v={"mark": 2})})
CORE = {
    "live": node("LoadTensor"),
    "flip": node("ImageFlip", image=["live", 0], flip_method="x-axis: vertically"),
    "invert": node("ImageInvert", image=["flip", 0]),
    "blur": node("ImageBlur", image=["invert", 0], blur_radius=1, sigma=1.0),
    "batch": node("RepeatImageBatch", image=["blur", 0], amount=2),
    "save": node("SaveTensor", images=["batch", 0]),
}
named("core nodes", CORE, updates={2: changed(CORE, blur={"sigma": 2.0})})
TURNS = live(
    a=node("DiffLater", a=["level", 0], turns=3, above=9.0, mark=1),
    b=node("DiffLater", a=["level", 0], turns=1, above=9.0, mark=2),
    c=node("DiffLater", a=["b", 0], turns=0, above=9.0, mark=3),
    sum=node("DiffAdd", a=["a", 0], b=["c", 0], mark=0), caught=catch("sum"),
    draw=node("DiffDraw", a=["b", 0], mark=5),
    other=catch("draw", 1),
)  # fmt: skip
named("coroutines of different length", TURNS)
named("a coroutine fails while another waits", changed(TURNS, b={"above": 0.5}))
EXPANDS = live(
    still=static(0.25), e=node("DiffExpand", a=["level", 0], above=0.5, mark=0),
    add=node("DiffAdd", a=["still", 0], b=["level", 0], mark=0),
    caught=catch("e"), other=catch("add", 1),
)  # fmt: skip
named("a live picture makes a node expand", EXPANDS, levels=(0.6, 0.1, 0.7), runner="pinned")


def test_there_are_enough_scenarios():
    assert len(SCENARIOS) >= 40


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(lab, name):
    frames, runner = SCENARIOS[name]
    records = assert_alike(lab, frames(), runner)
    assert any(record["sinks"] or record["picture"] or record["failed"] for record in records)


def test_a_cycle_that_comes_out_of_an_expansion_is_a_failure(lab):
    for choice in ("executor", "auto"):
        assert [record["failed"][2] for record in life(lab, choice, SCENARIOS["an expansion with a cycle"][0]())] == [
            "graph.DependencyCycleError"
        ] * 2


# Random graphs: a list of nodes, each fed by any before it.
KINDS = {
    "DiffAdd": ("a", "b"), "DiffPair": ("a", "b"), "DiffSum": ("values",), "DiffSwitch": ("which", "a", "b"),
    "DiffBlock": ("a",), "DiffFail": ("a",), "DiffMoody": ("a",), "DiffCount": ("a",), "DiffDraw": ("a",),
    "DiffV3": ("a",), "DiffNothing": ("a",),
}  # fmt: skip
WAITING = {"DiffLater": ("a",), "DiffV3Later": ("a",)}
LEVELS = st.sampled_from([0.0, 0.25, 0.75, 1.0])


@st.composite
def graphs(draw, kinds):
    prompt = live(still=static(draw(LEVELS)))
    names = ["level", "still"]
    for number in range(draw(st.integers(3, 12))):
        class_type = draw(st.sampled_from(sorted(kinds)))
        # A second output where there is one; elsewhere nothing comes through it, which has to work as well.
        links = {name: [draw(st.sampled_from(names)), 0] for name in kinds[class_type]}
        for link in links.values():
            if prompt[link[0]]["class_type"] == "DiffPair":
                link[1] = draw(st.integers(0, 1))
        item = node(class_type, **links, mark=10 + number)
        if class_type in ("DiffBlock", "DiffFail"):
            item["inputs"]["above"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
        if class_type == "DiffBlock":
            item["inputs"]["message"] = ""
        if class_type == "DiffLater":
            item["inputs"]["above"] = 50.0
            item["inputs"]["turns"] = draw(st.integers(0, 3))
        prompt[f"n{number}"] = item
        names.append(f"n{number}")
    for number, source in enumerate(draw(st.lists(st.sampled_from(names[2:]), min_size=1, max_size=4, unique=True))):
        prompt[f"caught{number}"] = catch(source, mark=number)
    return prompt


@st.composite
def lives(draw, kinds):
    prompt = draw(graphs(kinds))
    frames = []
    marks = {key: item["inputs"]["mark"] for key, item in prompt.items() if key.startswith("n")}
    for number in range(draw(st.integers(3, 7))):
        update = None
        if number == 0:
            update = prompt
        elif draw(st.booleans()):
            what = draw(st.sampled_from([*marks, "still"]))
            value = (
                {"value": draw(LEVELS)}
                if what == "still"
                else {"mark": marks[what] + draw(st.sampled_from([0, 100]))}
            )
            update = prompt = changed(prompt, **{what: value})
        # By mark: a mood, nothing, or an exception.
        moods = {
            mark: draw(st.sampled_from([None, 1, 2, ValueError()]))
            for mark in draw(st.sets(st.integers(10, 22), max_size=3))
        }
        frames.append(Frame(draw(LEVELS), update, moods))
    return frames


RANDOM = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=60
)


@RANDOM
@given(frames=lives(KINDS))
def test_random_graphs(lab, frames):
    assert_alike(lab, frames)


@settings(RANDOM, max_examples=25)
@given(frames=lives({**KINDS, **WAITING}))
def test_random_graphs_with_coroutines(lab, frames):
    assert_alike(lab, frames)
