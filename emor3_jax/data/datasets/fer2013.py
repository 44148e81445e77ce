"""FER-2013: 35,887 grey faces of 48 x 48 pixels in seven expressions (ICML 2013 workshop).

Read from Kaggle's `fer2013.csv` or `icml_face_data.csv`, whose columns emotion, pixels and Usage
are found by name in any order, and whose faces have no files and become PNG files in the records;
or from folders `<split>/<expression>/*`, where the images stay.

Checked against public code: both csv files (the second has spaces after its commas), the folders.
"""

import functools
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from emor3_jax.data.datasets.base import Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import folders, read_rows, split_folders
from emor3_jax.data.labels import LABEL_SETS, normalize

SIDE = 48
CSV_NAMES = ("fer2013.csv", "icml_face_data.csv")
"""Names of the csv file, the first that is there."""

USAGE = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
_COLUMNS = ("emotion", "pixels", "usage")
_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "validation": "validation",
    "publictest": "validation",
    "test": "test",
    "privatetest": "test",
}
# The numbers of the csv.
_NUMBERS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
# Of the whole training part: another order of the numbers shows in these.
_TRAINING = {
    "anger": 3995,
    "disgust": 436,
    "fear": 4097,
    "happiness": 7215,
    "sadness": 4830,
    "surprise": 3171,
    "neutral": 4965,
}
_QUESTION = "Which emotion does this face show?"
_INSTRUCTIONS = (
    "FER-2013 is downloaded by hand from Kaggle: fer2013.csv or icml_face_data.csv from "
    "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-"
    "challenge, or folders <split>/<expression>/*.jpg from "
    "https://www.kaggle.com/datasets/msambare/fer2013. Give the folder that holds the csv, or the "
    "folders of the splits, as path."
)


def find_csv(root: Path) -> Path | None:
    """Returns the csv file of a folder, None if it has none."""
    return next((root / name for name in CSV_NAMES if (root / name).is_file()), None)


class Fer2013Csv(Builder):
    """FER-2013 from Kaggle's csv: Training, PublicTest (validation), PrivateTest (test)."""

    LABELS = "fer7"
    QUESTION = _QUESTION
    PUBLISHED = (("train", 28_709), ("validation", 3589), ("test", 3589))
    IMAGES_IN_FILES = False
    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        path = find_csv(root)
        if path is None:
            raise checks.refuse(f"no {' or '.join(CSV_NAMES)}. {_INSTRUCTIONS}")
        splits: dict[str, list[Found]] = {split: [] for split in USAGE.values()}
        for line, (emotion, _, usage) in read_faces(path, checks):
            if emotion not in set("0123456"):
                raise checks.refuse(
                    f"line {line} of {path.name} has the emotion {emotion!r}, not 0 to 6"
                )
            label = _NUMBERS[int(emotion)]
            splits[USAGE[usage]].append(Found(f"{path.name}:{line}", label, ""))
        counts = Counter(found.label for found in splits["train"])
        if sum(counts.values()) == sum(_TRAINING.values()) and dict(counts) != _TRAINING:
            raise checks.refuse(
                f"{path.name} has the numbers of rows of FER-2013 but not its labels: "
                f"{dict(counts)}, published are {_TRAINING}; the numbers of its emotions stand for "
                "another order"
            )
        return splits

    def image(self, root: Path, found: Found) -> bytes | None:
        return face_png(root, found.id)


class Fer2013Folders(Builder):
    """FER-2013 from folders, `train` and `test` as they circulate, or all three parts."""

    LABELS = "fer7"
    QUESTION = _QUESTION
    PUBLISHED = (("all", 35_887), ("train", 28_709))
    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        for name in folders(root):
            if name.lower() not in _FOLDERS:
                raise checks.refuse(
                    f"the folder {name!r} is no part of FER-2013 ({', '.join(_FOLDERS)}). "
                    f"{_INSTRUCTIONS}"
                )
        return split_folders(root, "", LABEL_SETS[cls.LABELS], checks, _FOLDERS)


def read_faces(path: Path, checks: Checks) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """Yields line and (emotion, pixels, Usage) of each row of Kaggle's csv, checked but for values.

    Raises:
      DataError: naming line and rule, or that the file is no such csv.
    """
    # Rows of pixels are short of the 128 KiB at which the csv module refuses a field.
    reader = read_rows(path, checks)
    first = next(reader, [])
    header = [normalize(name) for name in first]
    if sorted(header) != sorted(_COLUMNS):
        shown = ascii(",".join(first))[:80]
        raise checks.refuse(
            f"the header of {path.name} is {shown}, not emotion, pixels and Usage in any order"
        )
    at = [header.index(name) for name in _COLUMNS]
    for line, row in enumerate(reader, start=2):
        if len(row) != len(header):
            raise checks.refuse(f"line {line} of {path.name} has {len(row)} fields, not 3")
        emotion, pixels, usage = (row[i] for i in at)
        if usage not in USAGE:
            raise checks.refuse(
                f"line {line} of {path.name} has the Usage {usage!r}, not one of {', '.join(USAGE)}"
            )
        count = pixels.count(" ") + 1
        if count != SIDE * SIDE:
            raise checks.refuse(
                f"line {line} of {path.name} has {count} pixels, not {SIDE} x {SIDE}"
            )
        yield line, (emotion, pixels, usage)


def face_png(root: Path, row_id: str) -> bytes | None:
    """Returns the face of a row `<csv>:<line>` as a PNG file, None where a value is no byte."""
    name, _, line = row_id.rpartition(":")
    pixels = _pixels(root / name)[int(line) - 2]
    if pixels is None:
        return None
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@functools.lru_cache(maxsize=1)
def _pixels(path: Path) -> list[np.ndarray | None]:
    """Returns uint8[48, 48] of each row, None where a value is no byte; 83 MB for all of them."""
    return [_face(row[1]) for _, row in read_faces(path, Checks("fer2013", path.parent))]


def _face(pixels: str) -> np.ndarray | None:
    try:
        return np.array(pixels.split(), np.uint8).reshape(SIDE, SIDE)
    except (ValueError, OverflowError):
        return None
