"""FER+: FER-2013's faces with the votes of ten raters for eight emotions (ICMI 2016).

`fer2013new.csv` holds Usage, Image name and ten columns of votes: neutral, happiness, surprise,
sadness, anger, disgust, fear, contempt, unknown and NF (no face). Its rows are those of Kaggle's
`fer2013.csv` or `icml_face_data.csv`, which lies beside it and holds the faces; without that, the
images `FER2013{Train,Valid,Test}/<Image name>` are read.

The label is the column with most votes, the first of equals, which are counted. A row of which
unknown or NF has most, or that has no image name, is left out. The votes for the eight emotions are
its `distribution`.

Checked against public code: columns, order of the rows and folders. The authors' own rule (a
majority of votes, single votes struck out) leaves other rows out.
"""

from pathlib import Path

from emor3_jax.data.datasets.base import Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.fer2013 import USAGE, face_png, find_csv, read_faces
from emor3_jax.data.datasets.folders import Folder, is_count, read_csv
from emor3_jax.data.datasets.votes import label_of
from emor3_jax.data.labels import LABEL_SETS

_FILE = "fer2013new.csv"
_FOLDERS = {"train": "FER2013Train", "validation": "FER2013Valid", "test": "FER2013Test"}
_NO_EMOTION = ("unknown", "nf")
_INSTRUCTIONS = (
    "FER+ is downloaded by hand from https://github.com/microsoft/FERPlus (fer2013new.csv). Put it "
    "beside Kaggle's fer2013.csv, or beside the folders FER2013Train, FER2013Valid and "
    "FER2013Test, and give that folder as path."
)


class FerPlusCsv(Builder):
    """FER+ beside Kaggle's csv."""

    LABELS = "ferplus8"
    QUESTION = "Which emotion does this face show?"
    IMAGES_IN_FILES = False
    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTRUCTIONS

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        labels, names = LABEL_SETS[cls.LABELS], (*LABEL_SETS[cls.LABELS], *_NO_EMOTION)
        if not (root / _FILE).is_file():
            raise checks.refuse(f"no {_FILE}. {_INSTRUCTIONS}")
        columns, rows = read_csv(root / _FILE, checks)
        if missing := [name for name in ("usage", "image name", *names) if name not in columns]:
            raise checks.refuse(f"{_FILE} has no column {', '.join(missing)}")
        ids = cls._ids(root, len(rows), [row[columns["usage"]] for row in rows], checks)
        folder = Folder(root, checks)
        splits: dict[str, list[Found]] = {split: [] for split in _FOLDERS}
        for number, row in enumerate(rows, start=2):
            usage, name = row[columns["usage"]], row[columns["image name"]]
            counts = [row[columns[each]] for each in names]
            if usage not in USAGE or not all(map(is_count, counts)):
                raise checks.refuse(
                    f"row {number} of {_FILE} is {','.join(row)!r}: Usage must be one of "
                    f"{', '.join(USAGE)}, and the votes numbers"
                )
            row_id = ids[number - 2] if ids else name
            votes = dict(zip(names, map(float, counts), strict=True))
            label = label_of(votes, row_id, checks)
            if not name or label in _NO_EMOTION:
                checks.note("no_face", row_id or f"{_FILE}:{number}")
                continue
            split = USAGE[usage]
            file = "" if ids else folder.find(f"{_FOLDERS[split]}/{name}")
            shares = tuple(votes[each] for each in labels)
            splits[split].append(Found(row_id, label or "", file, shares))
        return splits

    @classmethod
    def _ids(cls, root: Path, count: int, usages: list[str], checks: Checks) -> list[str]:
        """Returns the id of each row's face, [] where faces are files."""
        path = find_csv(root)
        if path is None:
            raise checks.refuse(f"no fer2013.csv. {_INSTRUCTIONS}")
        lines = [(line, usage) for line, (_, _, usage) in read_faces(path, checks)]
        if [usage for _, usage in lines] != usages:
            raise checks.refuse(
                f"{_FILE} has {count} rows and {path.name} {len(lines)}, and their Usage must be "
                "the same row by row; take both as they were downloaded"
            )
        return [f"{path.name}:{line}" for line, _ in lines]

    def image(self, root: Path, found: Found) -> bytes | None:
        return face_png(root, found.id)


class FerPlusFolders(FerPlusCsv):
    """FER+ beside folders of images."""

    IMAGES_IN_FILES = True

    @classmethod
    def _ids(cls, root: Path, count: int, usages: list[str], checks: Checks) -> list[str]:
        return []

    def image(self, root: Path, found: Found) -> bytes | None:
        return Builder.image(self, root, found)
