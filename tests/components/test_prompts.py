"""Weights in prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdm_deploy.components.prompts import PromptOptions, weighted_parts
from qdm_deploy.errors import InputError


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("(red:1.5) cat", [("red", 1.5), (" cat", 1.0)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:-1)", [("red", -1.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:2) cat)", [("a ", 1.1), ("red", 2 * 1.1), (" cat", 1.1)]),
        (r"\(red\) \[x\] \\", [(r"(red) [x] " + "\\", 1.0)]),
        (r"c\at", [(r"c\at", 1.0)]),
        ("a (red cat", [("a ", 1.0), ("red cat", 1.1)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("time: 12:30", [("time: 12:30", 1.0)]),
        ("(12:30)", [("12", 30.0)]),
        ("red:1.5)", [("red:1.5)", 1.0)]),
        ("[red:1.5]", [("red:1.5", 1 / 1.1)]),
    ],
)
def test_weights_of_a_prompt(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = weighted_parts(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts], rel=1e-12)


@given(text=st.text(alphabet=st.characters(exclude_characters="()[]:\\", exclude_categories=["Cs"]), min_size=1))
def test_a_prompt_without_brackets_is_one_part(text: str) -> None:
    assert weighted_parts(text) == [(text, 1.0)]


@given(text=st.text(min_size=1))
def test_an_escaped_prompt_is_itself(text: str) -> None:
    escaped = "".join(f"\\{one}" if one in "()[]\\" else one for one in text)
    assert weighted_parts(escaped) == [(text, 1.0)]


@pytest.mark.parametrize("number", ["1.2.3", ".", "101", "-100.5", "9" * 400])
def test_a_weight_that_is_no_number_is_refused(number: str) -> None:
    with pytest.raises(InputError, match="is no weight of a prompt; give a number from -100 to 100"):
        weighted_parts(f"(cat:{number})")


def test_only_one_layer_can_be_left_out() -> None:
    with pytest.raises(InputError, match="clip_skip 2 is not supported; choose 0 or 1"):
        PromptOptions(clip_skip=2)
