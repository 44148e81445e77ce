"""VECBench: one table of nine tasks, and the candidates of its rows."""

import json

import pytest

from emor3_jax.data.datasets.vecbench import TASKS
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS, label_set

ROWS = [
    ("FI-2", "test", "images/FI/a.jpg", "Positive"),
    ("FI-8", "test", "images/FI/a.jpg", "awe"),
    ("WebEmo-25", "test", "images/WebEmo/b.jpg", "cheerfullness"),
    ("WebEmo-7", "test", "images/WebEmo/b.jpg", "joy"),
    ("UnbaisedEmo-6", "test", "images/UnbiasedEmo/c.jpg", "love"),
    ("Abstract-8", "test", "images/Abstract/d.jpg", "sad"),
    ("FI-8", "train", "images/FI/e.jpg", "fear"),
]


@pytest.fixture(params=["", "VECBench"])
def root(request, tmp_path, write):
    root = tmp_path / "VECBench"
    for number, name in enumerate(sorted({row[2] for row in ROWS})):
        write["image"](root / name, number)
    lines = ["task,split,image_path,label", *map(",".join, ROWS)]
    (root / request.param).mkdir(exist_ok=True)
    (root / request.param / "test_metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def test_a_task_has_its_labels(root, opened, caplog):
    source = opened("vecbench", root, "test", label="webemo-25")
    assert source.labels == "webemo25"
    (texts,) = source.texts()
    assert (texts.id, texts.answer) == ("webemo-25/images/WebEmo/b.jpg", "cheerfulness")
    assert texts.candidates == () and source[0].images[0] is not None
    assert "test: 1 rows, published are 997" in caplog.text
    for task, label in (("fi-2", "positive"), ("unbiasedemo-6", "love"), ("abstract-8", "sadness")):
        assert [t.answer for t in opened("vecbench", root, "test", label=task).texts()] == [label]
    assert [t.answer for t in opened("vecbench", root, "train", label="fi-8").texts()] == ["fear"]
    with pytest.raises(DataError, match="label='fi-3': must be one of all, fi-2, fi-8"):
        opened("vecbench", root, "test", label="fi-3")


def test_all_tasks_at_once_ask_with_the_candidates_of_each(root, opened, caplog):
    source = opened("vecbench", root, "test")
    texts = list(source.texts())
    assert [t.id.partition("/")[0] for t in texts] == [
        "fi-2",
        "fi-8",
        "webemo-25",
        "webemo-7",
        "unbiasedemo-6",
        "abstract-8",
    ]
    assert [t.candidates for t in texts][:2] == [LABEL_SETS["polarity2"], LABEL_SETS["mikels8"]]
    assert all(t.answer in t.candidates for t in texts)
    labels = label_set(source.labels)
    assert set(labels) == {label for task in TASKS.values() for label in LABEL_SETS[task.labels]}
    # One image under two tasks is no repeated image.
    assert "duplicate" not in caplog.text


@pytest.mark.parametrize("form", ["image_path", "image", "conversations"])
def test_candidates_come_from_json_lines(root, opened, form):
    (path,) = root.rglob("test_metadata.csv")
    own = ["zest", *[x for x in LABEL_SETS["webemo25"] if x != "zest"]]
    own[own.index("cheerfulness")] = "cheerfullness"
    place = "/somewhere/else/WebEmo/b.jpg"
    turn = {"role": "user", "content": [{"type": "image", "image": place}, {"type": "text"}]}
    row = {"task": "WebEmo-25", "candidates": own, "ground_truth": "cheerfullness"}
    row |= {"conversations": [turn]} if form == "conversations" else {form: place}
    (path.parent / "test.jsonl").write_text(json.dumps(row) + "\n")
    (texts,) = opened("vecbench", root, "test", label="webemo-25").texts()
    assert texts.candidates[0] == "zest" and set(texts.candidates) == set(LABEL_SETS["webemo25"])
    row["candidates"] = ["boredom"]
    (path.parent / "test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"line 1 of test\.jsonl has the candidates .'boredom'."):
        opened("vecbench", root, "test", label="webemo-25")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("FI-9,test,images/FI/a.jpg,awe", "row 2 of test_metadata.csv has the task 'fi-9'"),
        ("FI-8,test,images/FI/a.jpg,joy", "row 2 of test_metadata.csv has the label 'joy'"),
        ("FI-8,test,images/FI/a.jpg", "row 2 of test_metadata.csv has 3 fields, its header 4"),
    ],
)
def test_a_row_of_another_form_is_named(root, opened, line, message):
    (path,) = root.rglob("test_metadata.csv")
    path.write_text(f"task,split,image_path,label\n{line}\n")
    with pytest.raises(DataError, match=message):
        opened("vecbench", root, "test")
    path.write_text("task,image_path,label\nFI-8,x,awe\n")
    with pytest.raises(
        DataError, match=r"test_metadata\.csv has no column split, only task, image"
    ):
        opened("vecbench", root, "test")
