"""Metrics of an evaluation as pure functions of labels and answers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emor3_jax.types import NOTHING_TO_JUDGE

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


class ClassScores(NamedTuple):
    """Scores of one label; a share of nothing is 0.

    Attributes:
      label: its name.
      rows: how many rows have it.
      precision: share of the answers of this label that are right.
      recall: share of its rows that are answered with it.
      f1: their harmonic mean.
    """

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, by Wilson's score.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.

    Args:
      hits: rows that are right.
      rows: all rows; of none, the share may be anything.
    """
    if not rows:
        return 0.0, 1.0
    share, z2 = hits / rows, Z_95**2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    spread = math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2)) * Z_95 / (1 + z2 / rows)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def confusion_matrix(labels: np.ndarray, answers: np.ndarray, k: int) -> np.ndarray:
    """Returns int[k, k + 1]: rows by true label and by answer, the last column for no label.

    Args:
      labels: int[n], the true labels in [0, k).
      answers: int[n], the answers; one outside [0, k) is no label.
      k: number of labels.
    """
    counts = np.zeros((k, k + 1), np.int64)
    np.add.at(counts, (labels, np.where((answers >= 0) & (answers < k), answers, k)), 1)
    return counts


def class_scores(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> list[ClassScores]:
    """Returns the scores of each label.

    Args:
      labels: K names.
      confusion: as `confusion_matrix` returns it.
    """
    counts = np.asarray(confusion).reshape(len(labels), len(labels) + 1)
    scores = []
    for i, label in enumerate(labels):
        hits, true, said = int(counts[i, i]), int(counts[i].sum()), int(counts[:, i].sum())
        scores.append(
            ClassScores(
                label,
                true,
                hits / said if said else 0.0,
                hits / true if true else 0.0,
                2 * hits / (true + said) if true + said else 0.0,
            )
        )
    return scores


def macro_f1(labels: np.ndarray, answers: np.ndarray, k: int) -> float:
    """Returns the mean of the F1 of each label that occurs in `labels`, in [0, 1].

    Args:
      labels: int[n], the true labels in [0, k).
      answers: int[n], the answers; one outside [0, k) is wrong and counts for no label.
      k: number of labels.
    """
    f1, rows = _f1(labels, answers, k)
    return float(np.mean(f1[rows > 0])) if rows.any() else 0.0


def weighted_f1(labels: np.ndarray, answers: np.ndarray, k: int) -> float:
    """Returns the same, each label weighed by how many rows have it."""
    f1, rows = _f1(labels, answers, k)
    return float(np.average(f1, weights=rows)) if rows.any() else 0.0


def _f1(labels: np.ndarray, answers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns float[k], the F1 of each label, and int[k], its rows."""
    counts = confusion_matrix(labels, answers, k)
    scores = class_scores([""] * k, counts)
    return np.array([s.f1 for s in scores]), np.array([s.rows for s in scores])


def majority(answers: np.ndarray) -> np.ndarray:
    """Returns int[n], index of the majority-vote response of each row (maj@k).

    It is the first response with the label that most of them box; of labels with as many votes, the
    one that was boxed first. In a row where none boxes a label it is the first response.

    Args:
      answers: int[n, k], index of the boxed label, negative where there is none.
    """
    votes = (answers[:, :, None] == answers[:, None, :]).sum(-1)
    return np.argmax(np.where(answers >= 0, votes, 0), axis=1)


def decoupling(answers: np.ndarray, inferred: np.ndarray) -> float:
    """Returns the share of responses whose re-inferred emotion is not their own answer.

    Counted over the responses with both a boxed label and a text to judge; 0 if there is none.

    Args:
      answers: int[n], index of the boxed label, negative where there is none.
      inferred: int[n], index of the label inferred from s1..s2, negative where the reply was no
        label, `NOTHING_TO_JUDGE` where there was no text.
    """
    both = (answers >= 0) & (inferred != NOTHING_TO_JUDGE)
    return float(np.mean(answers[both] != inferred[both])) if both.any() else 0.0
