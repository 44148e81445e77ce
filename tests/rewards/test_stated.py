"""Stated numbers and the reward for honest ones, by hand."""

import math

import pytest

from emor3_jax.rewards.stated import log_score, stated_confidence, stated_number
from emor3_jax.rewards.terms import make_term


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("<confidence>0.8</confidence>", 0.8),
        ("<confidence> 85 % </confidence>", 0.85),
        ("<confidence>.2</confidence> no <confidence>1</confidence>", 1.0),
        ("<confidence>high</confidence>", None),
        ("<confidence>85</confidence>", None),
        ("<confidence>-0.1</confidence>", None),
        ("confidence 0.8", None),
    ],
)
def test_confidences_are_read(response: str, number: float | None) -> None:
    found = stated_confidence(response)
    assert math.isnan(found) if number is None else found == pytest.approx(number)


def test_numbers_of_any_tag_are_read() -> None:
    assert stated_number("<valence>-1.5</valence>", "valence") == -1.5
    assert math.isnan(stated_number("<valence>-1.5</valence>", "arousal"))


def test_the_log_score_by_hand() -> None:
    span = math.log(0.99) - math.log(0.01)
    right = r"\boxed{Awe} <confidence>0.5</confidence>"
    assert log_score(right, "awe") == pytest.approx((math.log(0.5) - math.log(0.01)) / span)
    # Half sure, right and wrong are worth the same; sure and wrong is worth nothing.
    assert log_score(right, "fear") == pytest.approx(log_score(right, "awe"))
    sure = r"\boxed{awe} <confidence>1</confidence>"
    assert log_score(sure, "awe") == pytest.approx(1.0)
    assert log_score(sure, "fear") == pytest.approx(0.0)
    assert log_score(r"\boxed{awe}", "awe") == 0.0
    assert log_score("<confidence>1</confidence>", "awe") == 0.0


def test_to_be_honest_pays_most() -> None:
    def expected(said: float, true: float) -> float:
        text = rf"\boxed{{awe}} <confidence>{said}</confidence>"
        return true * log_score(text, "awe") + (1 - true) * log_score(text, "fear")

    for true in (0.2, 0.5, 0.9):
        said = [x / 20 for x in range(1, 20)]
        assert max(said, key=lambda x: expected(x, true)) == pytest.approx(true)


def test_the_log_score_is_a_term_of_the_reward() -> None:
    term = make_term("log_score", 0.1, "", "", "emor3_jax.rewards.stated:log_score")
    assert term.text is log_score
