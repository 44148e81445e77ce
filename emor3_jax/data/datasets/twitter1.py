"""Twitter I: 1,269 images of tweets, positive or negative by five raters (AAAI 2015).

Images in `Agg_AMT_Candidates`. `label` of the config says how many of the five raters must agree:
`"three"` (default, 1,269 images), `"four"` (1,116) or `"five"` (882). Read from the lists
`twitter_three_agrees.txt` (or `three_agree.txt`, and so on), lines of a file and 1 for positive or
0 for negative; without them from `amt_result.csv`, whose votes become the row's `distribution`.

Checked against public code: folder and lists. Not checked: the names of the columns of
`amt_result.csv`; one must begin with positive and one with negative (or pos and neg), since their
order could not be told.
"""

from collections.abc import Iterator
from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder, is_count, once, read_csv, read_lines

_CSV = "amt_result.csv"
_IMAGES = ("Agg_AMT_Candidates", "images")
_NUMBERS = {"three": 3, "four": 4, "five": 5}
_LABELS = {"0": "negative", "1": "positive"}


class Twitter1(Builder):
    """Twitter I, where at least three raters agree."""

    LABELS = "polarity2"
    QUESTION = "Is the sentiment of this picture positive or negative?"
    PUBLISHED = (("all", 1269),)
    AGREE = "three"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Twitter I is asked for on the page of its authors, https://qzyou.github.io. Give the "
        "folder that holds Agg_AMT_Candidates/*.jpg and twitter_three_agrees.txt (four, five) or "
        "amt_result.csv as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        names = (f"twitter_{cls.AGREE}_agrees.txt", f"{cls.AGREE}_agree.txt")
        path = next((root / name for name in names if (root / name).is_file()), None)
        if path is not None:
            rows = _listed(path, checks)
        elif (root / _CSV).is_file():
            rows = _voted(root / _CSV, _NUMBERS[cls.AGREE], checks)
        else:
            raise checks.refuse(f"no {names[0]} nor {_CSV}. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        folder, found = Folder(root, checks), []
        for name, label, shares in rows:
            places = (f"{where}/{name}" for where in _IMAGES)
            file = next((there for place in places if (there := folder.find(place))), "")
            found.append(Found(name, label, file, shares))
        return {WHOLE: once(found, WHOLE, checks)}


class Twitter1Four(Twitter1):
    """Twitter I, where at least four raters agree."""

    PUBLISHED = (("all", 1116),)
    AGREE = "four"


class Twitter1Five(Twitter1):
    """Twitter I, where all five raters agree."""

    PUBLISHED = (("all", 882),)
    AGREE = "five"


_Rated = tuple[str, str, tuple[float, ...]]


def _listed(path: Path, checks: Checks) -> Iterator[_Rated]:
    for number, line in enumerate(read_lines(path, checks), start=1):
        if line.strip():
            name, _, label = line.strip().rpartition(" ")
            if not name or label not in _LABELS:
                raise checks.refuse(
                    f"line {number} of {path.name} is {line!r}, not a file and 0 or 1"
                )
            yield name.strip(), _LABELS[label], ()


def _voted(path: Path, agree: int, checks: Checks) -> Iterator[_Rated]:
    columns, rows = read_csv(path, checks)
    at = {}
    for label in _LABELS.values():
        named = [number for name, number in columns.items() if name.startswith(label[:3])]
        if len(named) != 1:
            raise checks.refuse(
                f"the header of {path.name} is {', '.join(columns)}; one column must begin with "
                f"{label} or {label[:3]}. Name them so, or give the lists of agreeing raters"
            )
        at[label] = named[0]
    for number, row in enumerate(rows, start=2):
        if not all(is_count(row[i]) for i in at.values()):
            raise checks.refuse(f"row {number} of {path.name} is {','.join(row)!r}: no votes")
        votes = {label: float(row[i]) for label, i in at.items()}
        label = max(votes, key=votes.__getitem__)
        if votes[label] < agree:
            checks.note("few_votes", row[0])
        else:
            yield row[0], label, tuple(votes.values())
