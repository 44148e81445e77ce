"""Files of predictions are found and read, and two runs compared, by hand."""

import json
from pathlib import Path

import pytest

from emor3_jax.data.errors import DataError
from emor3_jax.evaluation.comparison import (
    Answered,
    compare,
    find_predictions,
    read_predictions,
    to_json,
)


def _row(row_id: str, label: str, answer: str, **fields: object) -> dict:
    responses = [{"answer": "", "response": "?"}, {"answer": answer, "response": f"is {answer}"}]
    row = {"id": row_id, "label": label, "answer": answer, "responses": responses}
    return row | fields


def _write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_newest_evaluation_of_each_set_is_found(tmp_path: Path) -> None:
    for step, names in {"000000": "ab", "000090": "ab", "000100": "a"}.items():
        for name in names:
            _write(tmp_path / "predictions" / step / f"{name}.jsonl", [])
    (tmp_path / "metrics.jsonl").write_text("")
    steps = tmp_path / "predictions"
    # A digit, but no number.
    (steps / "²").mkdir()
    found = find_predictions(tmp_path)
    assert found == {"a": steps / "000100" / "a.jsonl", "b": steps / "000090" / "b.jsonl"}
    assert find_predictions(steps / "000000")["b"] == steps / "000000" / "b.jsonl"
    # An evaluation by itself.
    alone = _write(tmp_path / "evaluation" / "predictions" / "c.jsonl", [])
    assert find_predictions(tmp_path / "evaluation") == {"c": alone}
    with pytest.raises(DataError, match="nothing': has no predictions; give the folder"):
        find_predictions(tmp_path / "nothing")


def test_predictions_are_read_with_the_response_that_answers(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [_row("x", "joy", "fear", lenient="joy")])
    assert read_predictions(path) == {"x": Answered("joy", "fear", "is fear")}
    assert read_predictions(path, "lenient")["x"].right


@pytest.mark.parametrize(
    ("rows", "match", "said"),
    [
        ([_row("x", "joy", "joy")] * 2, "exact", "line 2 of .* the row 'x' occurs twice"),
        ([_row("x", "joy", "joy")], "lenient", "no field 'lenient'.* or compare the exact"),
        ([{"id": "x"}], "exact", "line 1 of .* no field 'label'"),
        (["?"], "exact", "line 1 of .* is no prediction"),
    ],
)
def test_files_that_cannot_be_compared_are_named(tmp_path, rows, match, said) -> None:
    with pytest.raises(DataError, match=said):
        read_predictions(_write(tmp_path / "a.jsonl", rows), match)


def test_two_runs_by_hand() -> None:
    labels = {"a": "joy", "b": "joy", "c": "joy", "d": "fear", "e": "fear", "f": "awe"}

    def run(said: dict[str, str]) -> dict[str, Answered]:
        return {row: Answered(labels[row], answer, "") for row, answer in said.items()}

    first = run({"a": "joy", "b": "joy", "c": "fear", "d": "fear", "e": ""})
    second = run({"a": "joy", "b": "fear", "c": "joy", "d": "joy", "f": "awe"})
    second["e"] = Answered("joy", "joy", "")
    found = compare(first, second)
    # a to d are compared; e has another label in each; f is missing in the first run.
    assert (found.rows, found.both, found.neither) == (4, 1, 0)
    assert (found.only_first, found.only_second) == (["b", "d"], ["c"])
    assert found.p == 1.0
    assert (found.missing_first, found.missing_second) == (["f"], [])
    assert found.other_label == ["e"]
    assert found.scores["accuracy"][:2] == (0.75, 0.5)
    fear, joy = found.classes
    assert fear == ("fear", 1, 1.0, 0.0, 1, 0, 1.0)
    assert joy == ("joy", 3, pytest.approx(2 / 3), pytest.approx(2 / 3), 1, 1, 1.0)
    data = json.loads(json.dumps(to_json(found)))
    assert data["scores"]["accuracy"]["change"] == -0.25
    assert data["only_second"] == ["c"]


def test_runs_without_a_common_row() -> None:
    found = compare({"a": Answered("joy", "joy", "")}, {"b": Answered("joy", "joy", "")})
    assert found.rows == 0 and found.scores == {} and found.p == 1.0
    assert (found.missing_first, found.missing_second) == (["b"], ["a"])
