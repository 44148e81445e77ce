"""Scores that know what the labels mean: polarity, distance on Mikels' wheel, lenient matches."""

import re
from collections.abc import Sequence

import numpy as np

from emor3_jax.data.labels import VALENCE_AROUSAL, normalize

WHEEL = ("amusement", "contentment", "awe", "excitement", "fear", "sadness", "disgust", "anger")
"""Mikels' eight emotions in their order around the wheel; the last is next to the first.

The wheel is that of Zhao et al., "Predicting personalized emotion perceptions of social images",
2016.
"""

_SIDES = ("negative", "positive")
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


def wheel_steps(a: str, b: str) -> int:
    """Returns the steps between two emotions of `WHEEL` along its shorter arc, 0 to 4."""
    apart = abs(WHEEL.index(a) - WHEEL.index(b))
    return min(apart, len(WHEEL) - apart)


def wheel_distance(labels: np.ndarray, answers: np.ndarray, names: Sequence[str]) -> float | None:
    """Returns the mean steps on Mikels' wheel between a wrong answer and its label, in [1, 4].

    Zhao et al. count one more. Rows without an answer have no distance.

    Args:
      labels: int[n], the true labels.
      answers: int[n], the answers; one outside [0, K) is none.
      names: the label set, K of them.

    Returns:
      The mean; None if a label is not on the wheel, or no answer is wrong.
    """
    own = [normalize(name) for name in names]
    if not set(own) <= set(WHEEL):
        return None
    steps = np.array([[wheel_steps(a, b) for b in own] for a in own])
    wrong = (answers >= 0) & (answers < len(own)) & (answers != labels)
    return float(np.mean(steps[labels[wrong], answers[wrong]])) if wrong.any() else None


def polarity_accuracy(
    labels: np.ndarray, answers: np.ndarray, names: Sequence[str]
) -> float | None:
    """Returns the share of rows whose answer has the polarity of their label, in [0, 1].

    Counted over the rows whose label is positive or negative; no answer, or a neutral one, is
    wrong.

    Args:
      labels: int[n], the true labels.
      answers: int[n], the answers; one outside [0, K) is none.
      names: the label set, K of them.

    Returns:
      The share; None if the labels do not have both polarities, or none of the rows has one.
    """
    sides = [VALENCE_AROUSAL.get(normalize(name), ("",))[0] for name in names]
    if not set(_SIDES) <= set(sides):
        return None
    # One entry more, which an answer outside the set takes.
    polarity = np.array([*(_SIDES.index(s) if s in _SIDES else -1 for s in sides), -1])
    judged = polarity[labels] >= 0
    said = polarity[np.where((answers >= 0) & (answers < len(sides)), answers, len(sides))]
    return float(np.mean((said == polarity[labels])[judged])) if judged.any() else None


def first_named(response: str, names: Sequence[str]) -> int:
    """Returns the index of the label that a response names first, -1 if it names none.

    The lenient match beside the exact one: responses without a box are read too. The last
    `\\boxed{}` is searched for the first label, as a whole word in any case; if it has none, the
    whole response is.

    Args:
      response: the text.
      names: the label set.
    """
    # Of labels that begin alike, the longer one is meant.
    ordered = sorted(names, key=len, reverse=True)
    pattern = re.compile(
        r"(?<!\w)(?:" + "|".join(f"({re.escape(name.strip())})" for name in ordered) + r")(?!\w)",
        re.IGNORECASE,
    )
    boxes = _BOX.findall(response)
    for text in (*boxes[-1:], response):
        if match := pattern.search(text):
            return list(names).index(ordered[match.lastindex - 1])
    return -1
