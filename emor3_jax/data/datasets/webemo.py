"""WebEmo: about 268,000 stock photographs found by search words, 25 labels in groups (ECCV 2018).

The download holds no images but their addresses, `train25.txt` and `test25.txt`, lines of an
address and the number of a label in alphabetical order. Their images are looked for where public
downloaders put them. Without the lists, folders `<split>/<label>`, by number or by name, are read.

`labels="webemo7"` or `"polarity2"` chooses a coarser level (`data/labels.py` has the map). Two of
its labels are spelt `cheerfullness` and `irritabilty`; the labels of a policy are spelt right.

Checked against public code: both lists and what three downloaders write. Not checked: the exact
form of `category.txt`, of which only the order of the names is read.
"""

import re
from pathlib import Path

from emor3_jax.data.datasets.base import Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import SPLITS, Folder, folders, read_lines, split_folders
from emor3_jax.data.labels import LABEL_SETS, find_label

_LABELS = LABEL_SETS["webemo25"]
_LISTS = {"train": ("train25.txt", 213_952), "test": ("test25.txt", 53_489)}
_NUMBERS = {str(number): label for number, label in enumerate(_LABELS)}
_FOLDERS = {**SPLITS, "train25": "train", "test25": "test"}
# Where downloaders put the image of an address: by number, by number before the name, or flat.
_PLACES = (
    "{split}/{number}/{name}",
    "images/{split}25/{number}/{name}",
    "images/{split}/{number}/{name}",
    "images/{split}/{number}_{name}",
    "{split}/{name}",
    "images/{split}/{name}",
    "images/{name}",
)


class Webemo(Builder):
    """WebEmo with its 25 labels."""

    LABELS = "webemo25"
    QUESTION = "Which of these emotions does this picture express best?"
    PUBLISHED = tuple((split, count) for split, (_, count) in _LISTS.items())
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "WebEmo is downloaded by hand from its page, https://rpand002.github.io/emotion.html, as "
        "lists of addresses, and the images from these. Give the folder that holds train25.txt and "
        "test25.txt, with the images in <split>/<number of the label>/<name in the address>, as "
        "path; or a folder of <split>/<label>/*.jpg, with splits train and test and 25 labels by "
        "number or name."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        _check_order(root, checks)
        if any((root / name).is_file() for name, _ in _LISTS.values()):
            return {
                split: _listed(root / name, split, count, Folder(root, checks), checks)
                for split, (name, count) in _LISTS.items()
                if (root / name).is_file()
            }
        # `images` holds train25 and test25, or the root itself holds the splits.
        where = "images" if folders(root) == ["images"] else ""
        if not folders(root / where):
            raise checks.refuse(f"it has no folders. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        unknown = [name for name in folders(root / where) if name.lower() not in _FOLDERS]
        if unknown:
            raise checks.refuse(
                f"the folder {unknown[0]!r} is no split ({', '.join(_FOLDERS)}). "
                f"{cls.MANUAL_DOWNLOAD_INSTRUCTIONS}"
            )
        return split_folders(root, where, _LABELS, checks, _FOLDERS, _NUMBERS)


def _listed(path: Path, split: str, count: int, folder: Folder, checks: Checks) -> list[Found]:
    """Reads a list of addresses; an address that stands there twice with one label is one row."""
    lines = [line for line in read_lines(path, checks) if line.strip()]
    if len(lines) != count:
        checks.note("count", f"{path.name}: {len(lines)} lines, published are {count}")
    found, seen = [], set()
    for number, line in enumerate(lines, start=1):
        address, _, label = line.strip().rpartition(" ")
        if label not in _NUMBERS or not address:
            raise checks.refuse(
                f"line {number} of {path.name} is {line!r}, not an address and a number of 0 to "
                f"{len(_LABELS) - 1}"
            )
        name = address.rstrip("/").rpartition("/")[2]
        row_id = f"{split}/{label}/{name}"
        if (address.strip(), label) in seen or row_id in seen:
            checks.note("listed_twice", row_id)
            continue
        seen.update(((address.strip(), label), row_id))
        places = (place.format(split=split, number=label, name=name) for place in _PLACES)
        file = next((there for place in places if (there := folder.find(place))), "")
        if file:
            found.append(Found(row_id, _NUMBERS[label], file))
        else:
            checks.note("not_downloaded", row_id)
    if not found:
        raise checks.refuse(
            f"none of the {len(lines)} images of {path.name} is there; they are looked for in "
            f"{', '.join(_PLACES)}"
        )
    return found


def _check_order(root: Path, checks: Checks) -> None:
    """Refuses a `category.txt` that numbers the labels in another order."""
    path = root / "category.txt"
    if not path.is_file():
        return
    # Lines such as ('affection', 'love', '+').
    words = re.findall(r"[a-z]+", "\n".join(read_lines(path, checks)).lower())
    order = tuple(find_label(word, _LABELS) for word in words[::2])
    if len(words) == 2 * len(_LABELS) and set(order) == set(_LABELS) and order != _LABELS:
        raise checks.refuse(
            f"category.txt orders the labels {', '.join(order)}; WebEmo's order is "
            f"{', '.join(_LABELS)}: take the category.txt of the download"
        )
