"""WebEmo, FI, ArtPhoto, Abstract: labels by folder, by file name, by votes."""

import pytest

from emor3_jax.data.datasets.catalog import open_dataset
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS

WEBEMO_FOLDERS = [
    {"cheerfulness": "cheerfullness", "irritability": "irritabilty"}.get(label, label)
    for label in LABEL_SETS["webemo25"]
]


@pytest.fixture
def opened(tmp_path):
    def call(kind, root, split):
        return open_dataset(kind, str(root), split, tmp_path / "data")

    return call


def answers(source):
    return [texts.answer for texts in source.texts()]


def test_webemo(tmp_path, write, opened):
    root = tmp_path / "WebEmo"
    write["classes"](root / "train", WEBEMO_FOLDERS, 2)
    write["classes"](root / "test", WEBEMO_FOLDERS, 1, ".JPEG", start=100)
    assert set(answers(opened("webemo", root, "train"))) == set(LABEL_SETS["webemo25"])
    assert answers(opened("webemo", root, "test")) == list(LABEL_SETS["webemo25"])
    (root / "test" / "boredom").mkdir()
    with pytest.raises(DataError, match=r"folder 'test/boredom' is no label.*move it away"):
        opened("webemo", root, "test")
    (root / "test" / "boredom").rmdir()
    (root / "new").mkdir()
    with pytest.raises(DataError, match=r"folder 'new' is no split.*rpand002"):
        opened("webemo", root, "test")


def test_a_label_without_folder_is_named(tmp_path, write, opened):
    write["classes"](tmp_path / "FI", LABEL_SETS["mikels8"][:7], 1)
    with pytest.raises(DataError, match=r"no folder <label> for sadness"):
        opened("fi", tmp_path / "FI", "whole")


def test_fi_with_and_without_splits(tmp_path, write, opened):
    write["classes"](tmp_path / "flat", LABEL_SETS["mikels8"], 3)
    assert len(opened("fi", tmp_path / "flat", "whole")) == 24
    parts = [len(opened("fi", tmp_path / "flat", split)) for split in ("train", "test")]
    assert sum(parts) == 24 and min(parts) > 0
    older = ["Content" if x == "contentment" else x.title() for x in LABEL_SETS["mikels8"]]
    write["classes"](tmp_path / "split" / "train", older, 1)
    write["classes"](tmp_path / "split" / "test", older, 1, start=50)
    # Folders in alphabetical order.
    assert answers(opened("fi", tmp_path / "split", "test")) == sorted(LABEL_SETS["mikels8"])


def test_other_files_are_noted_and_twin_folders_refused(tmp_path, write, opened, caplog):
    write["classes"](tmp_path / "FI", LABEL_SETS["mikels8"], 1)
    (tmp_path / "FI" / "awe" / "notes.txt").write_text("x")
    assert len(opened("fi", tmp_path / "FI", "whole")) == 8
    assert "1 x not_a_picture" in caplog.text and "awe/notes.txt" in caplog.text
    write["classes"](tmp_path / "FI", ["Content"], 1)
    with pytest.raises(DataError, match="'Content' and 'contentment' are the same label"):
        opened("fi", tmp_path / "FI", "whole")


def test_artphoto(tmp_path, write, opened):
    root = tmp_path / "testImages_artphoto"
    names = ["amusement", "awe", "content", "excitement", "anger", "disgust", "fear", "sad"]
    for i, name in enumerate(names):
        write["image"](root / f"{name}_{i:04d}.jpg", i)
    source = opened("artphoto", root, "whole")
    found = {t.id: t.answer for t in source.texts()}
    assert found["content_0002.jpg"] == "contentment" and found["sad_0007.jpg"] == "sadness"
    assert sorted(found.values()) == sorted(LABEL_SETS["mikels8"])
    write["image"](root / "holiday.jpg", 50)
    with pytest.raises(DataError, match=r"'holiday\.jpg' is not <label>_<number>"):
        opened("artphoto", root, "whole")
    (root / "holiday.jpg").unlink()
    (root / "fear_0006.jpg").unlink()
    with pytest.raises(DataError, match="no image of fear"):
        opened("artphoto", root, "whole")


HEADER = "'','Amusement','Anger','Awe','Content','Disgust','Excitement','Fear','Sad'"


def test_abstract(tmp_path, write, opened, caplog):
    root = tmp_path / "testImages_abstract"
    for i in range(3):
        write["image"](root / f"abstract_{i:04d}.jpg", i)
    lines = [
        HEADER,
        "'abstract_0000.jpg',0,1,6,2,0,0,0,1",
        # Anger and sadness tie; anger is first in the file.
        "'abstract_0001.jpg',0,4,0,1,0,0,0,4",
        "'abstract_0002.jpg',0,0,0,0,0,0,0,0",
    ]
    (root / "ABSTRACT_groundTruth.csv").write_text("\n".join(lines) + "\n")
    source = opened("abstract", root, "whole")
    assert answers(source) == ["awe", "anger", None]
    shares = dict(source[0].texts.distribution)
    assert shares == {label: 0 for label in LABEL_SETS["mikels8"]} | {
        "anger": 1,
        "awe": 6,
        "contentment": 2,
        "sadness": 1,
    }
    assert "1 x tie" in caplog.text and "1 x no_share" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace("'Awe'", "'Joy'"), "the header .* must name amusement"),
        (HEADER + "\n'abstract_0000.jpg',0,1", "line 2 .* not a file and 8 numbers"),
        (HEADER + "\n'abstract_0000.jpg',0,1,x,0,0,0,0,0", "line 2"),
    ],
)
def test_abstracts_csv_of_another_form_is_named(tmp_path, opened, text, message):
    (tmp_path / "ABSTRACT_groundTruth.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        opened("abstract", tmp_path, "whole")
