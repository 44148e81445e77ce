"""What first steps describe, counted by hand."""

import json
from pathlib import Path

import pytest

from benchmarks.first_steps import first_steps, right_alone, shared_rows


def test_first_steps_are_compared_with_label_and_answer(tmp_path: Path) -> None:
    said = (
        # label, first step, later text, answer
        ("fear", "scared eyes and stretched lips", "raised brows", "fear"),
        ("fear", "scared eyes and stretched lips", "", "anger"),
        ("anger", "raised brows and a dropped jaw", "lowered brows", "surprise"),
        ("anger", "a face", "lowered brows", "anger"),
    )
    rows = [
        {
            "id": f"faces:{i}",
            "label": label,
            "responses": [{"response": f"<step1> {first} </step1> {later}", "answer": answer}],
        }
        for i, (label, first, later, answer) in enumerate(said)
    ]
    # Several votes of one row count each.
    rows[0]["responses"] *= 2
    path = tmp_path / "faces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Answered rightly: the first, twice, and the fourth; described: the first, twice, and the
    # second; followed: the first, twice, and the third.
    assert first_steps(path) == (5, 0.6, 0.6, 0.6)
    # The first row's image is in another set too, and the third's.
    pairs = {"train, faces": [["a:7", "faces:0"]], "faces, b": [["faces:2", "b:1"]], "a, b": []}
    (tmp_path / "inspect.json").write_text(json.dumps({"shared": pairs}))
    left_out = shared_rows(tmp_path / "inspect.json")
    assert left_out == {"a:7", "faces:0", "faces:2", "b:1"}
    assert first_steps(path, left_out) == (2, 0.5, 0.5, 0.0)
    with pytest.raises(ValueError, match=r"faces\.jsonl: no response is left"):
        first_steps(path, {f"faces:{i}" for i in range(4)})


def test_rows_that_are_right_in_one_file_alone_are_counted(tmp_path: Path) -> None:
    def written(name: str, right: list[bool]) -> Path:
        rows = [json.dumps({"id": f"faces:{i}", "right": x}) for i, x in enumerate(right)]
        (tmp_path / name).write_text("\n".join(rows))
        return tmp_path / name

    ours = written("ours.jsonl", [True, True, True, False, False])
    theirs = written("theirs.jsonl", [True, False, False, True, False])
    assert right_alone(ours, theirs) == (2, 1)
    assert right_alone(ours, theirs, {"faces:1", "faces:4"}) == (1, 1)
    with pytest.raises(ValueError, match=r"fewer\.jsonl are not on the same rows"):
        right_alone(ours, written("fewer.jsonl", [True]))
