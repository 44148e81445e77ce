"""Polarity, the wheel and lenient matches, by hand."""

import numpy as np
import pytest

from emor3_jax.data.labels import LABEL_SETS
from emor3_jax.evaluation.emotions import (
    WHEEL,
    first_named,
    polarity_accuracy,
    wheel_distance,
    wheel_steps,
)

MIKELS = LABEL_SETS["mikels8"]


def test_steps_go_around_the_wheel_by_the_shorter_way() -> None:
    assert sorted(WHEEL) == sorted(MIKELS)
    assert wheel_steps("amusement", "amusement") == 0
    assert wheel_steps("amusement", "contentment") == wheel_steps("contentment", "amusement") == 1
    assert wheel_steps("amusement", "anger") == 1
    assert wheel_steps("amusement", "fear") == 4
    assert wheel_steps("awe", "anger") == 3


def test_the_distance_is_that_of_errors_alone() -> None:
    at = {name: i for i, name in enumerate(MIKELS)}
    labels = np.array([at[x] for x in ("awe", "awe", "awe", "fear", "anger")])
    answers = np.array([at["awe"], at["contentment"], -1, at["amusement"], at["amusement"]])
    # Right; 1 step; no answer; 4 steps; 1 step.
    assert wheel_distance(labels, answers, MIKELS) == pytest.approx((1 + 4 + 1) / 3)
    assert wheel_distance(labels, labels, MIKELS) is None
    assert wheel_distance(labels, answers, ("joy", "fear")) is None


def test_polarity_from_the_fine_answer() -> None:
    names = ("joy", "fear", "sadness", "neutral", "awe")
    labels = np.array([0, 0, 1, 2, 3, 4])
    # Positive for positive; none; negative for negative, twice (one of them another emotion);
    # a neutral row, which has no polarity; neutral for positive.
    answers = np.array([4, -1, 1, 1, 0, 3])
    assert polarity_accuracy(labels, answers, names) == pytest.approx(3 / 5)
    assert polarity_accuracy(np.array([3]), np.array([3]), names) is None
    # Polarities themselves, and sets of one side, have nothing to add.
    assert polarity_accuracy(labels, answers, ("negative", "positive")) is None
    assert polarity_accuracy(np.array([0]), np.array([0]), ("fear", "anger")) is None


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("It is Fear, not awe.", "fear"),
        ("fearless and angered", ""),
        (r"the content is dull \boxed{scared}", "fear"),
        ("the content is dull, one feels sad", ""),
        (r"sad, fear then \boxed{ Awe }", "awe"),
        (r"\boxed{fear} no, \boxed{mostly awe, some fear}", "awe"),
        # The box holds no label: the text does.
        (r"so it is awe: \boxed{wonder}", "awe"),
        ("", ""),
    ],
)
def test_the_first_label_that_is_named(response: str, label: str) -> None:
    found = first_named(response, MIKELS)
    assert (MIKELS[found] if found >= 0 else "") == label


def test_of_labels_that_begin_alike_the_longer_is_meant() -> None:
    assert first_named("deep joy (x) or joy", ("joy", "deep joy (x)")) == 1
    assert first_named("joy or deep joy", ("joy", "deep joy")) == 0
