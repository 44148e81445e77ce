"""F1, majorities and decoupling by hand."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, recall_score

from emor3_jax.evaluation.metrics import (
    decoupling,
    macro_f1,
    majority,
    mean_recall,
    weighted_f1,
)
from emor3_jax.types import NOTHING_TO_JUDGE


def test_macro_f1_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2])
    answers = np.array([0, 1, 1, -1, 0])
    # Label 0: one hit, 2 true, 2 said: 2 / 4. Label 1 alike. Label 2 is never said: 0. Label 3
    # does not occur and is left out.
    assert macro_f1(labels, answers, 4) == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert macro_f1(labels, labels, 3) == 1.0
    assert macro_f1(np.array([], int), np.array([], int), 3) == 0.0


def test_a_label_that_is_said_wrongly_lowers_its_own_f1_only() -> None:
    # Label 0: 3 hits, 3 true, 4 said: 6 / 7. Label 1: 0 hits.
    answers = np.array([0, 0, 0, 0])
    assert macro_f1(np.array([0, 0, 0, 1]), answers, 2) == pytest.approx((6 / 7) / 2)


def test_weighted_f1_by_hand() -> None:
    # Label 0: 3 hits, 3 true, 4 said: 6 / 7, of 3 rows. Label 1: 0, of one row.
    answers = np.array([0, 0, 0, 0])
    assert weighted_f1(np.array([0, 0, 0, 1]), answers, 2) == pytest.approx((6 / 7) * 3 / 4)
    assert weighted_f1(np.array([], int), np.array([], int), 2) == 0.0


def test_mean_recall_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 2])
    answers = np.array([0, 0, 0, 1, 1, -1])
    # 3 of 4, 1 of 1, 0 of 1; label 3 does not occur.
    assert mean_recall(labels, answers, 4) == pytest.approx((0.75 + 1 + 0) / 3)
    assert mean_recall(np.array([], int), np.array([], int), 3) == 0.0


def test_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, 4, 200), rng.integers(-1, 4, 200)
    how = {"labels": [0, 1, 2, 3], "zero_division": 0}
    assert macro_f1(labels, answers, 4) == pytest.approx(
        f1_score(labels, answers, average="macro", **how)
    )
    assert weighted_f1(labels, answers, 4) == pytest.approx(
        f1_score(labels, answers, average="weighted", **how)
    )
    assert mean_recall(labels, answers, 4) == pytest.approx(
        recall_score(labels, answers, average="macro", **how)
    )


def test_majorities_by_hand() -> None:
    answers = np.array(
        [
            [2, 1, 1, 0],  # 1 has two votes
            [2, 1, 1, 2],  # two each: 2 came first
            [-1, -1, -1, 3],  # no label has no vote
            [-1, -1, -1, -1],  # nobody boxes one: the first speaks
            [-1, 0, 1, 2],  # all different: the first that boxes one
        ]
    )
    assert majority(answers).tolist() == [1, 0, 3, 0, 1]
    assert majority(np.array([[4], [-1]])).tolist() == [0, 0]


def test_decoupling_by_hand() -> None:
    answers = np.array([0, 1, -1, 2, 3, 2])
    inferred = np.array([0, 2, 1, -1, NOTHING_TO_JUDGE, 2])
    # Without a box (third) or without a text (fifth) nothing can disagree; of the four others the
    # second infers another label and the fourth none.
    assert decoupling(answers, inferred) == pytest.approx(2 / 4)
    assert decoupling(np.array([-1, 1]), np.array([0, NOTHING_TO_JUDGE])) == 0.0
