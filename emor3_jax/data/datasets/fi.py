"""FI: about 23,000 Flickr and Instagram images in eight emotions (AAAI 2016).

Copies hold class folders, `<label>/*.jpg` or `<split>/<label>/*.jpg`. The original release holds
csv files without header, `emotion,address,raters who disagree,who agree`, and no images; an image
is then looked for by its name in the address. Its rows count if more raters agree than disagree.

Copies also hold the image that the sites show for a removed one: more than ten files of equal
bytes are left out.

Checked against public code: both folder layouts and the columns of the csv. Not checked: the names
of the csv files (any in the folder or in `agg` are read), and how many files are placeholders.
"""

from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import (
    SPLITS,
    Folder,
    class_folders,
    folders,
    is_count,
    once,
    read_rows,
    split_folders,
)
from emor3_jax.data.labels import LABEL_SETS, find_label

_PLACES = ("{label}/{name}", "images/{label}/{name}", "images/{name}", "imgs/{label}/{name}")


class Fi(Builder):
    """FI; copies circulate as class folders, with and without folders of splits above them."""

    LABELS = "mikels8"
    QUESTION = "Which emotion would someone who scrolls past this picture most likely feel?"
    PUBLISHED = (("all", 23_308),)
    PLACEHOLDER = 10
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "FI is asked for on the page of its authors, https://qzyou.github.io. Give the folder that "
        "holds <label>/*.jpg (emotion_dataset), or <split>/<label>/*.jpg with the splits train, "
        "val and test, or the csv files of votes with the images in <label>/<name in the address>, "
        "as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        labels, names = LABEL_SETS[cls.LABELS], folders(root)
        if votes := sorted((*root.glob("*.csv"), *root.glob("agg/*.csv"))):
            found = [each for path in votes for each in _votes(path, root, checks)]
            if not found:
                raise checks.refuse(
                    "none of the images that the csv files name is there; they are looked for in "
                    f"{', '.join(_PLACES)}"
                )
            return {WHOLE: once(found, WHOLE, checks)}
        if names and all(name.lower() in SPLITS for name in names):
            return split_folders(root, "", labels, checks)
        return {WHOLE: class_folders(root, "", labels, checks)}


def _votes(path: Path, root: Path, checks: Checks) -> list[Found]:
    """Reads one csv file of votes."""
    labels, folder, found = LABEL_SETS[Fi.LABELS], Folder(root, checks), []
    for number, fields in enumerate(read_rows(path, checks), start=1):
        label = find_label(fields[0], labels) if len(fields) == 4 else None
        if label is None or not all(map(is_count, fields[2:])):
            raise checks.refuse(
                f"line {number} of {path.name} is {','.join(fields)!r}, not an emotion of "
                f"{', '.join(labels)}, an address, and the raters who disagree and who agree"
            )
        name, against, agreeing = fields[1].rpartition("/")[2], int(fields[2]), int(fields[3])
        row_id = f"{label}/{name}"
        spelt = (fields[0], label)
        places = (place.format(label=each, name=name) for each in spelt for place in _PLACES)
        if agreeing <= against:
            checks.note("few_votes", row_id)
        elif file := next((there for place in places if (there := folder.find(place))), ""):
            values = (("agree", float(agreeing)), ("disagree", float(against)))
            found.append(Found(row_id, label, file, values=values))
        else:
            checks.note("not_downloaded", row_id)
    return found
