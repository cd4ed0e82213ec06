import pytest
from multidict import CIMultiDict

from gateway_shim.trickle.wire import Answer, Backoff, next_url, read_answer, segment_url


@pytest.mark.parametrize("url", ["https://o:8935/ai/trickle/ch", "https://o:8935/ai/trickle/ch/"])
def test_urls_never_have_a_double_slash(url: str) -> None:
    assert segment_url(url, 0) == "https://o:8935/ai/trickle/ch/0"
    assert segment_url(url, -2) == "https://o:8935/ai/trickle/ch/-2"
    assert next_url(url) == "https://o:8935/ai/trickle/ch/next"


def test_index_below_the_lowest_is_refused() -> None:
    with pytest.raises(ValueError, match="-3"):
        segment_url("http://o/ch", -3)


def test_headers_are_read_without_regard_to_case() -> None:
    answer = read_answer(470, CIMultiDict({"lp-trickle-seq": "4", "LP-TRICKLE-LATEST": "12"}))
    assert answer == Answer(status=470, seq=4, latest=12, closed=False)
    assert answer.over is None


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "²"])
def test_unreadable_index_is_none(text: str) -> None:
    assert read_answer(200, {"Lp-Trickle-Seq": text}).seq is None


@pytest.mark.parametrize(
    ("status", "headers", "over"),
    [
        (200, {"Lp-Trickle-Closed": "terminated"}, "closed header"),
        (404, {"Lp-Trickle-Closed": "terminated"}, "closed header"),
        (404, {}, "404"),
        (470, {}, None),
        (200, {}, None),
        (500, {}, None),
    ],
)
def test_what_ends_a_channel(status: int, headers: dict[str, str], over: str | None) -> None:
    assert read_answer(status, headers).over == over


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_backoff_doubles_to_its_maximum_and_gives_up_after_failures_only() -> None:
    clock = Clock()
    backoff = Backoff(0.25, 2.0, 30.0, clock)
    assert [backoff.failed() for _ in range(5)] == [0.25, 0.5, 1.0, 2.0, 2.0]
    clock.now += 29.9
    assert backoff.failed() == 2.0
    clock.now += 0.2
    assert backoff.failed() is None


def test_backoff_begins_anew_after_a_success() -> None:
    clock = Clock()
    backoff = Backoff(0.25, 2.0, 30.0, clock)
    backoff.failed()
    clock.now += 29
    backoff.succeeded()
    clock.now += 29
    assert backoff.failed() == 0.25
