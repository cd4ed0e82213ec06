"""Whose sound goes out: every sample of the stream once, the graph's where it came in time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_shim.media.decode import Sound
from gateway_shim.stream.audio import StreamSound, samples_of, sound_of
from gateway_shim.stream.av_sync import AudioGate
from gateway_shim.stream.text import records_of
from gateway_shim.trickle.data import LINE_LIMIT_BYTES
from proto import engine_pb2 as pb

GRAPH = 10_000  # the graph adds so much to every sample: whose it is can be seen
BLOCK = 960


def samples(first: int, count: int, added: int = 0) -> bytes:
    values = (np.arange(first, first + count) % 10_000 + added).astype(np.int16)
    return np.repeat(values, 2).tobytes()


def pts_of(position: int, origin: float = 0.0) -> int:
    return round(origin + position * 1.875)


class Line:
    """The time line of what went out."""

    def __init__(self, origin: float = 0.0) -> None:
        self.origin = origin
        self.first = 0  # position of sample 0
        self.gate: AudioGate[Sound] = AudioGate()
        self.sound = StreamSound(self.gate)
        list(self.gate.release(-1_000_000))  # the first picture is out
        self.out: list[int] = []
        self.spans: list[tuple[int, int]] = []

    def put(self, position: int, count: int = BLOCK, due: float = 1.0) -> None:
        self.first = self.sound.put(sound_of(pts_of(position, self.origin), samples(position, count)), due) - position

    def graph(self, position: int, count: int) -> None:
        self.sound.replace(self.first + position, samples(position, count, GRAPH))

    def take(self, sounds: object) -> None:
        for sound in sounds:  # type: ignore[attr-defined]
            values = np.frombuffer(samples_of(sound), np.int16)[::2].tolist()
            self.spans.append((sound.pts, len(values)))
            self.out += values

    def everything(self) -> None:
        self.take(self.sound.release(1 << 40))

    def assert_whole(self, end: int, begin: int = 0) -> None:
        assert [value % GRAPH for value in self.out] == [number % 10_000 for number in range(begin, end)]
        at = begin
        for pts, count in self.spans:
            assert abs(pts - (self.origin + at * 1.875)) <= 3, "the stamp says where the samples belong"
            at += count


def is_graphs(line: Line, begin: int, end: int) -> bool:
    return all(value >= GRAPH for value in line.out[begin:end])


def test_without_a_graph_blocks_pass_untouched() -> None:
    line = Line()
    sound = sound_of(0, samples(0, BLOCK))
    line.sound.put(sound, 1.0)
    assert list(line.sound.release(0)) == [sound]


def test_graphs_sound_takes_the_place_of_the_inputs() -> None:
    line = Line()
    line.sound.expect(0.1)
    for number in range(10):
        line.put(number * BLOCK)
    line.everything()
    assert not line.out, "it waits for the graph"
    line.graph(0, 4800)
    line.graph(4800, 4800)
    line.everything()
    line.assert_whole(9600)
    assert is_graphs(line, 0, 9600)
    assert line.sound.replaced_samples == 9600


def test_late_skipped_and_lost_sound_is_the_inputs() -> None:
    line = Line()
    line.sound.expect(0.5)
    for number in range(10):
        line.put(number * BLOCK, due=1.0 + number / 10)
    line.take(line.sound.overdue(1.55))  # the first one's due time and half a second are over
    assert len(line.out) == BLOCK
    line.graph(0, 2400)  # 960 samples too late, the rest in time
    line.graph(4800, 2400)  # 2400 to 4800 are missing
    line.sound.give_up()
    line.everything()
    line.assert_whole(9600)
    assert [is_graphs(line, *span) for span in ((0, 960), (960, 2400), (2400, 4800), (4800, 7200), (7200, 9600))] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert line.sound.late_samples == 960
    line.graph(7200, 2400)
    line.everything()
    line.assert_whole(9600)


def test_graph_that_claims_more_than_it_was_given_is_cut() -> None:
    line = Line()
    line.sound.expect(0.5)
    line.put(0)
    line.graph(0, 2 * BLOCK)
    line.put(BLOCK)
    line.sound.give_up()
    line.everything()
    line.assert_whole(2 * BLOCK)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.floats(0, 2))
def test_no_hole_and_no_sample_twice_whatever_happens(data: st.DataObject, origin: float) -> None:
    line, at, given_to_graph, now = Line(origin), 0, 0, 0.0
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["put", "put", "graph", "skip", "late", "expect", "give_up"])):
            case "put":
                count = data.draw(st.sampled_from([960, 1024, 311]))
                line.put(at, count, due=now + 1.0)
                at += count
            case "graph" if at > given_to_graph:
                count = data.draw(st.integers(1, at - given_to_graph))
                line.graph(given_to_graph, count)
                given_to_graph += count
            case "skip" if at > given_to_graph:
                given_to_graph += data.draw(st.integers(0, at - given_to_graph))
            case "late":
                now += data.draw(st.sampled_from([0.4, 1.2, 5.0]))
                line.take(line.sound.overdue(now))
            case "expect":
                line.sound.expect(0.5)
                given_to_graph = max(given_to_graph, at)  # it is told from here on
            case "give_up":
                line.sound.give_up()
        line.everything()
    line.take(line.sound.rest())
    line.assert_whole(at)


def test_gap_in_the_input_stays_a_gap() -> None:
    line = Line()
    line.sound.expect(0.5)
    line.put(0)
    line.put(48_000)
    line.graph(0, BLOCK)
    line.graph(48_000, BLOCK)
    line.everything()
    assert line.spans == [(0, BLOCK), (90_000, BLOCK)]
    assert is_graphs(line, 0, 2 * BLOCK)


@pytest.mark.parametrize("node_id", ["n" * 256, "\x01" * 256, "n" * 64_500, "ü" * 200_000, '"' * 32_255])
def test_text_of_a_node_with_a_long_id_is_lines_that_fit(node_id: str) -> None:
    records = records_of(pb.TextItem(pts=7, node_id=node_id, text="\x01" * 30_000))
    assert {record["node"] for record in records} == {node_id[:256]}
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() for record in records]
    assert max(map(len, lines)) < LINE_LIMIT_BYTES
    assert "".join(record["text"] for record in records) == "\x01" * 30_000


@pytest.mark.parametrize("text", ["", "hello", "x" * 65_000, "ü" * 40_000, '\x01\n"' * 30_000, "😀" * 50_000])
def test_text_of_any_length_is_lines_that_fit(text: str) -> None:
    records = records_of(pb.TextItem(pts=7, node_id="5", text=text))
    sizes = [len(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()) + 1 for record in records]
    assert max(sizes) <= LINE_LIMIT_BYTES
    assert "".join(record["text"] for record in records) == text
    if len(records) == 1:
        assert records == [{"type": "text", "pts": 7, "node": "5", "text": text}]
    else:
        assert [(record["part"], record["parts"]) for record in records] == [
            (number, len(records)) for number in range(1, len(records) + 1)
        ]
        assert all(size > LINE_LIMIT_BYTES - 1100 for size in sizes[:-1]), "as few lines as it takes"
