"""Flickr_LDL and Twitter_LDL: images with the votes of viewers for eight emotions (AAAI 2017).

`images/*.jpg`, and votes in `train_ground_truth.txt` and `test_ground_truth.txt`, or all in
`ground_truth.txt`: a header `images-name Amusement Awe …` and lines of a file and eight numbers.
The votes are the row's `distribution`; the label has most of them, the first of equals in the file.

Checked against public code: header, lines and folder, in both forms of lists. Copies of Flickr_LDL
have 11,150 rows (10,700 in part of the literature); another number is logged.
"""

import math
from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder, once, read_lines
from emor3_jax.data.datasets.votes import label_of
from emor3_jax.data.labels import LABEL_SETS, find_label

_LABELS = LABEL_SETS["mikels8"]
_LISTS = {
    "train_ground_truth.txt": "train",
    "test_ground_truth.txt": "test",
    "ground_truth.txt": WHOLE,
}


class FlickrLdl(Builder):
    """Flickr_LDL; columns are read by their names."""

    LABELS = "mikels8"
    QUESTION = "Which emotion do most viewers of this picture feel?"
    PUBLISHED = (("all", 11_150),)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Flickr_LDL and Twitter_LDL are asked for by the form at "
        "http://47.105.62.179:8081/sentiment/index.html. Unpack one so that path holds "
        "images/*.jpg and train_ground_truth.txt and test_ground_truth.txt, or ground_truth.txt, "
        "and give that folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        there = {name: split for name, split in _LISTS.items() if (root / name).is_file()}
        # Where the two parts are listed, the list of both is not needed.
        if len(there) > 1:
            there.pop("ground_truth.txt", None)
        if not there:
            raise checks.refuse(f"no ground_truth.txt. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        return {split: _votes(root / name, split, root, checks) for name, split in there.items()}


class TwitterLdl(FlickrLdl):
    """Twitter_LDL; columns are read by their names."""

    PUBLISHED = (("all", 10_045),)


def _votes(path: Path, split: str, root: Path, checks: Checks) -> list[Found]:
    lines = read_lines(path, checks)
    header = lines[0].split() if lines else []
    names = [find_label(name, _LABELS) or name for name in header[1:]]
    if sorted(names) != sorted(_LABELS):
        raise checks.refuse(
            f"the header of {path.name} is {' '.join(header)!r}; after the image's name it must "
            f"name {', '.join(_LABELS)}, in any order"
        )
    folder, found = Folder(root, checks), []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        name, *fields = line.split()
        try:
            counts = [float(field) for field in fields]
        except ValueError:
            counts = []
        usable = all(math.isfinite(count) and count >= 0 for count in counts)
        if len(counts) != len(names) or not usable:
            raise checks.refuse(
                f"line {number} of {path.name} is {line!r}, not a file and {len(names)} votes of 0 "
                "or more"
            )
        votes = dict(zip(names, counts, strict=True))
        label = label_of(votes, name, checks) or ""
        row_id = name.removeprefix("images/")
        shares = tuple(votes[each] for each in _LABELS)
        found.append(Found(row_id, label, folder.find(f"images/{row_id}"), shares))
    return once(found, split, checks)
