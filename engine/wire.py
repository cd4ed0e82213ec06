"""Between the messages of ``engine.proto`` and what the engine works with: formats, frames, results, findings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, TypeAlias

from cext import PixelFormat
from proto import engine_pb2 as pb

from .errors import InvalidRequest, Violation
from .graph.overrides import allowed_values
from .graph.schema import InputDefinition, NodeDefinition
from .graph.workflow import Finding, Prompt, Severity, is_link, load_json, title_of
from .utf8 import utf8

Matrix: TypeAlias = Literal["bt601", "bt709"]

PIXEL_FORMATS: Final[Mapping[int, PixelFormat]] = {
    pb.PIXEL_FORMAT_UNSPECIFIED: "i420",
    pb.PIXEL_FORMAT_I420: "i420",
    pb.PIXEL_FORMAT_NV12: "nv12",
    pb.PIXEL_FORMAT_RGB24: "rgb24",
}
_PIXEL_FORMAT_NUMBERS: Final = {
    "i420": pb.PIXEL_FORMAT_I420,
    "nv12": pb.PIXEL_FORMAT_NV12,
    "rgb24": pb.PIXEL_FORMAT_RGB24,
}
_MATRICES: Final[Mapping[int, Matrix]] = {
    pb.Colour.MATRIX_UNSPECIFIED: "bt601",
    pb.Colour.MATRIX_BT601: "bt601",
    pb.Colour.MATRIX_BT709: "bt709",
}


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """Of a session's frames, both ways; the size is that of the input."""

    width: int  # pixels, even
    height: int  # pixels, even
    time_base: Fraction = Fraction(1, 90000)  # seconds per tick of pts
    frame_rate: Fraction | None = None  # nominal, frames per second
    pixel_format: PixelFormat = "i420"
    matrix: Matrix = "bt601"
    full_range: bool = False

    @property
    def frame_bytes(self) -> int:
        """Size of ``Frame.planes``."""
        return plane_bytes(self.width, self.height, self.pixel_format)


def plane_bytes(width: int, height: int, pixel_format: PixelFormat) -> int:
    """Bytes of one picture of even size: 1.5 a pixel for 4:2:0, 3 for RGB."""
    return width * height * 3 if pixel_format == "rgb24" else width * height * 3 // 2


def video_format(message: pb.VideoFormat, max_width: int, max_height: int) -> VideoFormat:
    """Checked; InvalidRequest names every wrong field at once, with paths under ``video``."""
    violations = []
    for name, value, most in (("width", message.width, max_width), ("height", message.height, max_height)):
        if value == 0 or value % 2 or value > most:
            text = f"{name} is {value}; an even number of pixels from 2 to {most} is needed"
            violations.append(Violation(f"video.{name}", text, "out_of_range"))
    time_base, frame_rate = Fraction(1, 90000), None
    if message.HasField("time_base"):
        if message.time_base.numerator <= 0 or message.time_base.denominator <= 0:
            text = "time_base has to be a positive number of seconds per tick"
            violations.append(Violation("video.time_base", text, "out_of_range"))
        else:
            time_base = Fraction(message.time_base.numerator, message.time_base.denominator)
    if message.frame_rate.numerator or message.frame_rate.denominator:
        if message.frame_rate.numerator <= 0 or message.frame_rate.denominator <= 0:
            text = "frame_rate has to be positive, or 0/0 when it is unknown"
            violations.append(Violation("video.frame_rate", text, "out_of_range"))
        else:
            frame_rate = Fraction(message.frame_rate.numerator, message.frame_rate.denominator)
    enums = (
        ("pixel_format", message.pixel_format, PIXEL_FORMATS),
        ("colour.matrix", message.colour.matrix, _MATRICES),
        ("colour.range", message.colour.range, pb.Colour.Range.values()),
    )
    violations += [
        Violation(f"video.{name}", f"{value} is no {name} of this contract", "unknown_value")
        for name, value, known in enums
        if value not in known
    ]
    if violations:
        raise InvalidRequest("; ".join(violation.message for violation in violations), violations)
    return VideoFormat(
        width=message.width,
        height=message.height,
        time_base=time_base,
        frame_rate=frame_rate,
        pixel_format=PIXEL_FORMATS[message.pixel_format],
        matrix=_MATRICES[message.colour.matrix],
        full_range=message.colour.range == pb.Colour.RANGE_FULL,
    )


def video_message(video: VideoFormat, *, width: int | None = None, height: int | None = None) -> pb.VideoFormat:
    """The same as a message, with another size where one is given (0: known with the first result)."""
    rate = video.frame_rate
    return pb.VideoFormat(
        width=video.width if width is None else width,
        height=video.height if height is None else height,
        time_base=pb.Rational(numerator=video.time_base.numerator, denominator=video.time_base.denominator),
        frame_rate=pb.Rational(numerator=rate.numerator, denominator=rate.denominator) if rate else pb.Rational(),
        pixel_format=_PIXEL_FORMAT_NUMBERS[video.pixel_format],
        colour=pb.Colour(
            matrix=pb.Colour.MATRIX_BT709 if video.matrix == "bt709" else pb.Colour.MATRIX_BT601,
            range=pb.Colour.RANGE_FULL if video.full_range else pb.Colour.RANGE_LIMITED,
        ),
    )


def overrides(messages: Iterable[pb.NodeOverride]) -> list[dict[str, dict[str, Any]]]:
    """Layers of ``{node_id: {input: value}}``, one on top of the other: a new one where an input is named again."""
    layers: list[dict[str, dict[str, Any]]] = []
    violations = []
    for message in messages:
        path = f"nodes.{message.node_id}.inputs.{message.input}"
        if not message.node_id or not message.input:
            violations.append(Violation(path, "node_id and input both have to be given", "missing"))
            continue
        try:
            value = load_json(message.value_json)
        except ValueError as exc:
            violations.append(Violation(path, f"value_json is not JSON: {exc}", "not_json"))
            continue
        if not layers or message.input in layers[-1].get(message.node_id, {}):
            layers.append({})
        layers[-1].setdefault(message.node_id, {})[message.input] = value
    if violations:
        raise InvalidRequest("; ".join(violation.message for violation in violations), violations)
    return layers


def finding_message(finding: Finding) -> pb.Finding:
    severity = pb.Finding.SEVERITY_ERROR if finding.severity is Severity.ERROR else pb.Finding.SEVERITY_WARNING
    return pb.Finding(
        severity=severity,
        code=finding.code,
        path=utf8(finding.path),
        node_id=utf8(finding.node_id),
        class_type=utf8(finding.class_type),
        title=utf8(finding.title),
        input=utf8(finding.input),
        message=utf8(finding.message),
        remedy=utf8(finding.remedy),
    )


def definition_message(definition: NodeDefinition) -> pb.NodeDefinition:
    return pb.NodeDefinition(
        class_type=utf8(definition.class_type),
        display_name=utf8(definition.display_name),
        category=utf8(definition.category),
        description=utf8(definition.description),
        inputs=[input_message(item) for item in definition.inputs],
        outputs=[
            pb.OutputDefinition(name=utf8(o.name), type=utf8(o.type), is_list=o.is_list) for o in definition.outputs
        ],
        output_node=definition.output_node,
        pack=definition.pack,
    )


def input_message(definition: InputDefinition) -> pb.InputDefinition:
    message = pb.InputDefinition(
        name=utf8(definition.name),
        type=utf8(definition.type),
        required=definition.required,
        default_json=definition.default_json,
        choices_json=definition.choices_json,
        multiline=definition.multiline,
        tooltip=utf8(definition.tooltip),
    )
    if definition.minimum is not None:
        message.minimum = definition.minimum
    if definition.maximum is not None:
        message.maximum = definition.maximum
    if definition.step is not None:
        message.step = definition.step
    return message


def parameters(prompt: Prompt, definitions: Mapping[str, NodeDefinition]) -> list[pb.Parameter]:
    """Every input of every node, in the order of the prompt and its definitions.

    Inputs that the prompt leaves out have their default's value; a node of unknown class has what the prompt gives.
    """
    found = []
    for node_id, node in prompt.items():
        definition = definitions.get(node["class_type"])
        known = {item.name: item for item in definition.inputs} if definition is not None else {}
        for name in dict.fromkeys([*known, *node["inputs"]]):
            item = known.get(name)
            value = node["inputs"].get(name)
            linked = is_link(value)
            current = json.dumps(value) if name in node["inputs"] else item.default_json if item is not None else ""
            found.append(
                pb.Parameter(
                    node_id=node_id,
                    title=title_of(node),
                    class_type=node["class_type"],
                    definition=input_message(item) if item is not None else pb.InputDefinition(name=name),
                    value_json="" if linked else current,
                    linked=linked,
                    allowed=allowed_values(item) if item is not None else "",
                )
            )
    return found
