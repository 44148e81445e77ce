"""ArtPhoto: 806 artistic photographs in eight emotions (ACM Multimedia 2010).

Checked against public code: the names of the files, and the counts by label.
"""

from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder
from emor3_jax.data.labels import LABEL_SETS, find_label


class Artphoto(Builder):
    """ArtPhoto: the label is the part of the file's name before its last underscore."""

    LABELS = "mikels8"
    QUESTION = "Which emotion did the photographer want this picture to call up?"
    PUBLISHED = (("all", 806),)
    LABEL_COUNTS = (
        ("amusement", 101),
        ("anger", 77),
        ("awe", 102),
        ("contentment", 70),
        ("disgust", 70),
        ("excitement", 105),
        ("fear", 115),
        ("sadness", 166),
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "ArtPhoto is downloaded by hand from its page, https://www.imageemotion.org. Unpack it "
        "so that path holds <label>_<number>.jpg (the folder testImages_artphoto), and give that "
        "folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        labels = LABEL_SETS[cls.LABELS]
        found = []
        for file in Folder(root, checks).images(""):
            label = find_label(Path(file).stem.rpartition("_")[0], labels)
            if label is None:
                raise checks.refuse(
                    f"the file {file!r} is not <label>_<number> with a label of "
                    f"{', '.join(labels)}: move it away"
                )
            found.append(Found(file, label, file))
        if not found:
            raise checks.refuse(f"it has no images. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        if missing := sorted(set(labels) - {each.label for each in found}):
            raise checks.refuse(f"no image of {', '.join(missing)}; unpack all files again")
        return {WHOLE: found}
