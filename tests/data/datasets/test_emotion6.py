from collections import Counter

import numpy as np
import pytest

from emor3_jax.data.datasets.catalog import open_dataset
from emor3_jax.data.datasets.emotion6 import Emotion6, Emotion6Keyword
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS, label_grades

ROWS = [
    # The folder is the search word: this image of "joy" is one of sadness.
    ("joy/1.jpg", [0.0, 0.1, 0.1, 0.1, 0.4, 0.1, 0.2]),
    # Neutral is largest and passed over.
    ("anger/1.jpg", [0.1, 0.0, 0.0, 0.2, 0.0, 0.0, 0.7]),
    # Disgust and surprise tie: the first is the label.
    ("fear/2.JPG", [0.0, 0.4, 0.1, 0.0, 0.0, 0.4, 0.1]),
    # Only neutral.
    ("fear/3.jpg", [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
]


@pytest.fixture
def folder(tmp_path, write):
    write["emotion6"](tmp_path / "Emotion6", ROWS)
    return tmp_path / "Emotion6"


def test_labels_are_the_largest_of_six_shares(folder, tmp_path, caplog):
    source = open_dataset("emotion6", str(folder), "whole", tmp_path / "data")
    texts = list(source.texts())
    assert [t.id for t in texts] == [file for file, _ in ROWS]
    assert [t.answer for t in texts] == ["sadness", "joy", "disgust", None]
    for kind in ("1 x tie", "1 x no_share", "4 rows, published are 1980"):
        assert kind in caplog.text
    order = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
    assert [label for label, _ in texts[0].distribution] == list(order)
    shares = [share for _, share in texts[0].distribution]
    np.testing.assert_allclose(shares, ROWS[0][1][:6], rtol=1e-6)
    grades = label_grades(texts[2].distribution, {label: i for i, label in enumerate(order)})
    np.testing.assert_allclose(grades, [0, 1, 0.25, 0, 0, 1])


def test_its_own_splits_part_the_rows(write, tmp_path):
    root = tmp_path / "many"
    write["emotion6"](root, [(f"joy/{i}.jpg", [0, 0, 0, 1, 0, 0, 0]) for i in range(100)])
    parts = {
        split: {t.id for t in open_dataset("emotion6", str(root), split, tmp_path / "d").texts()}
        for split in ("whole", "train", "test")
    }
    assert parts["train"] | parts["test"] == parts["whole"] and len(parts["whole"]) == 100
    assert not parts["train"] & parts["test"] and len(parts["test"]) == 30


def test_its_test_split_is_594_of_1980_by_keyword():
    keywords = LABEL_SETS["emotion6"]
    ids = [f"{keyword}/{i}.jpg" for keyword in keywords for i in range(1, 331)]
    test = Emotion6.own_test(ids)
    assert len(test) == 594 and len(ids) - len(test) == 1386
    assert Counter(row_id.split("/")[0] for row_id in test) == dict.fromkeys(keywords, 99)
    # Neither the order nor the other rows' labels change it.
    assert Emotion6.own_test(ids[::-1]) == test == Emotion6Keyword.own_test(ids)


@pytest.mark.parametrize(
    ("rule", "answers"),
    [
        ("", ["sadness", "joy", "disgust", None]),
        ("six", ["sadness", "joy", "disgust", None]),
        ("seven", ["sadness", "neutral", "disgust", "neutral"]),
        ("keyword", ["joy", "anger", "fear", "fear"]),
    ],
)
def test_the_rule_of_the_label_is_chosen(folder, tmp_path, rule, answers):
    source = open_dataset("emotion6", str(folder), "whole", tmp_path / "data", label=rule)
    texts = list(source.texts())
    assert [t.answer for t in texts] == answers
    assert source.labels == ("emotion7" if rule == "seven" else "emotion6")
    assert dict(texts[1].values) == {"valence": 4.5, "arousal": 5.0, "neutral": 0.7}
    assert len(texts[1].distribution) == (7 if rule == "seven" else 6)
    with pytest.raises(DataError, match="label='eight': must be one of six, seven, keyword"):
        open_dataset("emotion6", str(folder), "whole", tmp_path / "data", label="eight")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("joy/1.jpg 4.5 5.0 0 0 0 1 0 0", "line 2 of ground_truth.txt .*not a file and 9 numbers"),
        ("joy/1.jpg 4.5 5.0 0 0 0 x 0 0 0", "line 2"),
        ("joy/1.jpg 4.5 5.0 0 0 0 -1 0 0 0", "shares of 0 or more"),
        ("joy/1.jpg 4.5 5.0 0 0 0 nan 0 0 0", "line 2"),
    ],
)
def test_a_line_of_another_form_is_named(folder, tmp_path, line, message):
    (folder / "ground_truth.txt").write_text("header\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        open_dataset("emotion6", str(folder), "whole", tmp_path / "data")


def test_another_order_of_the_emotions_is_refused(folder, tmp_path):
    text = (folder / "ground_truth.txt").read_text().replace("anger disgust", "disgust anger", 1)
    (folder / "ground_truth.txt").write_text(text)
    with pytest.raises(
        DataError, match=r"orders the emotions disgust, anger, .* is anger, disgust"
    ):
        open_dataset("emotion6", str(folder), "whole", tmp_path / "data")


def test_without_the_list_the_instructions_are_given(folder, tmp_path):
    (folder / "ground_truth.txt").unlink()
    with pytest.raises(DataError, match=r"no ground_truth\.txt\..*chenlab.*images/<keyword>"):
        open_dataset("emotion6", str(folder), "whole", tmp_path / "data")
