"""Paired comparison of two policies on the same rows: McNemar's test, bootstrap intervals."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from emor3_jax.evaluation.metrics import Counts, label_counts

RESAMPLES = 10_000
"""Bootstrap samples."""

_AT_ONCE = 500

SCORES: dict[str, Callable[[Counts], np.ndarray]] = {
    "accuracy": Counts.accuracy,
    "macro_f1": Counts.macro_f1,
    "uar": Counts.mean_recall,
}
"""Name → score of counts, float[R]."""


class Difference(NamedTuple):
    """A score of two policies on the same rows.

    Attributes:
      first, second: the score of each, in [0, 1].
      low, high: 95 % interval of second - first, by the bootstrap over rows.
    """

    first: float
    second: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """Returns second - first."""
        return self.second - self.first


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the p-value of McNemar's exact test, two-sided.

    Under the null hypothesis, a row that one policy alone gets right is as likely to be the one's
    as the other's.

    Args:
      only_first, only_second: rows that the first or the second policy alone gets right.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    # Integers of any size: the sum is exact.
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def differences(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, k: int, seed: int = 0
) -> dict[str, Difference]:
    """Returns accuracy, macro F1 and mean recall of two policies, with intervals of their change.

    Rows are drawn with replacement, for both policies the same ones. That is done by the number
    of rows of each (label, first answer, second answer), which is exactly the same and takes no
    longer for more rows.

    Args:
      labels: int[n], the true labels in [0, K), at least one row.
      first, second: int[n], the answers; one outside [0, K) is wrong.
      k: K, number of labels.
      seed: of the resampling.
    """
    inside = [np.where((x >= 0) & (x < k), x, k) for x in (first, second)]
    cells, rows = np.unique(np.stack([labels, *inside]), axis=1, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    for start in range(0, RESAMPLES, _AT_ONCE):
        size = min(_AT_ONCE, RESAMPLES - start)
        draws = rng.multinomial(len(labels), rows / len(labels), size).astype(np.float64)
        both = [_drawn_counts(cells[0], answers, draws, k) for answers in cells[1:]]
        for name, score in SCORES.items():
            drawn[name].append(score(both[1]) - score(both[0]))
    whole = [label_counts(labels, answers, k) for answers in inside]
    found = {}
    for name, score in SCORES.items():
        low, high = np.percentile(np.concatenate(drawn[name]), [2.5, 97.5])
        found[name] = Difference(*(float(score(x)[0]) for x in whole), float(low), float(high))
    return found


def _drawn_counts(labels: np.ndarray, answers: np.ndarray, draws: np.ndarray, k: int) -> Counts:
    """Returns the counts of R bootstrap samples.

    Args:
      labels, answers: int[cells], of each cell; answers in [0, K].
      draws: float[R, cells], rows of each cell.
      k: K, number of labels.
    """
    true, said = labels[:, None] == np.arange(k), answers[:, None] == np.arange(k)
    return Counts(*(draws @ x.astype(np.float64) for x in (true & said, true, said)))
