"""Abstract: 280 abstract paintings with the votes of viewers for eight emotions (ACM MM 2010).

The label is the emotion with most votes, the first in the order of the file where several have as
many; the votes are the row's `distribution`. Ties are common here and are counted.
"""

import csv
from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Folder, Found, once
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.emotion6 import label_of
from emor3_jax.data.datasets.fi import ALIASES
from emor3_jax.data.labels import LABEL_SETS, normalize

_FILE = "ABSTRACT_groundTruth.csv"


class Abstract(Builder):
    """Abstract paintings; columns are read by their names, so their order does not matter."""

    LABELS = "mikels8"
    QUESTION = "Which emotion do most viewers of this abstract painting feel?"
    PUBLISHED = (("all", 280),)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Abstract is downloaded by hand from its page, https://www.imageemotion.org. Unpack it so "
        f"that path holds {_FILE} and abstract_<number>.jpg (the folder testImages_abstract), and "
        "give that folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        labels = LABEL_SETS[cls.LABELS]
        path = root / _FILE
        if not path.is_file():
            raise checks.refuse(f"no {_FILE}. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[x.strip().strip("'") for x in row] for row in csv.reader(file) if row]
        header = [normalize(name) for name in rows[0]] if rows else []
        names = [ALIASES.get(name, name) for name in header[1:]]
        if sorted(names) != sorted(labels):
            raise checks.refuse(
                f"the header of {_FILE} is {', '.join(header)}; after the file it must name "
                f"{', '.join(labels)}, in any order"
            )
        at = [1 + names.index(label) for label in labels]
        folder = Folder(root, checks)
        found = []
        for number, row in enumerate(rows[1:], start=2):
            votes = tuple(float(row[i]) for i in at) if _is_row(row, len(header)) else ()
            if not votes:
                raise checks.refuse(
                    f"line {number} of {_FILE} is {','.join(row)!r}, not a file and "
                    f"{len(labels)} numbers of votes"
                )
            # Ties go by the order of the file, not by that of the label set.
            order = sorted(range(len(labels)), key=lambda i: at[i])
            by_file = tuple(votes[i] for i in order)
            label = label_of(by_file, tuple(labels[i] for i in order), row[0], checks)
            found.append(Found(row[0], label, folder.find(row[0]), votes))
        return {WHOLE: once(found, WHOLE, checks)}


def _is_row(row: list[str], columns: int) -> bool:
    return len(row) == columns and all(x.isdecimal() for x in row[1:])
