"""Tables, galleries and the report hold every number, and no text of a policy breaks them."""

import json
import re
from pathlib import Path

import pytest

from emor3_jax.evaluation.confidence import Bin, Calibration
from emor3_jax.evaluation.records import Evaluation, Sample, from_json, to_json
from emor3_jax.io import report

PNG = b"\x89PNG not really"


def _sample(**fields: object) -> Sample:
    values: dict = {
        "id": "test:7",
        "label": "awe",
        "answer": "fear",
        "response": "<step1> seen <step2> felt <step3> negative \\boxed{fear}",
        "replies": {"coherence": "awe", "consistency": "yes"},
        "scores": {"format": 0.0, "accuracy": 0.0, "overall": 0.25},
    }
    return Sample(**{**values, **fields})


@pytest.fixture
def evaluations() -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    before = {"scenes": Evaluation({"accuracy": 0.25, "decoupling": 0.5, "rows": 8.0}, [])}
    after = {
        "scenes": Evaluation({"accuracy": 0.625, "decoupling": 0.125, "rows": 8.0}, [_sample()]),
        "other": Evaluation({"accuracy": 0.5}, [_sample(answer="", scores={"accuracy": 1.0})]),
    }
    return before, after


def test_the_table_has_before_after_and_change(evaluations) -> None:
    lines = report.before_after_table(*evaluations).splitlines()
    head = ["data", "set", "score", "before", "after", "change", "rows", "95", "%", "interval"]
    assert lines[0].split() == head
    assert lines[1].split() == ["scenes", "accuracy", "25.0", "62.5", "+37.5", "8"]
    assert lines[2].split() == ["scenes", "decoupling", "50.0", "12.5", "-37.5", "8"]
    assert lines[3].split() == ["other", "accuracy", "–", "50.0", "–", "–"]
    assert len(lines) == 4 and len(set(map(len, lines))) == 1


def test_the_table_has_the_interval_of_the_accuracy() -> None:
    metrics = {"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.8125, "rows": 1234.0}
    lines = report.before_after_table({}, {"a_set_of_a_long_name": Evaluation(metrics, [])})
    row = lines.splitlines()[1]
    assert re.fullmatch(r"a_set_of_a_long_name +accuracy +– +50\.0 +– +1234  25\.0 to 81\.2 +", row)


def test_the_table_says_where_fewer_rows_were_evaluated_before(evaluations) -> None:
    before, after = evaluations
    before["scenes"].metrics["rows"] = 4.0
    lines = report.before_after_table(before, after).splitlines()
    assert lines[1].split() == ["scenes", "accuracy", "25.0", "62.5", "+37.5", "4→8"]
    before["scenes"].metrics["rows"], after["scenes"].metrics["rows"] = 10000.0, 100000.0
    lines = report.before_after_table(before, after).splitlines()
    assert lines[1].split()[-1] == "10000→100000" and len(set(map(len, lines))) == 1


def test_evaluations_survive_json(evaluations) -> None:
    _, after = evaluations
    assert from_json(json.loads(json.dumps(to_json(after)))) == after


def test_the_report_has_numbers_curves_and_samples(tmp_path: Path, evaluations) -> None:
    rows = [{"step": 0, "eval/scenes/accuracy": 0.25}]
    rows += [{"step": s, "reward/overall": 0.1 * s, "reward/format": None} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = {"scenes": lambda row_id: PNG if row_id == "test:7" else None, "other": lambda _: None}
    path = report.write_report(tmp_path, "a <run>", *evaluations, images)
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.html"
    assert "<h1>a &lt;run&gt;</h1>" in page
    assert "<td>scenes · accuracy</td><td>25.0</td><td>62.5</td><td>+37.5</td>" in page
    assert "<td>other · accuracy</td><td>–</td><td>50.0</td><td></td>" in page
    assert ">overall 0.30</text>" in page and "over 3 steps" in page
    # A term that was never measured has no curve.
    assert not re.search(r">format [-\d.]+</text>", page)
    assert page.count("data:image/png;base64,") == 1
    assert (
        "<b>awe</b>" in page and '<b class="no">fear</b>' in page and '<b class="yes">–</b>' in page
    )
    assert "overall 0.25" in page


def test_a_report_without_training_says_so(tmp_path: Path, evaluations) -> None:
    _, after = evaluations
    images = dict.fromkeys(after, lambda _: None)
    page = report.write_report(tmp_path, "t", {}, after, images).read_text(encoding="utf-8")
    assert "No training step was taken." in page
    assert "Decoupling is the share" in page
    # Without reflections there is none to explain.
    plain = {"scenes": Evaluation({"accuracy": 0.25, "rows": 8.0}, [])}
    page = report.write_report(tmp_path, "t", {}, plain, images).read_text(encoding="utf-8")
    assert "Decoupling" not in page


def test_held_out_rows_are_shown_over_time(tmp_path: Path, evaluations, caplog) -> None:
    _, after = evaluations
    for step, answer in ((0, "fear"), (20, "awe")):
        path = tmp_path / "predictions" / f"{step:06d}" / "scenes.jsonl"
        path.parent.mkdir(parents=True)
        said = {"answer": answer, "response": f"<i>{step}", "coherence_reply": "joy"}
        scores = {"accuracy": float(answer == "awe"), "coherence": 0.0}
        row = {"id": "test:7", "label": "awe", "answer": answer}
        path.write_text(json.dumps(row | {"responses": [said | {"scores": scores}]}) + "\n")
    images = {"scenes": lambda _: PNG, "other": lambda _: None}
    page = report.write_report(tmp_path, "t", {}, after, images).read_text(encoding="utf-8")
    section = page[page.index('<h2 id="time">') : page.index('<section id="gallery"')]
    steps = re.findall(r'step (\d+)</span><b class="(\w+)">(\w+)</b>', section)
    assert steps == [("0", "no", "fear"), ("20", "yes", "awe")]
    assert section.count(">incoherent<") == 2 and section.count("<img") == 1
    assert "&lt;i&gt;20" in section and "<i>" not in section
    # What cannot be read is no reason to lose the report of a run.
    path.write_text("{}\n")
    page = report.write_report(tmp_path, "t", {}, after, images).read_text(encoding="utf-8")
    assert 'id="time"' not in page and "line 1 of" in caplog.text


def test_what_a_policy_says_is_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    sample = _sample(
        id=f'"{nasty}',
        label=nasty,
        answer=nasty,
        response=nasty,
        replies={"coherence": nasty, "consistency": nasty},
    )
    path = tmp_path / "samples" / "000001.html"
    report.write_samples(path, 1, [sample], lambda _: b"jpeg")
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7
    assert 'alt="&#34;&lt;script' in page
    assert "data:image/jpeg;base64," in page


def test_names_are_escaped_in_every_page(tmp_path: Path, evaluations) -> None:
    nasty = "<script>a|b</script>"
    _, after = evaluations
    renamed = {nasty: next(iter(after.values()))}
    images = {nasty: lambda _: None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, f"reward/{nasty}": 0.5}) + "\n")
    page = report.write_report(tmp_path, nasty, {}, renamed, images).read_text(encoding="utf-8")
    # Its own script alone.
    assert page.count("<script") == 1 and nasty not in page and "&lt;script&gt;" in page
    table = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "<script" not in table and "&lt;script&gt;a\\|b" in table


def test_steps_begin_on_lines_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "gallery.html"
    report.write_samples(path, 3, [_sample()], lambda _: None)
    page = path.read_text(encoding="utf-8")
    assert "Samples of step 3" in page and "<img" not in page
    assert (
        "&lt;step1&gt; seen <br>&lt;step2&gt; felt <br>&lt;step3&gt; negative <br>\\boxed" in page
    )


def test_a_third_question_is_in_tables_curves_and_samples(tmp_path: Path) -> None:
    replies = {"coherence": "awe", "pleasant": "no & never"}
    metrics = {"accuracy": 0.5, "coherence": 0.25, "pleasant": 0.75, "decoupling": 0.0, "rows": 4.0}
    before = {"scenes": Evaluation({"pleasant": 0.5}, [])}
    after = {"scenes": Evaluation(metrics, [_sample(replies=replies)])}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/pleasant": 0.125}))
    table = [line.split() for line in report.before_after_table(before, after).splitlines()]
    assert [row[1] for row in table[1:]] == ["accuracy", "coherence", "pleasant", "decoupling"]
    assert table[3] == ["scenes", "pleasant", "50.0", "75.0", "+25.0", "4"]
    # A long name moves its column.
    longer = _sample(replies={"a_long_question": ""})
    wide = report.before_after_table({}, {"s": Evaluation({"a_long_question": 1.0}, [longer])})
    head, row = wide.splitlines()
    assert row.split() == ["s", "a_long_question", "–", "100.0", "–", "–"]
    assert len(head) == len(row)
    images = {"scenes": lambda _: None}
    page = report.write_report(tmp_path, "t", before, after, images).read_text(encoding="utf-8")
    assert "<td>scenes · pleasant</td><td>50.0</td><td>75.0</td><td>+25.0</td>" in page
    assert ">pleasant 0.12</text>" in page
    assert '<span class="tag">reply to the pleasant question</span>no &amp; never</p>' in page
    assert '<span class="tag">emotion inferred from the text</span>awe</p>' in page
    # A mean that is no share stays as it is.
    text = (tmp_path / "evaluation.md").read_text()
    assert "| scenes | pleasant | 50.0 | 75.0 |  |" in text
    assert "| scenes | rows | – | 4 | |" in text


@pytest.fixture
def counted() -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    metrics = {"accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 0.875, "rows": 8.0}
    after = Evaluation(metrics, [], ("joy", "<fear>"), ((5, 0, 1), (1, 1, 0)))
    return {"scenes": Evaluation({"accuracy": 0.25}, [])}, {"scenes": after}


def test_markdown_has_every_number(counted) -> None:
    assert report.markdown(*counted) == (
        "| data set | score | before | after | 95 % |\n|---|---|---:|---:|---:|\n"
        "| scenes | accuracy | 25.0 | 75.0 | 50.0 to 87.5 |\n| scenes | rows | – | 8 | |\n\n"
        "## scenes\n\n| label | rows | precision | recall | F1 |\n|---|---:|---:|---:|---:|\n"
        # joy: 5 of 6 said, 5 of 6 true. <fear>: 1 of 1 said, 1 of 2 true.
        "| joy | 6 | 83.3 | 83.3 | 83.3 |\n| &lt;fear&gt; | 2 | 100.0 | 50.0 | 66.7 |\n\n"
        "Rows by true label and by answer:\n\n| | joy | &lt;fear&gt; | none |\n"
        "|---|---:|---:|---:|\n"
        "| joy | 5 | 0 | 1 |\n| &lt;fear&gt; | 1 | 1 | 0 |\n"
    )


def test_the_report_draws_intervals_and_confusion(tmp_path: Path, counted) -> None:
    before, after = counted
    before["scenes"].metrics.update(accuracy_low=0.125, accuracy_high=0.5)
    images = dict.fromkeys(after, lambda _: None)
    page = report.write_report(tmp_path, "t", before, after, images).read_text(encoding="utf-8")
    assert ">75.0</text>" in page and ">25.0</text>" in page
    assert ">accuracy, % of rows</text>" in page and ">F1, %</text>" in page
    assert "<td>joy</td><td>6</td><td>83.3</td>" in page
    assert "&lt;fear&gt;" in page and "<fear>" not in page
    assert (tmp_path / "evaluation.md").read_text().startswith("# t\n\n| data set")
    # Nothing but the numbers decides the page: no date, no random id.
    again = report.write_report(tmp_path, "t", before, after, images).read_text(encoding="utf-8")
    assert again == page
    ids = re.findall(r' id="([^"]*)"', page)
    assert ids and len(set(ids)) == len(ids)
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers["scenes"]["confusion"] == [[5, 0, 1], [1, 1, 0]]
    assert from_json(numbers) == after


def test_confidences_and_groups_are_in_all_three_forms(tmp_path: Path) -> None:
    curves = Calibration([Bin(0.7, 0.8, 4, 0.75, 0.5)], [(0.5, 1.0), (1.0, 0.5)])
    metrics = {"accuracy": 0.5, "uar": 0.25, "wheel_distance": 1.5, "votes_ece": 0.25}
    metrics |= {"votes_kl": 0.125, "valence_ccc": -0.5, "rows": 4.0}
    labels = ("joy", "fear"), ((2, 0, 0), (2, 0, 0))
    one = Evaluation(metrics, [_sample()], *labels, calibrations={"votes": curves})
    after = {"scenes": one, "group": Evaluation({"uar": 0.25}, [], members=("scenes",))}
    before = {"scenes": Evaluation({"votes_ece": 0.5}, [])}
    images = {"scenes": lambda _: None}
    page = report.write_report(tmp_path, "t", before, after, images).read_text(encoding="utf-8")
    assert "<td>scenes · uar</td><td>–</td><td>25.0</td>" in page
    assert "<td>scenes · votes_ece</td><td>0.500</td><td>0.250</td><td>-0.250</td>" in page
    assert "<td>scenes · wheel_distance</td><td>–</td><td>1.500</td>" in page
    assert "<p>group is the mean of scenes.</p>" in page
    assert ">mean confidence of the bin</text>" in page
    assert ">coverage, % of rows that are answered</text>" in page
    assert page.count('<article class="sample" data-set="scenes"') == 1
    text = (tmp_path / "evaluation.md").read_text()
    assert "| scenes | votes_kl | – | 0.125 | |" in text
    assert "| scenes | valence_ccc | – | -0.500 | |" in text
    assert "| group | uar | – | 25.0 |  |" in text and "group is the mean of scenes." in text
    assert text.endswith(
        "| fear | 2 | 0 | 0 |\n\nRows by confidence of their answer:\n\n"
        "| source | confidence | rows | mean confidence | accuracy |\n|---|---|---:|---:|---:|\n"
        "| votes | 0.7 to 0.8 | 4 | 75.0 | 50.0 |\n\n"
        "Accuracy where only the surest rows are answered, at a coverage of at most:\n\n"
        "| source | 25 % | 50 % | 75 % | 100 % |\n|---|---:|---:|---:|---:|\n"
        "| votes | – | 100.0 | 100.0 | 50.0 |\n"
    )
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers["scenes"]["calibrations"]["votes"]["coverage"] == [[0.5, 1.0], [1.0, 0.5]]
    assert from_json(numbers) == after
