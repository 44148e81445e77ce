"""EMOTIC: people in context, with 26 emotions of which each person has several (CVPR 2017).

`Annotations.mat` holds, by split, images (folder, filename, size) and in each the people: a box,
the labels, and valence, arousal and dominance from 1 to 10. A row is a person; the question names
the box in pixels of the image, which stays whole.

Training rows have one annotator (`annotations_categories`), the others several, whose labels
together are `combined_categories`. The label of a row is the one that most annotators gave, the
first of equals in the order of the data; since the data is multi-label, that simplifies it. How
many gave each label is the row's `distribution`, and all labels are in its attributes with the box,
age and gender.

Checked against public code: the fields, in both forms, and the folders of the images
(`mscoco/images`, `framesdb/images` and others, also below `emotic`). Not checked: the counts.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from emor3_jax import files
from emor3_jax.data.datasets.base import Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder
from emor3_jax.data.labels import LABEL_SETS, find_label

_FILE = "Annotations.mat"
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_LABELS = LABEL_SETS["emotic26"]
_VALUES = ("valence", "arousal", "dominance")
# Copies nest the four sources of images once more.
_PLACES = ("{folder}/{name}", "emotic/{folder}/{name}", "emotic/{source}/{folder}/{name}")


class Emotic(Builder):
    """EMOTIC, one row a person."""

    LABELS = "emotic26"
    QUESTION = "Which emotion does the person in this picture most likely feel?"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "EMOTIC is asked for by the form on its page, "
        "https://s3.sunai.uoc.edu/emotic/download.html. Unpack images and annotations so that path "
        "holds Annotations.mat and emotic/<source>/images/*.jpg, and give that folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        places = (root / _FILE, root / "Annotations" / _FILE)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise checks.refuse(f"no {_FILE}. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        os.close(files.open_regular(path, files.MAX_TEXT_BYTES, checks.refuse))
        try:
            read = scipy.io.loadmat(path, squeeze_me=True, struct_as_record=False)
        except NotImplementedError as error:
            # What SciPy says of HDF5, which MATLAB writes since version 7.3; EMOTIC's is older.
            raise checks.refuse(
                f"{_FILE} is in MATLAB's format 7.3, which is not read; take the file that the "
                "authors publish, or save it as version 7"
            ) from error
        except Exception as error:
            # SciPy raises many kinds of errors for a damaged file, also those of zlib and struct.
            raise checks.refuse(f"{_FILE} is no MATLAB file: {error}; download it again") from error
        splits = {split: read[name] for name, split in _SPLITS.items() if name in read}
        if not splits:
            raise checks.refuse(f"{_FILE} has none of the parts {', '.join(_SPLITS)}")
        folder = Folder(root, checks)
        return {
            split: [row for image in _each(images) for row in _people(image, folder, checks)]
            for split, images in splits.items()
        }


def _people(image: Any, folder: Folder, checks: Checks) -> Iterator[Found]:
    """Yields a row for each person of an image that has a label."""
    try:
        where, name = str(image.folder), str(image.filename)
        people = _each(image.person)
    except AttributeError as error:
        raise checks.refuse(f"an image of {_FILE} lacks a field: {error}") from error
    source = where.partition("/")[0]
    places = (place.format(folder=where, name=name, source=source) for place in _PLACES)
    file = next((there for place in places if (there := folder.find(place))), "")
    for number, person in enumerate(people):
        row_id = f"{where}/{name}#{number}"
        votes = _votes(person, row_id, checks)
        if not votes:
            checks.note("no_share", row_id)
        box = [int(edge) for edge in np.ravel(getattr(person, "body_bbox", []))]
        question = ""
        if len(box) == 4:
            question = (
                f"Which emotion does the person between x = {box[0]} and {box[2]} and y = {box[1]} "
                f"and {box[3]} pixels in this picture most likely feel?"
            )
        about = {"labels": list(votes), "box": box}
        about |= {field: str(getattr(person, field, "")) for field in ("gender", "age")}
        yield Found(
            row_id,
            max(votes, key=votes.__getitem__) if votes else "",
            file,
            tuple(float(votes[label]) for label in _LABELS) if votes else (),
            values=_values(person),
            question=question,
            attributes=json.dumps(about),
        )


def _votes(person: Any, row_id: str, checks: Checks) -> Counter[str]:
    """Counts the annotators of each label, in the order of the data."""
    given = [_texts(each) for each in _each(getattr(person, "annotations_categories", []))]
    combined = _texts(getattr(person, "combined_categories", []))
    votes: Counter[str] = Counter(dict.fromkeys(combined, 0))
    votes.update(label for labels in given for label in dict.fromkeys(labels))
    found: Counter[str] = Counter()
    for name, count in votes.items():
        label = find_label(name, _LABELS)
        if label is None:
            raise checks.refuse(f"{row_id} has the label {name!r}, none of EMOTIC's 26")
        found[label] += max(count, 1)
    return found


def _values(person: Any) -> tuple[tuple[str, float], ...]:
    """Returns valence, arousal and dominance, the annotators' means where there are several."""
    combined = getattr(person, "combined_continuous", None)
    given = _each(getattr(person, "annotations_continuous", []) if combined is None else combined)
    found = []
    for name in _VALUES:
        numbers = [float(np.mean(getattr(each, name))) for each in given if hasattr(each, name)]
        numbers = [number for number in numbers if np.isfinite(number)]
        if numbers:
            found.append((name, float(np.mean(numbers))))
    return tuple(found)


def _each(value: Any) -> list[Any]:
    """Returns a squeezed array's elements; one alone is no array any more."""
    if isinstance(value, np.ndarray | list):
        return list(np.ravel(value)) if isinstance(value, np.ndarray) else value
    return [value]


def _texts(value: Any) -> list[str]:
    """Returns the names in a field: a struct with `categories`, an array of texts, or one text."""
    if hasattr(value, "categories"):
        value = value.categories
    return [str(each).strip() for each in _each(value) if isinstance(each, str)]
