"""Rows to read are of every kind, and those over time are the same at each evaluation."""

import json
from pathlib import Path

import pytest

from emor3_jax.data.errors import DataError
from emor3_jax.evaluation.gallery import Gallery, faults, watch
from emor3_jax.evaluation.records import Sample, prediction


def _sample(
    row: int, label: str = "awe", answer: str = "awe", coherence: float = 1.0, asked: str = "awe"
) -> Sample:
    scores = {"format": 1.0, "coherence": coherence, "consistency": 1.0}
    replies = {"coherence": asked, "consistency": ""}
    return Sample(f"row {row}", label, answer, f"said {answer}", replies, scores)


def test_faults_are_of_what_was_asked() -> None:
    assert faults(_sample(0)) == []
    assert faults(_sample(0, answer="fear", coherence=0.0)) == ["wrong", "incoherent"]
    # Where no reply was asked for, its score says nothing.
    assert faults(_sample(0, coherence=0.0, asked="")) == []
    other = Sample("a", "awe", "awe", "", {"calm": "no"}, {"format": 0.5, "calm": 0.0})
    assert faults(other) == ["malformed", "not calm"]


def test_a_gallery_has_the_first_rows_and_rare_kinds() -> None:
    gallery = Gallery(4)
    rows = [_sample(i) for i in range(50)]
    rows[20] = _sample(20, label="fear", answer="fear")
    rows[30] = rows[31] = rows[32] = _sample(30, coherence=0.0)
    for sample in rows:
        gallery.add(sample)
    # Two of each kind are enough.
    assert [s.id for s in gallery.samples] == [
        *(f"row {i}" for i in (0, 1, 2, 3, 20, 30)),
        "row 30",
    ]
    empty = Gallery(0)
    empty.add(rows[0])
    assert empty.samples == []
    many = Gallery(2)
    for i in range(500):
        many.add(_sample(i, label=f"label {i}"))
    assert len(many.samples) == 96


def _write(folder: Path, step: int, samples: list[Sample]) -> None:
    path = folder / f"{step:06d}" / "scenes.jsonl"
    path.parent.mkdir(parents=True)
    other = _sample(0, answer="other")
    rows = (prediction([other, sample], 1, "", {}) for sample in samples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_over_time_are_those_of_every_evaluation(tmp_path: Path) -> None:
    labels = ["awe", "awe", "awe", "fear"]
    _write(tmp_path, 0, [_sample(i, labels[i], "fear") for i in (0, 1, 2, 3)])
    assert watch(tmp_path, "scenes", 2) == []
    _write(tmp_path, 20, [_sample(i, labels[i], "awe", 0.0) for i in (1, 2, 3)])
    (tmp_path / "notes").mkdir()
    first, second = watch(tmp_path, "scenes", 2)
    # One row of each label, of those that were answered each time.
    assert (first.id, first.label, second.id, second.label) == ("row 1", "awe", "row 3", "fear")
    assert {step: each.answer for step, each in first.answers.items()} == {0: "fear", 20: "awe"}
    assert first.answers[20].scores["coherence"] == 0 and first.answers[0].response == "said fear"
    assert first.answers[0].replies == {"coherence": "awe", "consistency": ""}
    assert [row.id for row in watch(tmp_path, "scenes", 9)] == ["row 1", "row 3", "row 2"]
    for step in range(40, 1000, 20):
        _write(tmp_path, step, [_sample(1)])
    (row,) = watch(tmp_path, "scenes", 2)
    steps = list(row.answers)
    assert (len(steps), steps[0], steps[-1]) == (12, 0, 980)
    assert watch(tmp_path, "other", 2) == []


@pytest.mark.parametrize("line", ["[]", "{}", "{", '{"id": 1, "responses": []}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    _write(tmp_path, 0, [_sample(0)])
    _write(tmp_path, 1, [_sample(0)])
    with (tmp_path / "000001" / "scenes.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"line 2 of .*000001/scenes\.jsonl is no "):
        watch(tmp_path, "scenes", 1)
