"""Emotion6: 1,980 images found by six search words, with the shares of raters (CVPR 2015).

The folder of an image is the word that it was searched by, not its label. The label is the arg-max
over the six emotions; neutral, the seventh column, is passed over, however large it is. Of emotions
with equal shares the first in the order of the file is the label; ties are counted. An image whose
six shares are all 0 has no label: it is counted and left out of batches. The shares of the six
become the row's `distribution`, so `graded=True` gives a tied answer its full worth.
"""

import math
from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Folder, Found, once
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.labels import LABEL_SETS

_LABELS = LABEL_SETS["emotion6"]
_FILE = "ground_truth.txt"
# file, valence, arousal, the six, neutral
_COLUMNS = 3 + len(_LABELS) + 1


class Emotion6(Builder):
    """Emotion6; published without splits."""

    LABELS = "emotion6"
    QUESTION = "Which emotion does this picture call up in most of its viewers?"
    PUBLISHED = (("all", 1980),)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Emotion6 is asked for by the form on its page, "
        "http://chenlab.ece.cornell.edu/downloads.html. Unpack it so that path holds "
        "ground_truth.txt and images/<keyword>/<number>.jpg, and give that folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        path = root / _FILE
        if not path.is_file():
            raise checks.refuse(f"no {_FILE}. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        _check_header(lines[0] if lines else "", checks)
        folder = Folder(root, checks)
        found = []
        for number, line in enumerate(lines[1:], start=2):
            if line.strip():
                found.append(_row(line, number, folder, checks))
        return {WHOLE: once(found, WHOLE, checks)}


def _check_header(line: str, checks: Checks) -> None:
    """Refuses another order of the emotions, where the header names them."""
    names = [name.strip().lower() for name in line.replace("[", " ").replace("]", " ").split()]
    order = [name for name in names if name in _LABELS]
    if len(order) == len(_LABELS) and tuple(order) != _LABELS:
        raise checks.refuse(
            f"the header of {_FILE} orders the emotions {', '.join(order)}; Emotion6's order is "
            f"{', '.join(_LABELS)}"
        )


def _row(line: str, number: int, folder: Folder, checks: Checks) -> Found:
    fields = line.split()
    try:
        values = [float(field) for field in fields[1:]]
    except ValueError:
        values = []
    shares = tuple(values[2 : 2 + len(_LABELS)])
    if len(fields) != _COLUMNS or len(values) != _COLUMNS - 1 or not _usable(shares):
        raise checks.refuse(
            f"line {number} of {_FILE} is {line!r}, not a file and {_COLUMNS - 1} numbers "
            "(valence, arousal, and shares of 0 or more of anger, disgust, fear, joy, sadness, "
            "surprise, neutral)"
        )
    name = fields[0].replace("\\", "/")
    row_id = name.removeprefix("images/")
    label = label_of(shares, _LABELS, row_id, checks)
    return Found(row_id, label, folder.find(f"images/{row_id}"), shares)


def _usable(shares: tuple[float, ...]) -> bool:
    return all(math.isfinite(share) and share >= 0 for share in shares)


def label_of(
    shares: tuple[float, ...], labels: tuple[str, ...], row_id: str, checks: Checks
) -> str:
    """Returns the label of the largest share, the first one of equals; "" if all are 0.

    Args:
      shares: of each label, 0 or more.
      labels: in the order of the shares.
      row_id: names the row where a tie is noted.
      checks: takes ties and rows without a share.
    """
    most = max(shares)
    if not most:
        checks.note("no_share", row_id)
        return ""
    if shares.count(most) > 1:
        checks.note("tie", row_id)
    return labels[shares.index(most)]
