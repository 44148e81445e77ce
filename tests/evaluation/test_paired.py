"""Paired tests by hand, and as SciPy computes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score, recall_score

from emor3_jax.evaluation.paired import differences, mcnemar


def test_mcnemar_by_hand() -> None:
    # 1 of 6 or fewer, twice: 2 (1 + 6) / 64.
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(14 / 64)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    assert 0 < mcnemar(800, 1000) < 1e-5


@given(st.integers(0, 60), st.integers(0, 60).filter(bool))
def test_mcnemar_is_a_binomial_test(a: int, b: int) -> None:
    assert mcnemar(a, b) == pytest.approx(stats.binomtest(a, a + b, 0.5).pvalue)


def test_differences_by_hand() -> None:
    labels = np.array([0, 0, 0, 1])
    found = differences(labels, np.array([0, 0, 0, 0]), np.array([0, 0, -1, 1]), 2)
    accuracy, f1, uar = (found[name] for name in ("accuracy", "macro_f1", "uar"))
    assert accuracy[:2] == (0.75, 0.75) and accuracy.change == 0.0
    # First: 2 * 3 / 7 and 0. Second: 2 * 2 / 5 and 1.
    assert f1[:2] == pytest.approx((3 / 7, 0.9))
    assert uar[:2] == pytest.approx((0.5, (2 / 3 + 1) / 2))
    assert accuracy.low < 0 < accuracy.high
    same = differences(labels, labels, labels, 2)["accuracy"]
    assert same == (1.0, 1.0, 0.0, 0.0)


@pytest.fixture
def two_runs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    first = np.where(rng.random(300) < 0.5, labels, rng.integers(-1, 3, 300))
    second = np.where(rng.random(300) < 0.6, labels, first)
    return labels, first, second


def test_the_interval_is_that_of_resampling_rows(two_runs) -> None:
    labels, first, second = two_runs
    right = (second == labels).astype(float) - (first == labels)
    oracle = stats.bootstrap(
        (right,), np.mean, n_resamples=10_000, method="percentile", random_state=1
    ).confidence_interval
    found = differences(*two_runs, 3)["accuracy"]
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=0.005)
    assert differences(*two_runs, 3) == differences(*two_runs, 3)
    assert differences(*two_runs, 3, seed=1) != differences(*two_runs, 3)


def test_interval_of_f1_is_that_of_resampling_rows(two_runs) -> None:
    def change(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
        return float(
            f1_score(labels, second, labels=[0, 1, 2], average="macro", zero_division=0)
            - f1_score(labels, first, labels=[0, 1, 2], average="macro", zero_division=0)
        )

    rng = np.random.default_rng(2)
    drawn = []
    for _ in range(300):
        rows = rng.integers(0, 300, 300)
        drawn.append(change(*(x[rows] for x in two_runs)))
    found = differences(*two_runs, 3)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (found["macro_f1"].low, found["macro_f1"].high) == pytest.approx((low, high), abs=0.02)
    assert found["macro_f1"].change == pytest.approx(change(*two_runs))
    labels, first, _ = two_runs
    oracle = recall_score(labels, first, labels=[0, 1, 2], average="macro")
    assert found["uar"].first == pytest.approx(oracle)
