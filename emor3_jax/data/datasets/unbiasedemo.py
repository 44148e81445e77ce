"""UnbiasedEmo: 3,045 images of equal objects in six emotions (ECCV 2018, with WebEmo).

Folders `<emotion>/<object>/*.jpg`; the label is the first one. It was published without splits.

Checked against public code: the folders, and the six emotions. Not checked: the name of the folder
above them; `images`, if it is the only one, is entered.
"""

from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import class_folders, folders
from emor3_jax.data.labels import LABEL_SETS


class UnbiasedEmo(Builder):
    """UnbiasedEmo with its six labels."""

    LABELS = "parrott6"
    QUESTION = "Which of these emotions does this picture express best?"
    PUBLISHED = (("all", 3045),)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "UnbiasedEmo is downloaded by hand from its page, https://rpand002.github.io/emotion.html. "
        "Unpack it so that path holds <emotion>/<object>/*.jpg, and give that folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        where = "images" if folders(root) == ["images"] else ""
        return {WHOLE: class_folders(root, where, LABEL_SETS[cls.LABELS], checks)}
