"""When two values are the same for a cache."""

from typing import Any

import pytest

from engine.graph.cache_keys import same


@pytest.mark.parametrize(
    ("one", "other", "are"),
    [
        (1, 1, True),
        (1, True, False),
        (2, 2.0, False),
        (0, False, False),
        ([1, "a"], (1, "a"), True),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": [1]}, {"a": [True]}, False),
        (float("nan"), float("nan"), False),
        (None, None, True),
        (object, object, False),
    ],
)
def test_values_of_one_type_that_are_equal(one: Any, other: Any, are: bool) -> None:
    """A node that takes anything makes another thing of 1 and of true."""
    assert same(one, other) is are
