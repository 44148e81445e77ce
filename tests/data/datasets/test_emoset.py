import json

import pytest

from emor3_jax.data.datasets.base import Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.emoset import Emoset
from emor3_jax.data.errors import DataError


@pytest.fixture
def folder(tmp_path, write):
    return tmp_path, write["emoset"](tmp_path, {"train": 8, "val": 2, "test": 3})


def scan(root):
    checks = Checks("emoset", root)
    return Emoset.scan(root, checks), checks.to_dict()


def test_splits_rows_and_labels(folder):
    root, rows = folder
    splits, found = scan(root)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 8,
        "validation": 2,
        "test": 3,
    }
    label, name, image, annotation = rows["train"][5]
    assert splits["train"][5] == Found(name, label, image, annotation=annotation)
    assert found == {}


def test_rows_of_three_items_are_read_as_the_lists_have_them(folder):
    root, rows = folder
    short = [[row[0], *row[2:]] for row in rows["train"]]
    (root / "train.json").write_text(json.dumps(short))
    assert scan(root)[0]["train"][5].id == rows["train"][5][1]


def test_capital_extensions_are_found(folder):
    root, rows = folder
    image = root / rows["train"][0][2]
    image.rename(image.with_suffix(".JPG"))
    splits, found = scan(root)
    assert splits["train"][0].file == "image/amusement/amusement_00000.JPG"
    assert found == {"other_case": [rows["train"][0][2]]}


def test_a_image_that_is_gone_stays_without_file(folder):
    root, rows = folder
    (root / rows["train"][0][2]).unlink()
    assert scan(root)[0]["train"][0].file == ""


def test_a_image_listed_twice_is_kept_once(folder):
    root, rows = folder
    (root / "train.json").write_text(json.dumps([*rows["train"], rows["train"][2]]))
    splits, found = scan(root)
    assert len(splits["train"]) == 8 and found == {"listed_twice": ["train/contentment_00002"]}


def test_a_folder_of_another_emotion_is_noted(folder):
    root, rows = folder
    rows["train"][0][0] = "fear"
    (root / "train.json").write_text(json.dumps(rows["train"]))
    assert scan(root)[1] == {"other_label": ["train/amusement_00000 (fear, folder amusement)"]}


def test_another_order_of_labels_is_refused(folder):
    root, _ = folder
    info = json.loads((root / "info.json").read_text())
    info["emotion"]["label2idx"] |= {"awe": 0, "amusement": 1}
    (root / "info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"orders the labels awe, amusement, .*is amusement, awe"):
        scan(root)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["joy", "x", "image/joy/x.jpg", "annotation/joy/x.json"], "row 0 of train.json names .*"
         "'joy'; EmoSet has amusement"),
        (["awe", "x", "awe/x.jpg"], r"row 0 of train\.json is .*, not \[emotion"),
        ({"label": "awe"}, r"row 0 of train\.json is \{'label'"),
    ],
)  # fmt: skip
def test_a_row_of_another_form_is_named(folder, row, message):
    root, _ = folder
    (root / "train.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match=message):
        scan(root)


def test_a_list_that_is_missing_or_damaged_is_named(folder):
    root, _ = folder
    (root / "val.json").unlink()
    assert set(scan(root)[0]) == {"train", "test"}
    (root / "test.json").write_text("[[")
    with pytest.raises(DataError, match=r"test\.json is no JSON.*download it again"):
        scan(root)
    (root / "train.json").unlink()
    with pytest.raises(DataError, match=r"no train\.json.*vcc\.tech/EmoSet.*annotation/<emotion>"):
        scan(root)
