"""CAER-S, RAF-DB and FER+: folders, a list of numbers, votes beside FER-2013's faces."""

import io

import numpy as np
import pytest
from PIL import Image

from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS

CAER = ["Anger", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise"]


def test_caers(tmp_path, write, opened):
    root = tmp_path / "CAER-S"
    write["classes"](root / "train", CAER, 2, ".png")
    write["classes"](root / "test", CAER, 1, ".png", start=30)
    (root / "train" / "Happy" / "._0.png").write_bytes(b"x")
    source = opened("caers", root, "test")
    assert [t.answer for t in source.texts()] == list(LABEL_SETS["fer7"])
    assert len(opened("caers", root, "train")) == 14
    (root / "frames").mkdir()
    with pytest.raises(DataError, match=r"the folder 'frames' is no split"):
        opened("caers", root, "test")


RAF = [("train_00001.jpg", 5), ("train_00002.jpg", 1), ("test_0001.jpg", 7), ("test_0002.jpg", 4)]


@pytest.mark.parametrize("below", ["", "basic"])
@pytest.mark.parametrize("form", ["{name} {number}", "{name}\t{split}\t{number}"])
def test_rafdb(tmp_path, write, opened, caplog, below, form):
    root = tmp_path / "RAF"
    (root / below / "EmoLabel").mkdir(parents=True)
    lines = [form.format(name=n, split=n.split("_")[0], number=i) for n, i in RAF]
    (root / below / "EmoLabel" / "list_patition_label.txt").write_text("\n".join(lines) + "\n")
    for number, (name, _) in enumerate(RAF[:3]):
        write["image"](root / below / "Image/aligned" / name.replace(".", "_aligned."), number)
    write["image"](root / below / "Image/original" / "test_0002.jpg", 9)
    train, test = (opened("rafdb", root, split) for split in ("train", "test"))
    assert [t.answer for t in train.texts()] == ["sadness", "surprise"]
    assert [t.answer for t in test.texts()] == ["neutral", "happiness"]
    assert None not in [source[i].images[0] for source in (train, test) for i in range(2)]
    for said in ("train: 2 rows, published are 12271", "fear: 0 rows, published are 355"):
        assert said in caplog.text


def test_rafdb_as_on_kaggle(tmp_path, write, opened):
    for number, split in enumerate(("train", "test")):
        where = tmp_path / "RAF" / "DATASET" / split
        write["classes"](where, [str(i) for i in range(1, 8)], 1, start=20 * number)
    source = opened("rafdb", tmp_path / "RAF", "test")
    found = {t.id.split("/")[-2]: t.answer for t in source.texts()}
    assert found["1"] == "surprise" and found["5"] == "sadness" and found["7"] == "neutral"


def test_rafdbs_list_of_another_form_is_named(tmp_path, opened):
    (tmp_path / "EmoLabel").mkdir()
    (tmp_path / "EmoLabel" / "list_patition_label.txt").write_text("train_00001.jpg 8\n")
    with pytest.raises(DataError, match=r"line 1 of list_patition_label\.txt .* number of 1 to 7"):
        opened("rafdb", tmp_path, "train")
    (tmp_path / "EmoLabel" / "list_patition_label.txt").unlink()
    with pytest.raises(DataError, match=r"no EmoLabel/list_patition_label\.txt\. RAF-DB is asked"):
        opened("rafdb", tmp_path, "train")


HEADER = (
    "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
)
VOTES = [
    "Training,fer0000000.png,4,0,0,1,3,2,0,0,0,0",
    # Anger and contempt tie.
    "Training,fer0000001.png,0,0,0,0,5,0,0,5,0,0",
    # No face: no image name.
    "Training,,0,0,0,0,0,0,0,0,0,10",
    # Most raters do not know.
    "Training,fer0000003.png,0,2,0,0,0,0,0,0,8,0",
    "PublicTest,fer0028709.png,0,9,1,0,0,0,0,0,0,0",
    "PrivateTest,fer0032298.png,0,0,0,0,0,0,2,7,1,0",
]
USAGES = ["Training"] * 4 + ["PublicTest", "PrivateTest"]


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 48), dtype=np.uint8)


def test_ferplus_beside_the_csv(tmp_path, write, opened, caplog):
    root = tmp_path / "fer"
    faces = [(0, " ".join(map(str, pixels(i).ravel())), usage) for i, usage in enumerate(USAGES)]
    write["fer_csv"](root, faces)
    (root / "fer2013new.csv").write_text("\n".join([HEADER, *VOTES]) + "\n")
    train = opened("ferplus", root, "train")
    assert [t.answer for t in train.texts()] == ["neutral", "anger"]
    assert [t.id for t in train.texts()] == ["fer2013.csv:2", "fer2013.csv:3"]
    assert dict(train[0].texts.distribution) == dict(
        zip(LABEL_SETS["ferplus8"], [4, 0, 0, 1, 3, 2, 0, 0], strict=True)
    )
    for said in ("1 x tie ", "2 x no_face"):
        assert said in caplog.text
    test = opened("ferplus", root, "test")
    assert [t.answer for t in test.texts()] == ["contempt"]
    image = Image.open(io.BytesIO(test[0].images[0]))
    np.testing.assert_array_equal(np.asarray(image), pixels(5))
    write["fer_csv"](root, faces[:-1])
    with pytest.raises(
        DataError, match=r"fer2013new\.csv has 6 rows and fer2013\.csv 5, and their"
    ):
        opened("ferplus", root, "test")


def test_ferplus_beside_folders(tmp_path, write, opened):
    root = tmp_path / "fer"
    write["image"](root / "FER2013Train" / "fer0000000.png", 0)
    write["image"](root / "FER2013Train" / "fer0000001.png", 1)
    write["image"](root / "FER2013Valid" / "fer0028709.png", 2)
    write["image"](root / "FER2013Test" / "fer0032298.png", 3)
    (root / "fer2013new.csv").write_text("\n".join([HEADER, *VOTES]) + "\n")
    source = opened("ferplus", root, "train")
    assert [t.id for t in source.texts()] == ["fer0000000.png", "fer0000001.png"]
    assert source[1].images == [(root / "FER2013Train" / "fer0000001.png").read_bytes()]
    assert [t.answer for t in opened("ferplus", root, "val").texts()] == ["happiness"]
    (root / "fer2013new.csv").write_text(HEADER.replace(",contempt", "") + "\n")
    with pytest.raises(DataError, match=r"fer2013new\.csv has no column contempt"):
        opened("ferplus", root, "train")
