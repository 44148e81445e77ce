"""Emotion6: 1,980 images found by six search words, with the shares of raters (CVPR 2015).

Three rules for its label are in use; `label` of the config chooses:

* `"six"` (default): the largest share of the six emotions; neutral, the seventh column, is passed
  over, however large it is. Of equal shares the first in the order of the file is the label; ties
  are counted. An image whose six shares are all 0 has no label: it is counted and left out of
  batches.
* `"seven"`: likewise with neutral as a seventh label.
* `"keyword"`: the folder of the image, the word that it was searched by, as most public code does.

Under each the shares are the row's `distribution`, so `graded=True` gives a tied answer its full
worth, and valence, arousal (1 to 9) and neutral's share (0 to 1) are its `values`.

It was published without splits. Its test split is 594 of the 1,980 images, 30 % of each keyword, as
in EmotionROI, which is made of it; which 594 is this project's choice, by a hash of the ids.

Checked against public code: columns and folders, and that the rules are in use.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from emor3_jax.data.datasets.base import WHOLE, Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder, once, read_lines
from emor3_jax.data.datasets.votes import label_of
from emor3_jax.data.labels import LABEL_SETS, find_label, normalize

_FILE = "ground_truth.txt"
_NAMES = LABEL_SETS["emotion7"]
_TEST_SHARE = 0.3
# file, valence, arousal, the six, neutral
_COLUMNS = 3 + len(_NAMES)


class Emotion6(Builder):
    """Emotion6, labelled by the largest of six shares."""

    LABELS = "emotion6"
    QUESTION = "Which emotion does this picture call up in most of its viewers?"
    PUBLISHED = (("all", 1980),)
    BY_KEYWORD = False
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
        lines = read_lines(path, checks)
        _check_header(lines[0] if lines else "", checks)
        folder = Folder(root, checks)
        found = []
        for number, line in enumerate(lines[1:], start=2):
            if line.strip():
                found.append(cls._row(line, number, folder, checks))
        return {WHOLE: once(found, WHOLE, checks)}

    @classmethod
    def own_test(cls, ids: Sequence[str]) -> set[str]:
        """Returns the ids of the test split: 30 % of each keyword, those of the lowest hash."""
        by_keyword = defaultdict(list)
        for row_id in ids:
            by_keyword[row_id.partition("/")[0]].append(row_id)
        test: set[str] = set()
        for rows in by_keyword.values():
            rows.sort(key=lambda row_id: (zlib.crc32(row_id.encode()), row_id))
            test.update(rows[: round(_TEST_SHARE * len(rows))])
        return test

    @classmethod
    def _row(cls, line: str, number: int, folder: Folder, checks: Checks) -> Found:
        fields = line.split()
        try:
            values = [float(field) for field in fields[1:]]
        except ValueError:
            values = []
        shares = dict(zip(_NAMES, values[2:], strict=False))
        usable = all(map(math.isfinite, values)) and all(share >= 0 for share in shares.values())
        if len(fields) != _COLUMNS or len(values) != _COLUMNS - 1 or not usable:
            raise checks.refuse(
                f"line {number} of {_FILE} is {line!r}, not a file and {_COLUMNS - 1} numbers "
                "(valence, arousal, and shares of 0 or more of anger, disgust, fear, joy, sadness, "
                "surprise, neutral)"
            )
        row_id = fields[0].replace("\\", "/").removeprefix("images/")
        labels = LABEL_SETS[cls.LABELS]
        own = {label: shares[label] for label in labels}
        if cls.BY_KEYWORD:
            label = find_label(row_id.partition("/")[0], labels)
            if label is None:
                raise checks.refuse(
                    f"line {number} of {_FILE}: the folder of {row_id!r} is none of the keywords "
                    f"{', '.join(labels)}"
                )
        else:
            label = label_of(own, row_id, checks)
        return Found(
            row_id,
            label,
            folder.find(f"images/{row_id}"),
            tuple(own.values()),
            values=(
                ("valence", values[0]),
                ("arousal", values[1]),
                ("neutral", shares["neutral"]),
            ),
        )


class Emotion6Seven(Emotion6):
    """Emotion6, labelled by the largest of seven shares."""

    LABELS = "emotion7"


class Emotion6Keyword(Emotion6):
    """Emotion6, labelled by the word that an image was searched by."""

    BY_KEYWORD = True


def _check_header(line: str, checks: Checks) -> None:
    """Refuses another order of the emotions, where the header names them."""
    names = [normalize(name) for name in line.replace("[", " ").replace("]", " ").split()]
    labels = LABEL_SETS["emotion6"]
    order = [name for name in names if name in labels]
    if len(order) == len(labels) and tuple(order) != labels:
        raise checks.refuse(
            f"the header of {_FILE} orders the emotions {', '.join(order)}; Emotion6's order is "
            f"{', '.join(labels)}"
        )
