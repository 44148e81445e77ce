import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from emor3_jax.data.datasets import fer2013
from emor3_jax.data.datasets.catalog import open_dataset
from emor3_jax.data.errors import DataError

# Kaggle's numbers: 0 anger, 3 happiness, 4 sadness, 5 surprise, 6 neutral.
NUMBERS = (0, 3, 4, 6, 5)


def face(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 48), dtype=np.uint8)


def line(emotion: int, seed: int, usage: str = "Training") -> tuple[int, str, str]:
    return emotion, " ".join(map(str, face(seed).ravel())), usage


def test_the_csv(tmp_path, write):
    rows = [line(emotion, i) for i, emotion in enumerate(NUMBERS)]
    rows += [line(1, 7, "PublicTest"), line(2, 8, "PrivateTest")]
    write["fer_csv"](tmp_path / "fer", rows)
    opened = {
        split: open_dataset("fer2013", str(tmp_path / "fer"), split, tmp_path / "data")
        for split in ("train", "validation", "test")
    }
    texts = list(opened["train"].texts())
    assert [t.answer for t in texts] == ["anger", "happiness", "sadness", "neutral", "surprise"]
    assert [t.id for t in texts][:2] == ["fer2013.csv:2", "fer2013.csv:3"]
    assert opened["validation"][0].texts.answer == "disgust"
    assert opened["test"][0].texts.answer == "fear"
    # Pixels come back unchanged.
    for source, seed in ((opened["train"], 0), (opened["test"], 8)):
        image = Image.open(io.BytesIO(source[0].images[0]))
        np.testing.assert_array_equal(np.asarray(image), face(seed))


def test_a_damaged_face_stays_and_is_counted(tmp_path, write, caplog):
    emotion, pixels, usage = line(0, 0)
    damaged = (emotion, "999" + pixels[pixels.index(" ") :], usage)
    write["fer_csv"](tmp_path / "fer", [damaged, line(3, 1)])
    source = open_dataset("fer2013", str(tmp_path / "fer"), "train", tmp_path / "data")
    assert source[0].images == [None] and source[1].images[0] is not None
    assert "1 x unreadable" in caplog.text and "fer2013.csv:2" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(7, *line(0, 0)[1:])], "line 2 of fer2013.csv has the emotion '7', not 0 to 6"),
        (
            [line(0, 0), (0, line(0, 0)[1], "Test")],
            "line 3 .*the Usage 'Test', not one of Training, PublicTest",
        ),
        ([(0, "1 2 3", "Training")], "line 2 of fer2013.csv has 3 pixels, not 48 x 48"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, write, rows, message):
    write["fer_csv"](tmp_path / "fer", rows)
    with pytest.raises(DataError, match=message):
        open_dataset("fer2013", str(tmp_path / "fer"), "train", tmp_path / "data")


def test_another_order_of_the_numbers_shows_in_the_counts(tmp_path, write, monkeypatch):
    monkeypatch.setattr(fer2013, "_TRAINING", {"anger": 1, "happiness": 2})
    write["fer_csv"](tmp_path / "right", [line(0, 0), line(3, 1), line(3, 2)])
    assert open_dataset("fer2013", str(tmp_path / "right"), "train", tmp_path / "data")
    write["fer_csv"](tmp_path / "wrong", [line(4, 0), line(3, 1), line(3, 2)])
    with pytest.raises(DataError, match=r"'sadness': 1.*stand for another order"):
        open_dataset("fer2013", str(tmp_path / "wrong"), "train", tmp_path / "data")


def test_the_folders(tmp_path, write):
    names = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
    write["classes"](tmp_path / "fer" / "train", names, 2, ".png")
    write["classes"](tmp_path / "fer" / "test", names, 1, ".png", start=30)
    source = open_dataset("fer2013", str(tmp_path / "fer"), "test", tmp_path / "data")
    assert [t.answer for t in source.texts()] == [
        "anger",
        "disgust",
        "fear",
        "happiness",
        "neutral",
        "sadness",
        "surprise",
    ]
    assert len(open_dataset("fer2013", str(tmp_path / "fer"), "train", tmp_path / "data")) == 14


def test_neither_csv_nor_folders(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"'images' is no part of FER-2013.*kaggle"):
        open_dataset("fer2013", str(tmp_path), "train", tmp_path / "data")


def test_columns_are_read_by_name(tmp_path):
    # Kaggle's other file: another order, and spaces after the commas.
    (tmp_path / "fer").mkdir()
    lines = ["emotion, Usage, pixels"]
    lines += [
        f"{emotion}, {usage}, {pixels}" for emotion, pixels, usage in (line(3, 1), line(6, 2))
    ]
    (tmp_path / "fer" / "icml_face_data.csv").write_text("\n".join(lines) + "\n")
    source = open_dataset("fer2013", str(tmp_path / "fer"), "train", tmp_path / "data")
    assert [t.answer for t in source.texts()] == ["happiness", "neutral"]
    assert source[1].texts.id == "icml_face_data.csv:3"
    image = Image.open(io.BytesIO(source[1].images[0]))
    np.testing.assert_array_equal(np.asarray(image), face(2))


def test_a_csv_without_a_column_is_named(tmp_path):
    (tmp_path / "fer2013.csv").write_text("emotion,pixels\n0,1 2\n")
    with pytest.raises(DataError, match=r"header of fer2013\.csv is 'emotion,pixels', not emotion"):
        open_dataset("fer2013", str(tmp_path), "train", tmp_path / "data")


def test_an_archive_under_the_name_of_the_csv_is_named(tmp_path):
    with tarfile.open(tmp_path / "fer2013.csv", "w:gz") as archive:
        archive.add(__file__)
    with pytest.raises(DataError, match=r"fer2013\.csv is a gzip archive, .* unpack") as raised:
        open_dataset("fer2013", str(tmp_path), "train", tmp_path / "data")
    assert "\0" not in str(raised.value)
