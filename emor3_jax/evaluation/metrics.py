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


class Counts(NamedTuple):
    """Rows of each label, for R sets of rows at once.

    Attributes:
      hits: int[R, K], rows of the label that are answered with it.
      true: int[R, K], rows of the label.
      said: int[R, K], rows answered with it.
    """

    hits: np.ndarray
    true: np.ndarray
    said: np.ndarray

    def accuracy(self) -> np.ndarray:
        """Returns float[R], the share of rows that are right."""
        return self.hits.sum(axis=1) / np.maximum(self.true.sum(axis=1), 1)

    def mean_recall(self) -> np.ndarray:
        """Returns float[R], the mean recall of the labels that occur."""
        return self._mean(_ratio(self.hits, self.true))

    def macro_f1(self) -> np.ndarray:
        """Returns float[R], the mean F1 of the labels that occur."""
        return self._mean(self.f1())

    def f1(self) -> np.ndarray:
        """Returns float[R, K], the F1 of each label."""
        return _ratio(2 * self.hits, self.true + self.said)

    def _mean(self, scores: np.ndarray) -> np.ndarray:
        there = self.true > 0
        return (scores * there).sum(axis=1) / np.maximum(there.sum(axis=1), 1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def label_counts(labels: np.ndarray, answers: np.ndarray, k: int) -> Counts:
    """Returns the counts of one set of rows, R = 1.

    Args:
      labels: int[n], the true labels in [0, k).
      answers: int[n], the answers; one outside [0, k) is wrong and counts for no label.
      k: number of labels.
    """
    counts = confusion_matrix(labels, answers, k)
    return Counts(np.diag(counts)[None], counts.sum(axis=1)[None], counts[:, :-1].sum(axis=0)[None])


def macro_f1(labels: np.ndarray, answers: np.ndarray, k: int) -> float:
    """Returns the mean of the F1 of each label that occurs in `labels`, in [0, 1].

    Args:
      labels, answers, k: as of `label_counts`.
    """
    return float(label_counts(labels, answers, k).macro_f1()[0])


def weighted_f1(labels: np.ndarray, answers: np.ndarray, k: int) -> float:
    """Returns the same, each label weighed by how many rows have it."""
    counts = label_counts(labels, answers, k)
    rows = counts.true[0]
    return float(np.average(counts.f1()[0], weights=rows)) if rows.any() else 0.0


def mean_recall(labels: np.ndarray, answers: np.ndarray, k: int) -> float:
    """Returns the mean recall of the labels that occur, in [0, 1]; also called UAR."""
    return float(label_counts(labels, answers, k).mean_recall()[0])


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
