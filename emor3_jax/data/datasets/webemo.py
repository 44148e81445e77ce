"""WebEmo: about 268,000 images found by search words, 25 labels in groups (ECCV 2018).

`labels="webemo6"` or `"polarity2"` chooses a coarser level (`data/labels.py` has the map). Two of
its folders are spelt `cheerfullness` and `irritabilty`; the labels of a policy are spelt right.
"""

from pathlib import Path

from emor3_jax.data.datasets.base import Builder, Found, class_folders, folders
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.labels import LABEL_SETS

_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_ALIASES = {
    "cheerfullness": "cheerfulness",
    "irritabilty": "irritability",
}


class Webemo(Builder):
    """WebEmo with its 25 labels."""

    LABELS = "webemo25"
    QUESTION = "Which of these emotions does this picture express best?"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "WebEmo is downloaded by hand from its page, https://rpand002.github.io/emotion.html. "
        "Unpack it so that path holds <split>/<label>/*.jpg with the splits train, test and, if "
        "there is one, val, and 25 label folders in each; give that folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        splits = {}
        for name in folders(root):
            if name.lower() not in _SPLITS:
                raise checks.refuse(
                    f"the folder {name!r} is no split ({', '.join(_SPLITS)}). "
                    f"{cls.MANUAL_DOWNLOAD_INSTRUCTIONS}"
                )
            labels = LABEL_SETS[cls.LABELS]
            splits[_SPLITS[name.lower()]] = class_folders(root, name, labels, _ALIASES, checks)
        if not splits:
            raise checks.refuse(f"it has no folders. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        return splits
