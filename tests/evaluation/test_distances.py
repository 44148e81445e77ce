"""Distances of distributions and agreement of numbers, by hand and as SciPy computes them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import distance

from emor3_jax.evaluation.distances import SMALLEST, agreement, distribution_distances


def test_distances_by_hand() -> None:
    true, said = np.array([[2.0, 2.0, 0.0]]), np.array([[1.0, 0.0, 0.0]])
    found = distribution_distances(true, said)
    assert found["chebyshev"] == 0.5
    # |0.5 - 1| / 1.5 and |0.5 - 0| / 0.5.
    assert found["canberra"] == pytest.approx(1 / 3 + 1)
    assert found["clark"] == pytest.approx(math.sqrt(1 / 9 + 1))
    assert found["intersection"] == 0.5
    assert found["cosine"] == pytest.approx(1 / math.sqrt(2))
    assert found["kl"] == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / SMALLEST))


def test_rows_without_shares_are_left_out() -> None:
    true = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    said = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert distribution_distances(true, said)["intersection"] == 1.0
    assert distribution_distances(true[1:], said[1:]) == {}


shares = st.lists(st.integers(1, 9), min_size=4, max_size=4)


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=5))
def test_distances_are_those_of_scipy(pairs: list) -> None:
    p, q = (np.array([x[i] for x in pairs], float) for i in (0, 1))
    found = distribution_distances(p, q)
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    each = list(zip(p, q, strict=True))
    for name, oracle in {
        "kl": stats.entropy,
        "chebyshev": distance.chebyshev,
        "canberra": distance.canberra,
        "cosine": lambda a, b: 1 - distance.cosine(a, b),
    }.items():
        assert found[name] == pytest.approx(np.mean([oracle(a, b) for a, b in each]))


def test_agreement_by_hand() -> None:
    true, said = np.array([1.0, 2.0, 3.0, 9.0]), np.array([2.0, 2.0, 5.0, np.nan])
    found = agreement(true, said)
    assert found["covered"] == 0.75
    assert found["mae"] == pytest.approx(1.0)
    # Means 2 and 3; deviations -1, 0, 1 and -1, -1, 2: variances 2/3 and 2, covariance 1.
    assert found["plcc"] == pytest.approx(1 / math.sqrt(4 / 3))
    assert found["ccc"] == pytest.approx(2 / (2 / 3 + 2 + 1))
    # Ranks 1, 2, 3 and 1.5, 1.5, 3.
    assert found["srcc"] == pytest.approx(1.5 / math.sqrt(2 * 1.5))


def test_scores_that_are_not_defined_are_left_out() -> None:
    assert agreement(np.array([]), np.array([])) == {}
    assert agreement(np.array([1.0]), np.array([np.nan])) == {"covered": 0.0}
    constant = agreement(np.array([1.0, 1.0]), np.array([2.0, 3.0]))
    assert sorted(constant) == ["ccc", "covered", "mae"] and constant["ccc"] == 0.0
    assert agreement(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == {"covered": 1.0, "mae": 0.0}


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=30))
def test_agreement_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array([pair[i] for pair in pairs], float) for i in (0, 1))
    found = agreement(x, y)
    if "plcc" in found:
        assert found["plcc"] == pytest.approx(stats.pearsonr(x, y).statistic)
        assert found["srcc"] == pytest.approx(stats.spearmanr(x, y).statistic)
