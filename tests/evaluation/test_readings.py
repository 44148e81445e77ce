"""Columns of readings by hand: shares, confidences, stated numbers."""

import math

import numpy as np
import pytest

from emor3_jax.evaluation.readings import (
    confidence_scores,
    confidences,
    read_shares,
    read_texts,
    read_values,
    value_scores,
)


def test_texts_of_rows_that_are_there_are_read() -> None:
    texts = {1: "fear <confidence>0.25</confidence>", 2: "joy"}
    found = read_texts(texts, 4, ("joy", "fear"))
    assert found["lenient"].tolist() == [-1, 1, 0, -1]
    assert np.isnan(found["stated_confidence"]).tolist() == [True, False, True, True]


def test_one_response_has_no_votes() -> None:
    assert read_shares(np.array([[0], [1]]), np.array([0, 0]), None, 2) == {}


def test_the_likelihood_of_a_row_is_the_mean_over_its_responses() -> None:
    answers = np.array([[0, 1], [-1, -1]])
    likely = np.array([[[0.8, 0.2], [0.4, 0.6]], [[1.0, 0.0], [1.0, 0.0]]])
    found = read_shares(answers, np.array([1, 0]), likely, 2)
    assert found["likelihood_shares"][0] == pytest.approx([0.6, 0.4])
    # The second row has no answer to be sure of.
    assert found["likelihood_confidence"][0] == pytest.approx(0.4)
    assert math.isnan(found["likelihood_confidence"][1])
    assert found["votes_shares"].tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert confidences(found, 0) == {"votes": 0.5, "likelihood": pytest.approx(0.4)}


def test_a_source_without_any_confidence_has_no_scores() -> None:
    data = {"stated_confidence": np.full(2, np.nan), "votes_confidence": np.array([1.0, np.nan])}
    data |= {"accuracy": np.array([True, False])}
    scores, curves = confidence_scores(data, graded=False)
    assert list(curves) == ["votes"]
    assert scores["votes_covered"] == 0.5 and not any(x.startswith("stated") for x in scores)


def test_a_source_that_was_asked_and_covers_no_row_says_so() -> None:
    answers = np.array([[-1, -1], [-1, -1]])
    likely = np.full((2, 2, 2), 0.5)
    data = read_shares(answers, np.array([0, 0]), likely, 2)
    data |= {"accuracy": np.array([False, False]), "grades": np.array([[0.5, 0.5], [1.0, 0.0]])}
    scores, curves = confidence_scores(data, graded=True)
    assert curves == {} and scores["votes_covered"] == scores["likelihood_covered"] == 0.0
    # The likelihood of the labels needs no answer: it is 0 from the first row's shares, 0.5 from
    # the second's.
    assert scores["likelihood_chebyshev"] == 0.25 and "votes_kl" not in scores


def test_numbers_are_scored_over_the_rows_that_have_one() -> None:
    values = {"a": {"valence": 2.0}, "c": {"valence": 8.0}}
    texts = {0: "<valence>3</valence>", 1: "<valence>9</valence>", 2: "no number"}
    columns = read_values(texts, ("a", "b", "c"), values)
    assert list(columns) == ["valence_true", "valence_said"]
    scores = value_scores(columns)
    assert scores["valence_covered"] == 0.5 and scores["valence_mae"] == 1.0
    assert read_values(texts, ("a", "b", "c"), {}) == {}
