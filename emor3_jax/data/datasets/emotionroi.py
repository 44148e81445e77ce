"""EmotionROI: Emotion6's 1,980 images with the regions that evoke the emotion (CVPR 2016).

`images/<emotion>/*.jpg`, of which the lists `training.txt` and `testing.txt` name 1,386 and 594 as
`<emotion>/<file>`. The label is the folder. The regions are not read.

Checked against public code: folders and lists, in `training_testing_split` and beside `images`.
"""

from pathlib import Path

from emor3_jax.data.datasets.base import Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder, once, read_lines
from emor3_jax.data.labels import LABEL_SETS, find_label

_LISTS = {"train": "training.txt", "test": "testing.txt"}


class EmotionRoi(Builder):
    """EmotionROI with its two lists."""

    LABELS = "emotion6"
    QUESTION = "Which emotion does this picture call up in most of its viewers?"
    PUBLISHED = (("train", 1386), ("test", 594))
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "EmotionROI is asked for by the form on its page, "
        "http://chenlab.ece.cornell.edu/downloads.html. Unpack it so that path holds "
        "images/<emotion>/*.jpg and training_testing_split/training.txt and testing.txt, and give "
        "that folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        folder, splits = Folder(root, checks), {}
        for split, name in _LISTS.items():
            places = (root / "training_testing_split" / name, root / name)
            path = next((place for place in places if place.is_file()), None)
            if path is None:
                raise checks.refuse(f"no {name}. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
            found = []
            for number, line in enumerate(read_lines(path, checks), start=1):
                if row_id := line.strip().replace("\\", "/").removeprefix("images/"):
                    label = find_label(row_id.partition("/")[0], LABEL_SETS[cls.LABELS])
                    if label is None or "/" not in row_id:
                        raise checks.refuse(
                            f"line {number} of {name} is {line!r}, not <emotion>/<file> with an "
                            f"emotion of {', '.join(LABEL_SETS[cls.LABELS])}"
                        )
                    found.append(Found(row_id, label, folder.find(f"images/{row_id}")))
            splits[split] = once(found, split, checks)
        return splits
