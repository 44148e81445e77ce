"""Scores that know what the labels mean: polarity, distance on Mikels' wheel, lenient matches."""

import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from emor3_jax.data.labels import VALENCE_AROUSAL, find_label, normalize, spellings

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
    `\\boxed{}` is searched for the first label, as a whole word in any case and any spelling of
    `data.labels.SPELLINGS`. If it has none, the whole response is, for the label's own name alone:
    words such as "content" have other meanings in a text.

    Args:
      response: the text.
      names: the label set.
    """
    in_box, in_text = _patterns(tuple(names))
    boxes = _BOX.findall(response)
    for text, pattern in ((boxes[-1] if boxes else "", in_box), (response, in_text)):
        if match := pattern.search(text):
            return list(names).index(find_label(match[0], names))
    return -1


@functools.lru_cache(maxsize=64)
def _patterns(names: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Returns what finds a label in a box, and in a text."""

    def pattern(words: Iterable[str]) -> re.Pattern[str]:
        # Of words that begin alike, the longer one is meant.
        longest_first = sorted(map(normalize, words), key=len, reverse=True)
        joined = "|".join(map(re.escape, longest_first))
        return re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.IGNORECASE)

    return pattern(spellings(names)), pattern(names)
