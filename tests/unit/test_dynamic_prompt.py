"""What the editor queues of a prompt text."""

import pytest

from engine.graph.dynamic_prompt import chosen


@pytest.mark.parametrize(
    ("text", "queued"),
    [
        ("a cat", "a cat"),
        ("a cat // not this\n{hat} /* nor\nthis */.", "a cat \nhat ."),
        ("{one|one} and {two}", "one and two"),
        ("{{a|a}|{a}}", "a"),
        (r"\{a\|b\}", "{a|b}"),
        (r"{\{|\{}", "{"),
        ("a | b } c", "a | b } c"),
        ("{never closed|never closed", "never closed"),
        ("{}", ""),
        ("back\\slash\\", "back\\slash\\"),
    ],
)
def test_comments_go_and_choices_are_made(text: str, queued: str) -> None:
    assert chosen(text) == queued


def test_the_same_text_gives_the_same_words_and_another_may_give_others() -> None:
    options = "{red|green|blue}"
    assert {chosen(f"{options} hat") for _ in range(20)} == {chosen(f"{options} hat")}
    others = {chosen(f"{options} hat {number}").split()[0] for number in range(60)}
    assert others == {"red", "green", "blue"}


def test_a_deep_text_is_no_recursion() -> None:
    assert chosen("{" * 50_000 + "a" + "}" * 50_000) == "a"
