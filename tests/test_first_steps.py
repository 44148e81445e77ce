"""What first steps describe, counted by hand."""

import json
from pathlib import Path

from benchmarks.first_steps import first_steps


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
            "label": label,
            "responses": [{"response": f"<step1> {first} </step1> {later}", "answer": answer}],
        }
        for label, first, later, answer in said
    ]
    # Several votes of one row count each.
    rows[0]["responses"] *= 2
    path = tmp_path / "faces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Right: the first, twice, and the second; followed: the first, twice, and the third.
    assert first_steps(path) == (5, 0.6, 0.6)
