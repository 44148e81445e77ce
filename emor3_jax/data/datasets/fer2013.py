"""FER-2013: 35,887 grey faces of 48 x 48 pixels in seven expressions (ICML 2013 workshop).

Read from Kaggle's `fer2013.csv` (emotion, pixels, Usage), whose faces have no files and become PNG
files in the records, or from folders `<split>/<expression>/*`, where the images stay.
"""

import csv
import functools
import io
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from emor3_jax.data.datasets.base import Builder, Found, class_folders, folders
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.labels import LABEL_SETS

SIDE = 48
_CSV = "fer2013.csv"
_USAGE = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
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
_ALIASES = {"angry": "anger", "happy": "happiness", "sad": "sadness", "surprised": "surprise"}
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
    "FER-2013 is downloaded by hand from Kaggle: fer2013.csv from "
    "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-"
    "challenge, or folders <split>/<expression>/*.jpg from "
    "https://www.kaggle.com/datasets/msambare/fer2013. Give the folder that holds the csv, or the "
    "folders of the splits, as path."
)


class Fer2013Csv(Builder):
    """FER-2013 from Kaggle's csv: Training, PublicTest (validation), PrivateTest (test)."""

    LABELS = "fer7"
    QUESTION = _QUESTION
    PUBLISHED = (("train", 28_709), ("validation", 3589), ("test", 3589))
    IMAGES_IN_FILES = False
    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        path = root / _CSV
        if not path.is_file():
            raise checks.refuse(f"no {_CSV}. {_INSTRUCTIONS}")
        splits: dict[str, list[Found]] = {split: [] for split in _USAGE.values()}
        # The csv module refuses fields of more than 128 KiB, which no row of pixels has.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if header != ["emotion", "pixels", "Usage"]:
                raise checks.refuse(
                    f"the header of {_CSV} is {','.join(header)!r}, not 'emotion,pixels,Usage'"
                )
            for line, row in enumerate(reader, start=2):
                split = _check_row(row, line, checks)
                label = _NUMBERS[int(row[0])]
                splits[split].append(Found(f"{_CSV}:{line}", label, ""))
        counts = Counter(found.label for found in splits["train"])
        if sum(counts.values()) == sum(_TRAINING.values()) and dict(counts) != _TRAINING:
            raise checks.refuse(
                f"{_CSV} has the numbers of rows of FER-2013 but not its labels: {dict(counts)}, "
                f"published are {_TRAINING}; the numbers of its emotions stand for another order"
            )
        return splits

    def image(self, root: Path, found: Found) -> bytes | None:
        line = int(found.id.rpartition(":")[2])
        pixels = _pixels(root / _CSV)[line - 2]
        if pixels is None:
            return None
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()


class Fer2013Folders(Builder):
    """FER-2013 from folders, `train` and `test` as they circulate, or all three parts."""

    LABELS = "fer7"
    QUESTION = _QUESTION
    PUBLISHED = (("all", 35_887), ("train", 28_709))
    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        splits = {}
        for name in folders(root):
            if name.lower() not in _FOLDERS:
                raise checks.refuse(
                    f"the folder {name!r} is no part of FER-2013 ({', '.join(_FOLDERS)}). "
                    f"{_INSTRUCTIONS}"
                )
            labels = LABEL_SETS[cls.LABELS]
            splits[_FOLDERS[name.lower()]] = class_folders(root, name, labels, _ALIASES, checks)
        return splits


def _check_row(row: list[str], line: int, checks: Checks) -> str:
    """Returns the split of a row of the csv; all its fields are checked but the pixels' values."""
    if len(row) != 3 or row[0] not in set("0123456") or row[2] not in _USAGE:
        shown = [row[0], "…", *row[2:]] if row else row
        raise checks.refuse(
            f"line {line} of {_CSV} is {','.join(shown)!r}: emotion must be 0 to 6 and Usage one "
            f"of {', '.join(_USAGE)}"
        )
    count = row[1].count(" ") + 1
    if count != SIDE * SIDE:
        raise checks.refuse(f"line {line} of {_CSV} has {count} pixels, not {SIDE} x {SIDE}")
    return _USAGE[row[2]]


@functools.lru_cache(maxsize=1)
def _pixels(path: Path) -> list[np.ndarray | None]:
    """Returns uint8[48, 48] of each row, None where a value is no byte; 83 MB for all of them."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        return [_face(row[1]) for row in reader]


def _face(pixels: str) -> np.ndarray | None:
    try:
        return np.array(pixels.split(), np.uint8).reshape(SIDE, SIDE)
    except (ValueError, OverflowError):
        return None
