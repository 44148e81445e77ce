"""EMOTIC's Annotations.mat in both of its forms."""

import json

import numpy as np
import pytest
import scipy.io

from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.emotic import Emotic
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import LABEL_SETS


def struct(**fields) -> np.ndarray:
    """A MATLAB struct of one element."""
    out = np.empty((1, 1), [(name, object) for name in fields])
    for name, value in fields.items():
        out[0, 0][name] = value
    return out


def row(*structs: np.ndarray) -> np.ndarray:
    return np.concatenate(structs, axis=1)


def cells(*texts: str) -> np.ndarray:
    out = np.empty((1, len(texts)), object)
    out[0, :] = texts
    return out


def vad(*numbers: float) -> np.ndarray:
    return struct(
        **dict(zip(("valence", "arousal", "dominance"), map(float, numbers), strict=True))
    )


BOX = np.array([[10, 20, 110, 220]])
ALONE = struct(
    body_bbox=BOX,
    annotations_categories=struct(categories=cells("Doubt/Confusion", "Disconnection")),
    annotations_continuous=vad(3, 6, 5),
    gender="Male",
    age="Adult",
)
ONE_LABEL = struct(
    body_bbox=BOX,
    annotations_categories=struct(categories=cells("Peace")),
    annotations_continuous=vad(7, 2, 5),
    gender="Female",
    age="Kid",
)
# Three annotators; two of them saw engagement.
SEVERAL = struct(
    body_bbox=BOX,
    annotations_categories=row(
        struct(categories=cells("Anger")),
        struct(categories=cells("Engagement", "Annoyance")),
        struct(categories=cells("Engagement")),
    ),
    annotations_continuous=row(vad(1, 1, 1), vad(9, 9, 9), vad(2, 2, 2)),
    combined_categories=cells("Anger", "Annoyance", "Engagement"),
    combined_continuous=vad(4, 4.5, 5),
    gender="Male",
    age="Teenager",
)


def image(name: str, person: np.ndarray, folder: str = "framesdb/images") -> np.ndarray:
    return struct(filename=name, folder=folder, person=person)


@pytest.fixture
def root(tmp_path, write):
    """Two training images, the second with two people, and one of the validation part."""
    root = tmp_path / "EMOTIC"
    parts = {
        "train": row(image("a.jpg", ALONE), image("b.jpg", row(ONE_LABEL, ALONE), "mscoco/images")),
        "val": row(image("c.jpg", SEVERAL)),
    }
    root.mkdir()
    scipy.io.savemat(root / "Annotations.mat", parts)
    write["image"](root / "framesdb/images/a.jpg", 1)
    write["image"](root / "emotic/mscoco/images/b.jpg", 2)
    write["image"](root / "emotic/framesdb/framesdb/images/c.jpg", 3)
    return root


def test_a_row_is_a_person(root, opened, caplog):
    source = opened("emotic", root, "train")
    texts = list(source.texts())
    assert [t.id for t in texts] == [
        "framesdb/images/a.jpg#0",
        "mscoco/images/b.jpg#0",
        "mscoco/images/b.jpg#1",
    ]
    assert [t.answer for t in texts] == ["doubt/confusion", "peace", "doubt/confusion"]
    assert dict(texts[0].values) == {"valence": 3, "arousal": 6, "dominance": 5}
    shares = {label: share for label, share in texts[0].distribution if share}
    assert shares == {"doubt/confusion": 1, "disconnection": 1}
    assert "between x = 10 and 110 and y = 20 and 220 pixels" in texts[0].question
    assert None not in [source[i].images[0] for i in range(3)]
    # Two people in an image are no repeated image.
    assert "duplicate" not in caplog.text


def test_the_label_is_that_of_most_annotators(root, opened):
    (texts,) = opened("emotic", root, "validation").texts()
    assert texts.answer == "engagement"
    shares = {label: share for label, share in texts.distribution if share}
    assert shares == {"anger": 1, "annoyance": 1, "engagement": 2}
    assert dict(texts.values) == {"valence": 4, "arousal": 4.5, "dominance": 5}
    assert len(texts.distribution) == 26 == len(LABEL_SETS["emotic26"])


def test_all_labels_are_kept(root):
    splits = Emotic.scan(root, Checks("emotic", root))
    about = json.loads(splits["validation"][0].attributes)
    assert about == {
        "labels": ["anger", "annoyance", "engagement"],
        "box": [10, 20, 110, 220],
        "gender": "Male",
        "age": "Teenager",
    }


def test_files_of_another_form_are_named(root, opened):
    (root / "Annotations.mat").write_bytes(b"no mat file" * 40)
    with pytest.raises(DataError, match=r"Annotations\.mat is no MATLAB file"):
        opened("emotic", root, "train")
    scipy.io.savemat(root / "Annotations.mat", {"other": 1})
    with pytest.raises(DataError, match="has none of the parts train, val, test"):
        opened("emotic", root, "train")
    wrong = struct(annotations_categories=struct(categories=cells("Boredom")), body_bbox=BOX)
    scipy.io.savemat(root / "Annotations.mat", {"train": image("a.jpg", wrong)})
    with pytest.raises(DataError, match="has the label 'Boredom', none of EMOTIC's 26"):
        opened("emotic", root, "train")
    (root / "Annotations.mat").unlink()
    with pytest.raises(DataError, match=r"no Annotations\.mat\. EMOTIC is asked for"):
        opened("emotic", root, "train")
