"""RAF-DB, basic emotions: 15,339 faces in seven expressions (CVPR 2017).

`EmoLabel/list_patition_label.txt` (so spelt) holds lines `train_00001.jpg 5`; the split is the
name's beginning, and 1 to 7 are surprise, fear, disgust, happiness, sadness, anger and neutral.
Images are the aligned faces of `Image/aligned`, or where they are not there those of
`Image/original`. Without the list, folders `{train,test}/<1 to 7>`, as on Kaggle, are read.

Checked against public code: list, numbers and folders. Not checked: the counts by label, which are
logged if they differ.
"""

from pathlib import Path, PurePosixPath

from emor3_jax.data.datasets.base import Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder, folders, once, read_lines, split_folders
from emor3_jax.data.labels import LABEL_SETS

_LISTS = ("EmoLabel/list_patition_label.txt", "EmoLabel/list_partition_label.txt")
_NUMBERS = {
    "1": "surprise",
    "2": "fear",
    "3": "disgust",
    "4": "happiness",
    "5": "sadness",
    "6": "anger",
    "7": "neutral",
}


class RafDb(Builder):
    """RAF-DB's basic part."""

    LABELS = "fer7"
    QUESTION = "Which emotion does this face show?"
    PUBLISHED = (("train", 12_271), ("test", 3068))
    LABEL_COUNTS = (
        ("surprise", 1619),
        ("fear", 355),
        ("disgust", 877),
        ("happiness", 5957),
        ("sadness", 2460),
        ("anger", 867),
        ("neutral", 3204),
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "RAF-DB is asked for on its page, http://www.whdeng.cn/raf/model1.html. Unpack its basic "
        "part so that path holds EmoLabel/list_patition_label.txt and Image/aligned/*.jpg, and "
        "give that folder (basic) as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        below = "basic/" if (root / "basic").is_dir() else ""
        path = next(
            (root / below / name for name in _LISTS if (root / below / name).is_file()), None
        )
        if path is None:
            where = "DATASET" if folders(root) == ["DATASET"] else ""
            if not folders(root / where) or folders(root / where)[0].lower() not in (
                "test",
                "train",
            ):
                raise checks.refuse(f"no {_LISTS[0]}. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
            return split_folders(root, where, LABEL_SETS[cls.LABELS], checks, numbers=_NUMBERS)
        folder = Folder(root, checks)
        splits: dict[str, list[Found]] = {"train": [], "test": []}
        for number, line in enumerate(read_lines(path, checks), start=1):
            if not line.strip():
                continue
            # Some copies have the split between them.
            name, label = line.split()[0], line.split()[-1]
            split = name.partition("_")[0]
            if split not in splits or label not in _NUMBERS:
                raise checks.refuse(
                    f"line {number} of {path.name} is {line!r}, not train_… or test_… and a number "
                    "of 1 to 7"
                )
            stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
            aligned = folder.find(f"{below}Image/aligned/{stem}_aligned{suffix}")
            file = aligned or folder.find(f"{below}Image/original/{name}")
            splits[split].append(Found(name, _NUMBERS[label], file))
        return {split: once(found, split, checks) for split, found in splits.items()}
