"""What builders of data sets read a folder with: class folders, lists, csv and JSON files."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emor3_jax import files
from emor3_jax.data.datasets.base import Found
from emor3_jax.data.datasets.checks import Checks, shortened
from emor3_jax.data.files import is_hidden, is_image, leads_up
from emor3_jax.data.labels import find_label, normalize


class Folder:
    """The files below a folder; a name that differs in case only is found too."""

    def __init__(self, root: Path, checks: Checks) -> None:
        """Reads nothing yet.

        Args:
          root: the folder.
          checks: takes names that were found in another case.
        """
        self._root, self._checks = root, checks
        # Names of a folder, and the same by their lower case.
        self._lists: dict[str, tuple[set[str], dict[str, str]]] = {}

    def _names(self, folder: str) -> tuple[set[str], dict[str, str]]:
        if folder not in self._lists:
            path = self._root / folder
            there = sorted(os.listdir(path)) if os.path.isdir(path) else []
            there = [name for name in there if not is_hidden(name)]
            if not all(map(_is_text, there)):
                for name in there:
                    if not _is_text(name):
                        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
                        self._checks.note("bad_name", f"{folder}/{shown}" if folder else shown)
                there = list(filter(_is_text, there))
            self._lists[folder] = set(there), {name.lower(): name for name in there}
        return self._lists[folder]

    def find(self, file: str) -> str:
        """Returns a file of the root as it is written on disk, "" if there is none."""
        if files.leaves_folder(file):
            self._checks.note("outside", file)
            return ""
        folder, _, name = file.rpartition("/")
        exact, lowered = self._names(folder)
        if name in exact:
            return file
        if found := lowered.get(name.lower()):
            self._checks.note("other_case", file)
            return f"{folder}/{found}" if folder else found
        return ""

    def has_folder(self, folder: str) -> bool:
        """Looks for a folder below the root; returns True if it is there."""
        return (self._root / folder).is_dir()

    def images(self, folder: str, levels: int = 0) -> list[str]:
        """Returns the images of a folder, relative to the root, and notes other files.

        Args:
          folder: relative to the root.
          levels: how many levels of folders below it are searched too.
        """
        found = []
        for name in sorted(self._names(folder)[0]):
            path = f"{folder}/{name}" if folder else name
            if is_image(self._root / path):
                found.append(path)
            elif (self._root / path).is_dir():
                if levels and not leads_up(self._root / path):
                    found += self.images(path, levels - 1)
            else:
                self._checks.note("not_a_picture", path)
        return found


def _is_text(name: str) -> bool:
    """Recognises file names in UTF-8, the only ones that records can hold."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def folders(root: Path) -> list[str]:
    """Returns the names of the folders in a folder, hidden ones left out."""
    return sorted(p.name for p in root.iterdir() if not is_hidden(p.name) and p.is_dir())


def class_folders(
    root: Path,
    where: str,
    labels: Sequence[str],
    checks: Checks,
    numbers: Mapping[str, str] | None = None,
) -> list[Found]:
    """Reads `where/<label>/*` and `where/<label>/<object>/*`, whose label is the first folder.

    Args:
      root: the folder of the data set.
      where: folder below it; "" is the root itself.
      labels: the label set; folders may use any spelling of a label (`labels.SPELLINGS`).
      checks: takes what was noticed.
      numbers: further names of a label, such as its number, lower-cased → label.

    Raises:
      DataError: if there is a folder that is no label, or none for a label.
    """
    folder = Folder(root, checks)
    found: list[Found] = []
    seen: dict[str, str] = {}
    for name in folders(root / where):
        label = (numbers or {}).get(normalize(name)) or find_label(name, labels)
        path = f"{where}/{name}" if where else name
        if label is None:
            raise checks.refuse(
                f"the folder {path!r} is no label; labels are {', '.join(labels)}: move it away, "
                "or give the folder that holds the folders of the labels"
            )
        if label in seen:
            raise checks.refuse(f"the folders {seen[label]!r} and {path!r} are the same label")
        seen[label] = path
        for file in folder.images(path, levels=1):
            found.append(Found(file, label, file))
    if missing := [label for label in labels if label not in seen]:
        raise checks.refuse(
            f"no folder {(where + '/') if where else ''}<label> for {shortened(missing)}"
        )
    return found


SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Names of folders and files of a split, lower-cased → split."""


def split_folders(
    root: Path,
    where: str,
    labels: Sequence[str],
    checks: Checks,
    splits: Mapping[str, str] = SPLITS,
    numbers: Mapping[str, str] | None = None,
) -> dict[str, list[Found]]:
    """Reads `where/<split>/<label>/*`; the other arguments are those of `class_folders`.

    Raises:
      DataError: if a folder is no split, or two are the same one, or as `class_folders`.
    """
    found: dict[str, list[Found]] = {}
    for name in folders(root / where):
        split = splits.get(name.lower())
        if split is None or split in found:
            why = "no split" if split is None else f"the split {split} a second time"
            raise checks.refuse(f"the folder {name!r} is {why}; splits are {', '.join(splits)}")
        path = f"{where}/{name}" if where else name
        found[split] = class_folders(root, path, labels, checks, numbers)
    return found


def read_lines(path: Path, checks: Checks) -> list[str]:
    """Returns the lines of a text file, or raises `DataError` that names it."""
    return files.read_lines(path, checks.refuse)


def read_rows(path: Path, checks: Checks) -> Iterator[list[str]]:
    """Yields the rows of a csv file, stripped, or raises `DataError` that names it."""
    return files.read_rows(path, checks.refuse)


def read_csv(path: Path, checks: Checks) -> tuple[dict[str, int], list[list[str]]]:
    """Returns the columns of a csv file by their normalised names, and its rows, stripped.

    Raises:
      DataError: naming the file, if it has no header or a row has another number of fields.
    """
    rows = list(read_rows(path, checks))
    if not rows:
        raise checks.refuse(f"{path.name} is empty; download it again")
    columns = {normalize(name): number for number, name in enumerate(rows[0])}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise checks.refuse(
                f"row {number} of {path.name} has {len(row)} fields, its header {len(rows[0])}"
            )
    return columns, rows[1:]


def read_json(path: Path, checks: Checks) -> Any:
    """Returns a JSON file's contents, or raises `DataError` that names it."""
    return files.read_json(path, checks.refuse)


def is_count(text: str) -> bool:
    """Recognises whole numbers of 0 or more, of at most nine digits."""
    return text.isdecimal() and len(text) < 10


def once(found: Iterable[Found], split: str, checks: Checks) -> list[Found]:
    """Returns images without those named a second time, which are noted."""
    kept: dict[str, Found] = {}
    for each in found:
        if each.id in kept:
            checks.note("listed_twice", f"{split}/{each.id}")
        else:
            kept[each.id] = each
    return list(kept.values())
