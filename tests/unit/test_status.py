"""Health from facts: every combination, and what must never be said."""

import itertools

import pytest

from gateway_shim.engine_client import EngineState
from gateway_shim.status import (
    ENGINE_GONE_IS_ERROR_S,
    Facts,
    Health,
    best_state,
    health,
    reason,
    state_body,
    status_body,
)


def facts(engine: str = "READY", dead_s: float = 0.0, streams: int = 0) -> Facts:
    return Facts(engine, dead_s, streams, capacity=2)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (facts("ABSENT"), Health.LOADING),
        (facts("LOADING"), Health.LOADING),
        (facts("READY"), Health.IDLE),
        (facts("READY", streams=1), Health.OK),
        (facts("LOADING", streams=1), Health.OK),
        (facts("DEAD", 1.0), Health.LOADING),
        (facts("DEAD", 1.0, streams=1), Health.OK),
        (facts("DEAD", ENGINE_GONE_IS_ERROR_S), Health.ERROR),
        (facts("BROKEN"), Health.ERROR),
        (facts("DEAD", ENGINE_GONE_IS_ERROR_S, streams=1), Health.ERROR),
    ],
)
def test_health(given: Facts, word: Health) -> None:
    assert health(given) is word


def test_loading_is_never_an_error_however_long_it_takes() -> None:
    for engine, streams in itertools.product(("ABSENT", "LOADING", "READY"), (0, 1)):
        assert health(facts(engine, 1e9, streams)) is not Health.ERROR


def test_the_words_are_those_of_the_engine_client() -> None:
    assert {state.name for state in EngineState} == {"ABSENT", "LOADING", "READY", "BROKEN", "DEAD"}
    assert all((reason(facts(state.name)) == "") == (state is EngineState.READY) for state in EngineState)


@pytest.mark.parametrize(
    ("states", "best"),
    [
        ([], "ABSENT"),
        (["ABSENT", "DEAD"], "DEAD"),
        (["BROKEN", "DEAD"], "BROKEN"),
        (["BROKEN", "READY"], "READY"),
        (["DEAD", "LOADING"], "LOADING"),
        (["DEAD", "READY", "LOADING"], "READY"),
    ],
)
def test_one_engine_that_is_ready_is_enough(states: list[str], best: str) -> None:
    assert best_state(states) == best


def test_an_error_has_a_message_and_nothing_else_has() -> None:
    assert state_body(facts("DEAD", 200))["error_message"] == "the engine has been gone for 200 s"
    assert state_body(facts("DEAD", 2))["error_message"] is None


def test_figures_of_the_only_stream_stand_at_the_top() -> None:
    event = {"state": "ONLINE", "inference_status": {"fps": 12.0, "last_params": {"5": {}}}}
    assert status_body(facts(streams=1), {"a": event}, tasks=5, threads=3)["fps"] == 12.0
    both = status_body(facts(streams=2), {"a": event, "b": event}, tasks=5, threads=3)
    assert (both["fps"], both["current_params"], both["client_active"]) == (None, None, True)
