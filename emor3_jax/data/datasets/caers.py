"""CAER-S: about 70,000 frames of television in seven expressions (ICCV 2019).

Folders `{train,test}/<Class>/*.png`, classes Anger, Disgust, Fear, Happy, Neutral, Sad, Surprise.

Checked against public code: the folders. Not checked: the number of frames of each split.
"""

from pathlib import Path

from emor3_jax.data.datasets.base import Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import folders, split_folders
from emor3_jax.data.labels import LABEL_SETS


class CaerS(Builder):
    """CAER-S; one of its copies has a folder `val` beside the two."""

    LABELS = "fer7"
    QUESTION = "Which emotion does the person in this scene show?"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "CAER-S is downloaded by hand from its page, https://caer-dataset.github.io. Give the "
        "folder that holds train/<Class>/*.png and test/<Class>/*.png (CAER-S) as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        if not folders(root):
            raise checks.refuse(f"it has no folders. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        return split_folders(root, "", LABEL_SETS[cls.LABELS], checks)
