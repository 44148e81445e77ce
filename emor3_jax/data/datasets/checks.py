"""Faults that are counted, logged or refused while a data set's folder is read."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from emor3_jax.data.errors import DataError

logger = logging.getLogger(__name__)

FAULTS = {
    "missing_file": "an image is named but not there; the row stays and is left out of batches",
    "unreadable": "not the file of an image; the row stays and is left out of batches",
    "outside": "an image's path is absolute or leaves the folder; it is not opened",
    "other_label": "folder or annotation name another emotion than the list; the list was taken",
}
"""What a few rows may have; more than `tolerated` of one kind means that the folder is wrong."""

NOTES = {
    "missing_annotation": "no annotation file; the row stays, without attributes",
    "other_case": "found under a name that differs in case only",
    "listed_twice": "named twice in the list; kept once",
    "not_a_picture": "a file among the images that is none, by extension and content; ignored",
    "bad_name": "a file whose name is no UTF-8; ignored, rename it to use it",
    "placeholder": "one of many files of equal bytes, a site's image for a removed one; left out",
    "not_downloaded": "listed with an address, but its file is not there; left out",
    "few_votes": "no more raters agree with the label than disagree; left out",
    "no_face": "most raters see no face or no known emotion; left out",
    "tie_dropped": "several labels share the largest share; left out",
    "tie": "several labels share the largest share; the first of them was taken",
    "no_share": "no label has a share, so the row has no label and is left out of batches",
    "duplicate": "the same bytes as another image of the split; both stay",
    "duplicate_other_label": "the same bytes as an image of another label; both stay",
    "duplicate_other_split": "the same bytes as an image of another split; both stay",
    "count": "another number of rows than published",
}
"""What is counted and logged, however often it occurs."""

_NAMED = 10


def tolerated(rows: int) -> int:
    """Returns how many rows of a data set may have a fault of one kind: 1 %, and 10 at least."""
    return max(10, rows // 100)


class Checks:
    """Faults found in a folder, by kind, each with the ids of the rows."""

    def __init__(self, name: str, root: Path) -> None:
        """Starts with nothing found.

        Args:
          name: of the data set.
          root: its folder.
        """
        self._name, self._root = name, root
        self._found: dict[str, list[str]] = {}

    def note(self, kind: str, what: str) -> None:
        """Counts one thing of a kind of `FAULTS` or `NOTES`."""
        assert kind in FAULTS or kind in NOTES, kind
        self._found.setdefault(kind, []).append(what)

    def refuse(self, why: str) -> DataError:
        """Returns the error that ends the reading of the folder."""
        return DataError(f"{self._name} in {self._root}: {why}")

    def finish(self, rows: int) -> None:
        """Refuses the folder if too many of its rows have a fault.

        Args:
          rows: of all splits.

        Raises:
          DataError: with the fault, its number and examples.
        """
        if not rows:
            raise self.refuse("it has no rows")
        for kind in FAULTS:
            found = self._found.get(kind, [])
            if len(found) > tolerated(rows):
                raise self.refuse(
                    f"{len(found)} of {rows} rows have the fault {kind!r} ({FAULTS[kind]}), more "
                    f"than the {tolerated(rows)} that are tolerated, such as "
                    f"{', '.join(found[:3])}; unpack all files again, or give the folder that "
                    "holds them"
                )

    def to_dict(self) -> dict[str, list[str]]:
        """Returns kind → what was found."""
        return dict(self._found)

    def save(self, path: Path) -> None:
        """Writes what was found as JSON."""
        path.write_text(json.dumps(self._found, indent=1, ensure_ascii=False) + "\n")


def log(name: str, found: dict[str, list[str]]) -> None:
    """Logs what was found in a folder, one line a kind with its number and examples."""
    for kind, what in found.items():
        text = FAULTS.get(kind) or NOTES[kind]
        logger.warning("%s: %d x %s (%s): %s", name, len(what), kind, text, shortened(what))


def shortened(names: Iterable[str], most: int = _NAMED) -> str:
    """Returns names joined by commas, with dots where there are more."""
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
