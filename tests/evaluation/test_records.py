"""Intervals and counts by class, by hand, and files of predictions."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from emor3_jax.evaluation.confidence import Bin, Calibration
from emor3_jax.evaluation.metrics import class_scores, confusion_matrix, wilson
from emor3_jax.evaluation.records import (
    Evaluation,
    from_json,
    prediction_file,
    to_json,
    with_groups,
)


def test_intervals_by_hand() -> None:
    # 8 of 10: middle (0.8 + 3.8415 / 20) / (1 + 3.8415 / 10) = 0.71674,
    # spread 1.95996 x sqrt(0.016 + 3.8415 / 400) / 1.38415 = 0.22657.
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    # At the ends: 3.8415 / (10 + 3.8415) wide.
    assert wilson(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72246, 1.0), abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_those_of_scipy(pair: tuple[int, int]) -> None:
    found = stats.binomtest(*pair).proportion_ci(0.95, method="wilson")
    assert wilson(*pair) == pytest.approx((found.low, found.high), abs=1e-9)


def test_counts_by_class_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    answers = np.array([0, 0, 1, 1, -1, 7])
    counts = confusion_matrix(labels, answers, 4)
    assert counts.tolist() == [[2, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    a, b, c, d = class_scores("abcd", counts)
    assert a == ("a", 3, 1.0, 2 / 3, pytest.approx(4 / 5))
    assert b == ("b", 2, 1 / 2, 1 / 2, 1 / 2)
    # Never said, and never there: shares of nothing.
    assert c == ("c", 1, 0.0, 0.0, 0.0)
    assert d == ("d", 0, 0.0, 0.0, 0.0)


def test_a_checkpoint_from_before_counts_by_class_can_be_read() -> None:
    new = {"set": Evaluation({"accuracy": 0.5}, [], ("a", "b"), ((1, 0, 0), (1, 0, 0)))}
    data = json.loads(json.dumps(to_json(new)))
    assert data["set"]["classes"][0] == {
        "label": "a",
        "rows": 1,
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
    }
    assert from_json(data) == new
    curves = {"votes": Calibration([Bin(0.0, 0.1, 1, 0.05, 1.0)], [(0.5, 1.0)])}
    more = {"group": Evaluation({"uar": 1.0}, [], calibrations=curves, members=("set",))}
    assert from_json(json.loads(json.dumps(to_json(more)))) == more
    old = {"set": {"metrics": {"accuracy": 0.5}, "samples": []}}
    assert from_json(old) == {"set": Evaluation({"accuracy": 0.5}, [])}


def test_predictions_are_lines_and_a_second_run_replaces_them(tmp_path) -> None:
    path = tmp_path / "predictions" / "000000" / "set.jsonl"
    for count in (3, 2):
        with prediction_file(path) as record:
            for i in range(count):
                record({"id": f"é {i}", "answer": ""})
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"id": "é 0", "answer": ""}, {"id": "é 1", "answer": ""}]


def test_an_evaluation_that_is_stopped_leaves_the_predictions_that_were_there(tmp_path) -> None:
    path = tmp_path / "000000" / "set.jsonl"

    def write(rows: int, stop: bool) -> None:
        with prediction_file(path) as record:
            for i in range(rows):
                record({"id": str(i)})
            if stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(1, stop=True)
    assert list(path.parent.iterdir()) == []
    write(2, stop=False)
    with pytest.raises(KeyboardInterrupt):
        write(1, stop=True)
    assert list(path.parent.iterdir()) == [path]
    assert len(path.read_text().splitlines()) == 2


def test_a_group_is_the_mean_of_its_sets() -> None:
    a = Evaluation({"accuracy": 0.5, "accuracy_low": 0.4, "rows": 10.0, "uar": 1.0}, [])
    b = Evaluation({"accuracy": 1.0, "accuracy_low": 0.9, "rows": 30.0}, [])
    sets = {"a": a, "b": b}
    found = with_groups(sets, {"both": ("a", "b"), "other": ("a", "c")})
    assert list(found) == ["a", "b", "both"]
    assert found["both"] == Evaluation({"accuracy": 0.75, "rows": 40.0}, [], members=("a", "b"))
    assert with_groups(sets, {}) == sets
