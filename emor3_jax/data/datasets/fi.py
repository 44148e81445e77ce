"""FI: about 23,000 Flickr and Instagram images in eight emotions (AAAI 2016)."""

from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Found, class_folders, folders
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.labels import LABEL_SETS

_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
ALIASES = {"content": "contentment", "sad": "sadness"}
"""Spellings of Mikels' labels in the older data sets."""


class Fi(Builder):
    """FI; copies circulate as class folders, with and without folders of splits above them."""

    LABELS = "mikels8"
    QUESTION = "Which emotion would someone who scrolls past this picture most likely feel?"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "FI is asked for on the page of its authors, https://qzyou.github.io. Put the images "
        "into <label>/*.jpg, or into <split>/<label>/*.jpg with the splits train, val and test, "
        "below a folder, and give that folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        labels, names = LABEL_SETS[cls.LABELS], folders(root)
        if names and all(name.lower() in _SPLITS for name in names):
            return {
                _SPLITS[name.lower()]: class_folders(root, name, labels, ALIASES, checks)
                for name in names
            }
        return {WHOLE: class_folders(root, "", labels, ALIASES, checks)}
