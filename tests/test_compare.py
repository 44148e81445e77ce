"""The program that compares runs: printed lines, numbers, and a page with images."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support import tiny_run

from emor3_jax import compare
from emor3_jax.data.errors import DataError
from emor3_jax.runtime.job import write_config


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two evaluations of the six rows of a parquet file; the second misses a row."""
    tiny_run.write_rows(tmp_path / "test.parquet", 6, 1)
    config = tiny_run.make_config(tmp_path)
    for run, answers in {"one": "aabab?", "two": "aaabb"}.items():
        folder = tmp_path / run / "predictions"
        folder.mkdir(parents=True)
        write_config(config, folder / "config.json")
        names = {"a": "awe", "b": "fear", "?": ""}
        rows = [
            {
                "id": f"test.parquet:{i}",
                "label": "awe" if i < 4 else "fear",
                "answer": names[x],
                "responses": [{"answer": names[x], "response": f"<b> is {names[x]}"}],
            }
            for i, x in enumerate(answers)
        ]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one" / "predictions" / "other.jsonl").write_text("")
    return [str(tmp_path / run) for run in ("one", "two")]


def test_numbers_lines_and_page(runs, tmp_path, capsys) -> None:
    (found,) = compare.main(runs, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == [found]
    assert (found["data_set"], found["rows"], found["both"]) == ("test", 5, 3)
    assert found["only_first"] == ["test.parquet:3"] and found["only_second"] == ["test.parquet:2"]
    assert found["missing_second"] == ["test.parquet:5"]
    printed = capsys.readouterr().out
    assert f"other was evaluated in {runs[0]} alone" in printed
    assert f"rows not answered by {runs[1]}: 1 (test.parquet:5)" in printed
    assert "right: both 3, only first 1, only second 1, neither 0; McNemar's exact p = 1" in printed
    assert re.search(r"accuracy +80\.0 +80\.0 +\+0\.0   -[\d.]+ to \+[\d.]+", printed)
    assert re.search(r"awe +4 +75\.0 +75\.0 +\+0\.0 +1 +1 +1\n", printed)
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert f"Only {runs[1]} is right: 1 of 1 rows" in page
    assert "&lt;b&gt; is fear" in page and "<b> is" not in page


def test_learning_curves_are_those_of_runs_with_other_seeds_together(runs, tmp_path) -> None:
    third = Path(shutil.copytree(runs[1], tmp_path / "three"))
    config = json.loads((third / "predictions" / "config.json").read_text())
    for seed, run in enumerate((*runs, third)):
        config["policy_update"]["kl_coef"] = 0.5 if run == third else 0.25
        (Path(run) / "config.json").write_text(json.dumps(config | {"seed": seed}))
        rows = [{"step": 0, "eval/test/accuracy": 0.25}, {"step": 1, "reward/overall": 0.5}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(run) / "metrics.jsonl").write_text(text)
        after = {"test": {"accuracy": 0.75}}
        (Path(run) / "evaluations.json").write_text(json.dumps([{}, after]))
    first = str(Path(runs[0]) / "predictions")
    groups = compare._groups([first, runs[1], runs[0], str(third), str(third)])
    assert [group.name for group in groups] == [f"{first} and 1 of other seeds", str(third)]
    assert [len(group.rows) for group in groups] == [2, 1]
    assert [row.get("eval/test/accuracy") for row in groups[1].rows[0]] == [0.25, 0.75]
    compare.main([*runs, str(third)], tmp_path / "out", images=False)
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "Learning curves" in page and "differ in the seed alone" in page
    assert page.count('aria-label="accuracy of test of each run"') == 1
    # Lines that are no metrics are passed over, evaluations that are none refused.
    lines = ("[1]", '{"step": 2, "a": "b"}', '{"step": 3}', "\x1b")
    (third / "metrics.jsonl").write_text("\n".join(lines))
    assert [row["step"] for row in compare._groups([str(third)])[0].rows[0]] == [3]
    for damaged in ("[1]", "[{}, 2]", '[{}, {"test": {"accuracy": []}}]'):
        (third / "evaluations.json").write_text(damaged)
        with pytest.raises(DataError, match=r"three/evaluations\.json does not hold"):
            compare._groups([str(third)])


def test_without_data_there_are_no_images(runs, tmp_path, capsys) -> None:
    (tmp_path / "test.parquet").unlink()
    compare.main(runs, tmp_path / "out")
    assert re.search(r"images of test are not shown: .*no file matches", capsys.readouterr().out)
    assert "data:image" not in (tmp_path / "out" / "compare.html").read_text()
    compare.main(runs, tmp_path / "out", images=False)
    assert "not shown" not in capsys.readouterr().out


def test_more_runs_are_each_compared_with_the_first(runs, tmp_path) -> None:
    found = compare.main([*runs, runs[0]], tmp_path / "out", images=False)
    pairs = [(each["runs"][1], each["data_set"]) for each in found]
    assert pairs == [(runs[1], "test"), (runs[0], "other"), (runs[0], "test")]
    assert found[1]["rows"] == 0
    assert found[2]["scores"]["accuracy"]["change"] == 0.0


def test_a_response_may_hold_what_python_takes_for_the_end_of_a_line(runs, tmp_path) -> None:
    file = tmp_path / "two" / "predictions" / "test.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("<b> is", "a\u2028b\x85c"), "utf-8")
    found = compare.main(runs, tmp_path / "out", images=False)
    assert found[0]["rows"] == 5


def test_the_step_of_each_set_of_a_run_is_said(runs, tmp_path, capsys) -> None:
    """A run that goes on has evaluated its first set later than the others."""
    folder = tmp_path / "two" / "predictions"
    (folder / "000060").mkdir()
    (folder / "test.jsonl").rename(folder / "000060" / "test.jsonl")
    (found,) = compare.main(runs, tmp_path / "out", images=False)
    assert found["steps"] == [None, 60]
    assert f"first: {runs[0]}, second: {runs[1]} (step 60)\n" in capsys.readouterr().out


def test_what_cannot_be_compared_is_said(runs, tmp_path) -> None:
    with pytest.raises(DataError, match="at least two runs"):
        compare.main(runs[:1], tmp_path / "out")
    (tmp_path / "two" / "predictions" / "test.jsonl").rename(
        tmp_path / "two" / "predictions" / "renamed.jsonl"
    )
    with pytest.raises(DataError, match=r"no data set in common .*one: other, test.*renamed"):
        compare.main(runs, tmp_path / "out")
    for run in ("one", "two"):
        (tmp_path / run / "predictions" / "renamed.jsonl").write_text("")
    with pytest.raises(DataError, match=r"no row of renamed is in two of them"):
        compare.main(runs, tmp_path / "out", images=False)
