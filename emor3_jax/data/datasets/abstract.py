"""Abstract: 280 abstract paintings with the votes of viewers for eight emotions (ACM MM 2010).

The label is the emotion with most votes, and the votes are the row's `distribution`. Paintings
whose most votes are shared by several emotions are left out, as the field does: 229 are left. With
`label="first"` they stay, and the first of these emotions in the order of the file is the label.

Checked against public code: the csv with quotes around names and header, and the 229.
"""

from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder, is_count, once, read_rows
from emor3_jax.data.datasets.votes import label_of
from emor3_jax.data.labels import LABEL_SETS, find_label, normalize

_FILE = "ABSTRACT_groundTruth.csv"


class Abstract(Builder):
    """Abstract paintings; columns are read by their names, so their order does not matter."""

    LABELS = "mikels8"
    QUESTION = "Which emotion do most viewers of this abstract painting feel?"
    PUBLISHED = (("all", 229),)
    KEEP_TIES = False
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
        rows = [[x.strip("'") for x in row] for row in read_rows(path, checks)]
        header = [normalize(name) for name in rows[0]] if rows else []
        names = [find_label(name, labels) or name for name in header[1:]]
        if sorted(names) != sorted(labels):
            raise checks.refuse(
                f"the header of {_FILE} is {', '.join(header)}; after the file it must name "
                f"{', '.join(labels)}, in any order"
            )
        folder = Folder(root, checks)
        found = []
        for number, row in enumerate(rows[1:], start=2):
            if len(row) != len(header) or not all(map(is_count, row[1:])):
                raise checks.refuse(
                    f"line {number} of {_FILE} is {','.join(row)!r}, not a file and "
                    f"{len(labels)} numbers of votes"
                )
            votes = dict(zip(names, map(float, row[1:]), strict=True))
            # Ties go by the order of the file, not by that of the label set.
            label = label_of(votes, row[0], checks, keep_ties=cls.KEEP_TIES)
            if label is not None:
                shares = tuple(votes[name] for name in labels)
                found.append(Found(row[0], label, folder.find(row[0]), shares))
        return {WHOLE: once(found, WHOLE, checks)}


class AbstractFirst(Abstract):
    """All 280 paintings; of tied emotions the first in the file is the label."""

    PUBLISHED = (("all", 280),)
    KEEP_TIES = True
