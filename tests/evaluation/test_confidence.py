"""Calibration by hand, and as scikit-learn and SciPy compute it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from emor3_jax.evaluation.confidence import (
    aurc,
    auroc,
    average_ranks,
    brier_score,
    calibration,
    coverage_curve,
    expected_calibration_error,
    reliability_bins,
    vote_shares,
)

rows = st.lists(st.tuples(st.integers(0, 20).map(lambda x: x / 20), st.booleans()), min_size=1)


def _arrays(pairs: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])


def test_bins_and_their_gap_by_hand() -> None:
    confidence = np.array([0.0, 0.1, 0.7, 0.65, 1.0])
    right = np.array([False, True, True, False, True])
    bins = reliability_bins(confidence, right)
    assert len(bins) == 10
    # 0 and the upper edge 0.1 are in the first bin, 7/10 in the seventh.
    assert bins[0] == (0.0, 0.1, 2, pytest.approx(0.05), 0.5)
    assert bins[6] == (0.6, 0.7, 2, pytest.approx(0.675), 0.5)
    assert bins[9] == (0.9, 1.0, 1, 1.0, 1.0)
    assert sum(x.rows for x in bins) == 5
    expected = (2 * 0.45 + 2 * 0.175 + 0) / 5
    assert expected_calibration_error(confidence, right) == pytest.approx(expected)
    assert expected_calibration_error(np.array([]), np.array([], bool)) is None


def test_every_share_of_ten_votes_lies_below_its_upper_edge() -> None:
    shares = np.arange(1, 11) / 10
    assert [x.rows for x in reliability_bins(shares, shares > 0)] == [1] * 10


def test_brier_and_auroc_by_hand() -> None:
    confidence = np.array([0.8, 0.6, 0.6, 0.2])
    right = np.array([True, False, True, False])
    assert brier_score(confidence, right) == pytest.approx((0.04 + 0.36 + 0.16 + 0.04) / 4)
    # Pairs of a right and a wrong row: 0.8 wins twice, 0.6 ties once and wins once.
    assert auroc(confidence, right) == pytest.approx(3.5 / 4)
    assert auroc(confidence, np.ones(4, bool)) is None
    assert brier_score(np.array([]), np.array([], bool)) is None


def test_coverage_by_hand() -> None:
    confidence = np.array([0.9, 0.5, 0.5, 0.2])
    right = np.array([True, True, False, False])
    # One row: all right. Then both of 0.5 together: two of three. Then two of four.
    assert coverage_curve(confidence, right) == [(0.25, 1.0), (0.75, 2 / 3), (1.0, 0.5)]
    assert coverage_curve(confidence, right, 8)[-1] == (0.5, 0.5)
    assert aurc(confidence, right) == pytest.approx((0 + 1 / 3 + 1 / 3 + 1 / 2) / 4)
    assert aurc(np.array([]), np.array([], bool)) is None


def test_rows_without_a_confidence_are_counted_and_never_covered() -> None:
    confidence = np.array([0.9, np.nan, 0.3, np.nan])
    right = np.array([True, True, False, False])
    scores, curves = calibration(confidence, right)
    assert scores["covered"] == 0.5
    assert scores["ece"] == pytest.approx((0.1 + 0.3) / 2)
    assert scores["auroc"] == 1.0
    assert curves.coverage == [(0.25, 1.0), (0.5, 0.5)]
    assert [curves.at(x) for x in (0.1, 0.25, 0.4, 1.0)] == [None, 100.0, 100.0, 50.0]
    assert calibration(np.array([np.nan]), np.array([True])) == ({"covered": 0.0}, None)


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    confidence = np.linspace(0, 1, 1000)
    _, curves = calibration(confidence, confidence > 0.5)
    assert len(curves.coverage) == 100
    assert curves.coverage[0] == (0.001, 1.0) and curves.coverage[-1] == (1.0, 0.5)


@given(rows)
def test_scores_are_those_of_scikit_learn(pairs: list[tuple[float, bool]]) -> None:
    confidence, right = _arrays(pairs)
    assert brier_score(confidence, right) == pytest.approx(
        brier_score_loss(right, confidence, labels=[False, True])
    )
    assert average_ranks(confidence) == pytest.approx(stats.rankdata(confidence))
    if right.any() and not right.all():
        assert auroc(confidence, right) == pytest.approx(roc_auc_score(right, confidence))
    # Off the edges, where the two count a row to different bins.
    shifted = np.clip(confidence - 0.01, 0.01, 0.99)
    true, said = calibration_curve(right, shifted, n_bins=10, strategy="uniform")
    found = [x for x in reliability_bins(shifted, right) if x.rows]
    assert [x.accuracy for x in found] == pytest.approx(true)
    assert [x.confidence for x in found] == pytest.approx(said)


def test_votes_by_hand() -> None:
    answers = np.array([[0, 1, 0, -1], [-1, -1, 2, 5]])
    assert vote_shares(answers, 3).tolist() == [[0.5, 0.25, 0.0], [0.0, 0.0, 0.25]]
