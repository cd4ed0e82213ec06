"""What can run before the first frame."""

from engine.graph.schema import InputDefinition, NodeDefinition, OutputDefinition
from engine.graph.static import is_loader, static_nodes
from engine.graph.workflow import Prompt


def define(name: str, *inputs: InputDefinition, gives: str = "IMAGE", sink: bool = False) -> NodeDefinition:
    outputs = (OutputDefinition(gives, gives),) if gives else ()
    return NodeDefinition(name, name, "", "", inputs, outputs, sink, "test")


ANY = [InputDefinition(name, "*", False) for name in "abc"]
DEFINITIONS = {
    each.class_type: each
    for each in (
        define("LoadTensor"),
        define("SaveTensor", InputDefinition("images", "IMAGE", True), gives="", sink=True),
        define("Load", InputDefinition("name", "STRING", True), gives="MODEL"),
        define("Encode", *ANY, gives="CONDITIONING"),
        define("Sample", *ANY),
        define("Switch", InputDefinition("a", "*", False, lazy=True), InputDefinition("b", "*", False)),
    )
}


def node(class_type: str, **inputs: object) -> dict[str, object]:
    return {"class_type": class_type, "inputs": inputs}


PROMPT: Prompt = {
    "out": node("SaveTensor", images=["sample", 0]),
    "sample": node("Sample", a=["model", 0], b=["text", 0], c=["in", 0]),
    "text": node("Encode", a=["clip", 0]),
    "clip": node("Load", name="clip"),
    "model": node("Load", name="model"),
    "in": node("LoadTensor"),
    "idle": node("Load", name="nobody asks for it"),
}


def test_static_nodes_come_sources_first_and_only_those_that_are_needed() -> None:
    found = static_nodes(PROMPT, DEFINITIONS)
    assert set(found) == {"clip", "model", "text"}
    assert found.index("clip") < found.index("text")


def test_behind_a_lazy_input_nothing_is_loaded_in_vain() -> None:
    prompt = PROMPT | {
        "sample": node("Switch", a=["model", 0], b=["text", 0]),
        "out": node("SaveTensor", images=["sample", 0]),
    }
    assert set(static_nodes(prompt, DEFINITIONS)) == {"clip", "text", "sample"}


def test_unknown_class_is_left_to_the_run() -> None:
    assert "text" not in static_nodes(PROMPT | {"text": node("Nope", a=["clip", 0])}, DEFINITIONS)


def test_loader_makes_a_model_of_a_name() -> None:
    assert is_loader(PROMPT["model"], DEFINITIONS)
    assert not is_loader(PROMPT["text"], DEFINITIONS)
    assert not is_loader(node("Load", name=["text", 0]), DEFINITIONS)
    assert not is_loader(node("Nope"), DEFINITIONS)
