"""What viewers see while the graph gives nothing, by policy; and the pictures that are drawn for it."""

import av
import numpy as np
import pytest

from gateway_shim.media.colour import Colour
from gateway_shim.media.overlay import Notice, dimmed, grey, with_notice
from gateway_shim.media.planes import frame_of, plane_views, planes_of
from gateway_shim.stream.fallback import Fallback, Policy
from gateway_shim.stream.ledger import Outcome
from gateway_shim.stream.mailbox import Entry

FRAME = 3000  # ticks at 30 fps
LATE, LOST = Outcome.DROPPED, Outcome.PASSED_THROUGH


def flat(level: int, width: int = 64, height: int = 48) -> av.VideoFrame:
    return frame_of(bytes([level]) * (width * height * 3 // 2), width, height)


def luma(frame: av.VideoFrame) -> int:
    """Of the picture's first row, where no notice is."""
    return round(float(plane_views(frame)[0][0].mean()))


def entry(number: int, outcome: Outcome, result: av.VideoFrame | None = None) -> Entry:
    made = Entry(number, number * FRAME, flat(50), Colour(), 0.0, 1e9)
    made.outcome, made.result = outcome, result
    return made


def shown(fallback: Fallback, outcome: Outcome, numbers: range) -> list[int]:
    return [luma(fallback.choose(entry(number, outcome)).frame) for number in numbers]


@pytest.mark.parametrize(
    ("policy", "at_once", "later"),
    [(Policy.AUTO, 200, 50), (Policy.PASSTHROUGH, 50, 50), (Policy.HOLD, 200, 108), (Policy.OVERLAY, 200, 108)],
)
def test_lost_engine(policy: Policy, at_once: int, later: int) -> None:
    fallback = Fallback(policy)
    fallback.choose(entry(0, Outcome.PROCESSED, flat(200)))
    assert shown(fallback, LOST, range(1, 15)) == [at_once] * 14
    assert shown(fallback, LOST, range(15, 30)) == [later] * 15
    assert luma(fallback.choose(entry(30, Outcome.PROCESSED, flat(201))).frame) == 201
    assert shown(fallback, LOST, range(31, 32)) == [50 if policy is Policy.PASSTHROUGH else 201]


@pytest.mark.parametrize("policy", Policy)
def test_slow_graph_repeats_its_last_picture_and_does_not_flicker(policy: Policy) -> None:
    fallback = Fallback(policy)
    fallback.choose(entry(0, Outcome.PROCESSED, flat(200)))
    assert shown(fallback, LATE, range(1, 15)) == [200] * 14


@pytest.mark.parametrize("policy", [Policy.HOLD, Policy.OVERLAY])
def test_input_is_never_shown_where_the_policy_hides_it(policy: Policy) -> None:
    fallback = Fallback(policy)
    for number, outcome in enumerate((LOST, LATE, Outcome.FAILED) * 20):
        choice = fallback.choose(entry(number, outcome))
        assert luma(choice.frame) == 40
        assert choice.repeated, "the ledger counts it as dropped, not as passed through"
        assert (choice.frame.width, choice.frame.height) == (64, 48)


@pytest.mark.parametrize("policy", Policy)
def test_graph_without_pictures_leaves_those_of_the_input(policy: Policy) -> None:
    fallback = Fallback(policy, gives_pictures=lambda: False)
    assert shown(fallback, LATE, range(3)) == [50] * 3


def test_stand_ins_are_drawn_once_for_as_long_as_nothing_changes() -> None:
    notice = Notice("Loading", 0.1)
    fallback = Fallback(Policy.OVERLAY, notice=lambda: notice)
    first, second = (fallback.choose(entry(number, LOST)).frame for number in (1, 2))
    assert first is second
    notice = Notice("Loading", 0.2)
    assert fallback.choose(entry(3, LOST)).frame is not first
    fallback.policy = Policy.HOLD
    assert fallback.choose(entry(4, LOST)).frame is fallback.choose(entry(5, LOST)).frame


def test_dimmed_is_half_of_the_light_and_of_the_colour() -> None:
    frame = frame_of(bytes([235]) * 3072 + bytes([128]) * 768 + bytes([228]) * 768, 64, 48)
    before = planes_of(frame)
    y, u, v = plane_views(dimmed(frame))
    assert (int(y[0, 0]), int(u[0, 0]), int(v[0, 0])) == (125, 128, 178)
    assert planes_of(frame) == before, "decoded samples are references of the decoder"
    assert luma(dimmed(flat(16))) == 16, "black stays black"


def test_notice_is_legible_and_stays_in_its_band() -> None:
    frame = grey(1280, 720)
    before = planes_of(frame)
    (plane, *_) = plane_views(with_notice(frame, Notice("The engine is being restarted", 0.5)))
    assert planes_of(frame) == before
    assert np.all(plane[:656] == 40)
    text, bar = plane[656:700], plane[708:716, 16:-16]
    assert 0.02 < float((text[:, :600] == 220).mean()) < 0.4, "ink"
    assert float((bar == 150).mean()) == pytest.approx(0.5, abs=0.01)


def test_different_words_look_different() -> None:
    def drawn(text: str) -> bytes:
        return planes_of(with_notice(grey(320, 240), Notice(text)))

    assert len({drawn(text) for text in ("", "The engine", "The engina", "a" * 500)}) == 4
    assert drawn("\x1b[2Jx") == drawn("?[2Jx"), "orders of the outside are no orders"
    assert drawn("é") == drawn("?")


@pytest.mark.parametrize(("width", "height"), [(2, 2), (16, 16), (320, 18), (854, 482), (64, 1080)])
@pytest.mark.parametrize("progress", [None, -1.0, 0.0, 7.0])
def test_every_size_can_be_drawn_on(width: int, height: int, progress: float | None) -> None:
    frame = with_notice(grey(width, height), Notice("x" * 100, progress))
    assert (frame.width, frame.height) == (width, height)
    assert dimmed(frame).height == height
