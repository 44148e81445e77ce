"""Calibration of confidences: ECE, Brier score, AUROC, accuracy at each coverage."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BINS = 10
"""Bins of the expected calibration error and of the reliability diagram."""

_POINTS = 100
"""Points of a coverage curve that are kept, at most."""


class Bin(NamedTuple):
    """The rows whose confidence lies in (low, high]; 0 is in the first bin.

    Attributes:
      low, high: the bin's edges.
      rows: how many lie in it.
      confidence: their mean confidence, 0 of no rows.
      accuracy: share of them that are right, 0 of no rows.
    """

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


class Calibration(NamedTuple):
    """How well the confidences of one source tell right answers from wrong ones.

    Attributes:
      bins: of the reliability diagram.
      coverage: (coverage, accuracy) where only the surest rows are answered, from the surest on.
    """

    bins: Sequence[Bin]
    coverage: Sequence[tuple[float, float]]

    def at(self, share: float) -> float | None:
        """Returns the accuracy in percent at the largest coverage up to `share`, None if none is.

        Args:
          share: of all rows, in [0, 1].
        """
        # Shares of rows are rounded.
        found = [accuracy for coverage, accuracy in self.coverage if coverage <= share + 1e-9]
        return 100 * found[-1] if found else None


def reliability_bins(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Returns the equally wide bins of a reliability diagram.

    Args:
      confidence: float[n] in [0, 1].
      right: bool[n].
      bins: number of bins.
    """
    edges = np.arange(bins + 1) / bins
    at = np.searchsorted(edges[1:-1], confidence, side="left")
    found = []
    for i in range(bins):
        inside = at == i
        rows = int(inside.sum())
        means = (float(x[inside].mean()) if rows else 0.0 for x in (confidence, right))
        found.append(Bin(float(edges[i]), float(edges[i + 1]), rows, *means))
    return found


def expected_calibration_error(
    confidence: np.ndarray, right: np.ndarray, bins: int = BINS
) -> float | None:
    """Returns the mean gap between confidence and accuracy of the bins, weighed by their rows.

    Guo et al., On calibration of modern neural networks, 2017.

    Args:
      confidence, right, bins: as of `reliability_bins`.

    Returns:
      In [0, 1]; None of no rows.
    """
    if not len(confidence):
        return None
    found = reliability_bins(confidence, right, bins)
    return sum(x.rows * abs(x.confidence - x.accuracy) for x in found) / len(confidence)


def brier_score(confidence: np.ndarray, right: np.ndarray) -> float | None:
    """Returns the mean squared distance of the confidence from 1 (right) or 0 (wrong).

    This is the score of the answer alone, not that of a distribution over labels.

    Args:
      confidence: float[n] in [0, 1].
      right: bool[n].

    Returns:
      In [0, 1]; None of no rows.
    """
    return float(np.mean((confidence - right) ** 2)) if len(confidence) else None


def auroc(confidence: np.ndarray, right: np.ndarray) -> float | None:
    """Returns how often a right row has more confidence than a wrong one, a tie counting half.

    Args:
      confidence: float[n].
      right: bool[n].

    Returns:
      In [0, 1]; None if no row is right, or none is wrong.
    """
    hits = int(right.sum())
    misses = len(right) - hits
    if not hits or not misses:
        return None
    ranks = average_ranks(confidence)
    return float((ranks[right.astype(bool)].sum() - hits * (hits + 1) / 2) / (hits * misses))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Returns float[n], ranks from 1 on; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def coverage_curve(
    confidence: np.ndarray, right: np.ndarray, rows: int | None = None
) -> list[tuple[float, float]]:
    """Returns (coverage, accuracy) for each threshold of the confidence, from the highest down.

    Args:
      confidence: float[n].
      right: bool[n].
      rows: of which coverage is a share; None is n. More than n means that some rows have no
        confidence and are never covered.
    """
    order = np.argsort(-confidence, kind="stable")
    # Rows of equal confidence are covered together.
    ends = np.flatnonzero(np.append(np.diff(confidence[order]), -1.0)) + 1
    ends = ends[ends <= len(order)]
    hits = np.cumsum(right[order])
    total = len(order) if rows is None else rows
    return [(int(n) / total, float(hits[n - 1] / n)) for n in ends]


def aurc(confidence: np.ndarray, right: np.ndarray) -> float | None:
    """Returns the area under the risk-coverage curve: lower is better.

    The mean over the rows of the error among those that are at least as sure. Geifman and
    El-Yaniv, Selective classification for deep neural networks, 2017.

    Args:
      confidence: float[n].
      right: bool[n].

    Returns:
      In [0, 1]; None of no rows.
    """
    area, before = 0.0, 0.0
    for coverage, accuracy in coverage_curve(confidence, right):
        area += (coverage - before) * (1 - accuracy)
        before = coverage
    return area if len(confidence) else None


def calibration(
    confidence: np.ndarray, right: np.ndarray
) -> tuple[dict[str, float], Calibration | None]:
    """Returns the scores of a source of confidence by name, and its curves.

    Args:
      confidence: float[n] in [0, 1], NaN where a row has none. Such rows are in no score but
        `covered`, the share of rows with a confidence.
      right: bool[n].

    Returns:
      `covered`, `ece`, `brier`, `aurc`, and `auroc` where it is defined; and the curves, None
      if no row has a confidence.
    """
    there = ~np.isnan(confidence)
    sure, hit = confidence[there], right[there]
    scores = {
        "covered": float(np.mean(there)) if len(there) else 0.0,
        "ece": expected_calibration_error(sure, hit),
        "brier": brier_score(sure, hit),
        "auroc": auroc(sure, hit),
        "aurc": aurc(sure, hit),
    }
    found = {name: value for name, value in scores.items() if value is not None}
    if not there.any():
        return found, None
    curve = coverage_curve(sure, hit, len(confidence))
    kept = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), _POINTS)).astype(int))
    return found, Calibration(reliability_bins(sure, hit), [curve[i] for i in kept])


def vote_shares(answers: np.ndarray, k: int) -> np.ndarray:
    """Returns the share of each label among the responses to a row, float[n, K].

    Args:
      answers: int[n, G], index of the boxed label, outside [0, K) where there is none; responses
        without a label are counted in G, so that a row may sum to less than 1.
      k: K, number of labels.
    """
    return (answers[:, :, None] == np.arange(k)).mean(axis=1)
