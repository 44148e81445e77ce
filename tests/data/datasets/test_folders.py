"""WebEmo, FI, ArtPhoto, Abstract: labels by folder, by file name, by votes."""

import os

import pytest

from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS, label_map

WEBEMO_FOLDERS = [
    {"cheerfulness": "cheerfullness", "irritability": "irritabilty"}.get(label, label)
    for label in LABEL_SETS["webemo25"]
]


def answers(source):
    return [texts.answer for texts in source.texts()]


def test_webemo_by_name(tmp_path, write, opened):
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


@pytest.mark.parametrize(
    ("train", "test"), [("train", "test"), ("images/train25", "images/test25")]
)
def test_webemo_by_number(tmp_path, write, opened, train, test):
    numbers = [str(i) for i in range(25)]
    write["classes"](tmp_path / "WebEmo" / train, numbers, 1)
    write["classes"](tmp_path / "WebEmo" / test, numbers, 1, start=30)
    source = opened("webemo", tmp_path / "WebEmo", "test")
    found = {texts.id.split("/")[-2]: texts.answer for texts in source.texts()}
    assert found == dict(zip(numbers, LABEL_SETS["webemo25"], strict=True))


# Address, label; the second stands there twice, the fourth under another label too.
ADDRESSES = [
    ("https://as2.ftcdn.net/jpg/00/42/220_F_1_a.jpg", 0),
    ("https://as2.ftcdn.net/jpg/00/42/220_F_2_b.jpg", 1),
    ("https://as2.ftcdn.net/jpg/00/42/220_F_2_b.jpg", 1),
    ("https://as1.ftcdn.net/jpg/00/43/220_F_3_c.jpg", 2),
    ("https://as1.ftcdn.net/jpg/00/43/220_F_3_c.jpg", 22),
    ("https://as1.ftcdn.net/jpg/00/44/220_F_4_d.jpg", 24),
]


@pytest.mark.parametrize(
    "place", ["test/{number}/{name}", "images/test/{number}_{name}", "images/{name}"]
)
def test_webemo_by_its_list_of_addresses(tmp_path, write, opened, caplog, place):
    root = tmp_path / "WebEmo"
    root.mkdir()
    (root / "test25.txt").write_text("".join(f"{url} {n}\n" for url, n in ADDRESSES))
    (root / "category.txt").write_text("".join(f"('{x}', 'joy', '+')\n" for x in WEBEMO_FOLDERS))
    for url, number in ADDRESSES[:-1]:
        name = url.rpartition("/")[2]
        write["image"](root / place.format(number=number, name=name), number)
    source = opened("webemo", root, "test")
    assert [texts.id for texts in source.texts()] == [
        "test/0/220_F_1_a.jpg",
        "test/1/220_F_2_b.jpg",
        "test/2/220_F_3_c.jpg",
        "test/22/220_F_3_c.jpg",
    ]
    assert answers(source) == ["affection", "cheerfulness", "confusion", "surprise"]
    for said in (
        "1 x listed_twice",
        "1 x not_downloaded",
        "test/24/220_F_4_d.jpg",
        "6 lines, published are 53489",
    ):
        assert said in caplog.text
    seven, two = label_map("webemo25", "webemo7"), label_map("webemo25", "polarity2")
    assert [seven[x] for x in answers(source)] == ["love", "joy", "confusion", "surprise"]
    assert [two[x] for x in answers(source)] == ["positive", "positive", "negative", "positive"]


def test_webemo_lists_of_another_form_are_named(tmp_path, opened):
    (tmp_path / "test25.txt").write_text("https://a/b.jpg 25\n")
    with pytest.raises(DataError, match=r"line 1 of test25\.txt .* a number of 0 to 24"):
        opened("webemo", tmp_path, "test")
    (tmp_path / "test25.txt").write_text("https://a/b.jpg 3\n")
    with pytest.raises(DataError, match=r"none of the 1 images of test25\.txt is there; .*images/"):
        opened("webemo", tmp_path, "test")
    wrong = [*WEBEMO_FOLDERS[1:], WEBEMO_FOLDERS[0]]
    (tmp_path / "category.txt").write_text("".join(f"('{x}', 'joy', '+')\n" for x in wrong))
    with pytest.raises(DataError, match=r"category\.txt orders the labels cheerfulness"):
        opened("webemo", tmp_path, "test")


def test_hidden_files_are_no_images(tmp_path, write, opened, caplog):
    root = tmp_path / "FI"
    write["classes"](root, LABEL_SETS["mikels8"], 1)
    (root / "awe" / "._0.jpg").write_bytes(b"\0\5\x16\7")
    (root / "awe" / ".DS_Store").write_bytes(b"x")
    (root / "awe" / "Thumbs.db").write_bytes(b"x")
    (root / "__MACOSX" / "awe").mkdir(parents=True)
    assert len(opened("fi", root, "whole")) == 8
    assert "not_a_picture" not in caplog.text
    art = tmp_path / "art"
    for i, label in enumerate(LABEL_SETS["mikels8"]):
        write["image"](art / f"{label}_{i}.jpg", i)
    (art / "._awe_1.jpg").write_bytes(b"x")
    assert len(opened("artphoto", art, "whole")) == 8


def test_images_are_told_by_their_content_too(tmp_path, write, opened, caplog):
    root = tmp_path / "FI"
    write["classes"](root, LABEL_SETS["mikels8"], 1)
    for number, name in enumerate(("a.jfif", "b", "c.image", "d.AVIF")):
        write["image"](root / "awe" / f"{number}x.jpg", 40 + number)
        (root / "awe" / f"{number}x.jpg").rename(root / "awe" / name)
    (root / "awe" / "e").write_text("no image")
    source = opened("fi", root, "whole")
    found = [texts.id for texts in source.texts() if texts.answer == "awe"]
    assert found == ["awe/0.jpg", "awe/a.jfif", "awe/b", "awe/c.image", "awe/d.AVIF"]
    assert "1 x not_a_picture" in caplog.text and source.sizes().min() > 0


def test_names_that_are_no_text_are_counted(tmp_path, write, opened, caplog):
    root = tmp_path / "FI"
    write["classes"](root, LABEL_SETS["mikels8"], 1)
    os.rename(root / "awe" / "0.jpg", os.fsencode(root / "awe") + b"/caf\xe9.jpg")
    write["image"](root / "awe" / "1.jpg", 77)
    assert len(opened("fi", root, "whole")) == 8
    assert r"1 x bad_name" in caplog.text and r"awe/caf\xe9.jpg" in caplog.text


def test_folders_within_a_label_are_read(tmp_path, write, opened):
    labels = LABEL_SETS["mikels8"]
    write["classes"](tmp_path / "FI", [f"{label}/cat" for label in labels], 1)
    write["classes"](tmp_path / "FI", [f"{label}/dog" for label in labels], 1, start=20)
    source = opened("fi", tmp_path / "FI", "whole")
    assert len(source) == 16
    assert [t.id for t in source.texts() if t.answer == "awe"] == ["awe/cat/0.jpg", "awe/dog/0.jpg"]


def test_fi_without_the_image_of_removed_ones(tmp_path, write, opened, caplog):
    root = tmp_path / "FI"
    write["classes"](root, LABEL_SETS["mikels8"], 2)
    for i in range(11):
        write["image"](root / LABEL_SETS["mikels8"][i % 8] / f"removed{i}.jpg", 99)
    source = opened("fi", root, "whole")
    assert len(source) == 16 and not any("removed" in t.id for t in source.texts())
    assert "11 x placeholder" in caplog.text and "duplicate" not in caplog.text


def test_ten_equal_images_of_fi_stay(tmp_path, write, opened, caplog):
    root = tmp_path / "FI"
    write["classes"](root, LABEL_SETS["mikels8"], 1)
    for i in range(10):
        write["image"](root / "awe" / f"same{i}.jpg", 99)
    assert len(opened("fi", root, "whole")) == 18
    assert "9 x duplicate" in caplog.text


def test_fi_by_its_votes(tmp_path, write, opened, caplog):
    root = tmp_path / "FI"
    (root / "agg").mkdir(parents=True)
    (root / "agg" / "awe_x.csv").write_text("awe,http://f/1_a.jpg,1,4\nawe,http://f/2_b.jpg,3,2\n")
    (root / "agg" / "sad.csv").write_text("sad,http://f/3_c.jpg,0,5\nsad,http://f/4_d.jpg,0,5\n")
    write["image"](root / "awe" / "1_a.jpg", 1)
    write["image"](root / "images" / "sad" / "3_c.jpg", 3)
    source = opened("fi", root, "whole")
    assert {t.id: t.answer for t in source.texts()} == {
        "awe/1_a.jpg": "awe",
        "sadness/3_c.jpg": "sadness",
    }
    assert dict(source[0].texts.values) == {"agree": 4, "disagree": 1}
    assert "1 x few_votes" in caplog.text and "1 x not_downloaded" in caplog.text
    (root / "agg" / "sad.csv").write_text("sad,http://f/3_c.jpg,0\n")
    with pytest.raises(DataError, match=r"line 1 of sad\.csv .*not an emotion of amusement"):
        opened("fi", root, "whole")


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
    assert answers(source) == ["awe", None]
    assert "1 x tie_dropped" in caplog.text and "2 rows, published are 229" in caplog.text
    source = opened("abstract", root, "whole", label="first")
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
