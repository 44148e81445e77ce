"""EmoSet-118K: 118,102 photographs in eight emotions, with attributes (ICCV 2023).

Checked against public code: rows `[emotion, image, annotation]`, as the lists have them; rows with
an image id in the second place, as its README shows them, are read too.
"""

import re
from pathlib import Path

from emor3_jax.data.datasets.base import Builder, Found
from emor3_jax.data.datasets.checks import Checks
from emor3_jax.data.datasets.folders import Folder, once, read_json
from emor3_jax.data.labels import LABEL_SETS, normalize

_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_LABELS = LABEL_SETS["mikels8"]


class Emoset(Builder):
    """EmoSet-118K.

    The label of a row is the one that its split file names. `info.json` must name the labels in the
    published order, since an altered order means that numbers were mixed up somewhere.
    """

    LABELS = "mikels8"
    QUESTION = "Which emotion would someone who looks at this picture most likely feel?"
    PUBLISHED = (("train", 94_481), ("validation", 5905), ("test", 17_716))
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "EmoSet-118K is downloaded by hand from its page, https://vcc.tech/EmoSet. Unpack it so "
        "that path holds info.json, train.json, val.json, test.json, annotation/<emotion>/*.json "
        "and image/<emotion>/*.jpg, and give that folder as path."
    )

    @classmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        _check_order(root, checks)
        folder = Folder(root, checks)
        splits = {}
        for file, split in _SPLITS.items():
            if not (root / f"{file}.json").is_file():
                if split == "train":
                    raise checks.refuse(f"no train.json. {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
                continue
            rows = read_json(root / f"{file}.json", checks)
            if not isinstance(rows, list):
                raise checks.refuse(f"{file}.json is no list of rows")
            found = [_row(row, i, file, folder, checks) for i, row in enumerate(rows)]
            splits[split] = once(found, split, checks)
        return splits


def _row(row: object, index: int, file: str, folder: Folder, checks: Checks) -> Found:
    """Reads `[emotion, (image id,) "image/….jpg", "annotation/….json"]`."""
    texts = row if isinstance(row, list) and all(isinstance(x, str) for x in row) else []
    images = [x for x in texts[1:] if x.startswith("image/")]
    annotations = [x for x in texts[1:] if x.startswith("annotation/")]
    if len(images) != 1 or len(annotations) > 1:
        raise checks.refuse(
            f"row {index} of {file}.json is {row!r}, not [emotion, image id, 'image/….jpg', "
            "'annotation/….json']"
        )
    label, image = normalize(texts[0]), images[0]
    if label not in _LABELS:
        raise checks.refuse(
            f"row {index} of {file}.json names the emotion {texts[0]!r}; EmoSet has "
            f"{', '.join(_LABELS)}"
        )
    row_id = Path(image).stem
    beside = Path(image).parts[1] if len(Path(image).parts) > 2 else ""
    if beside and normalize(beside) != label:
        checks.note("other_label", f"{file}/{row_id} ({label}, folder {beside})")
    annotation = annotations[0] if annotations else ""
    return Found(
        row_id, label, folder.find(image), annotation=folder.find(annotation) or annotation
    )


def _check_order(root: Path, checks: Checks) -> None:
    info = root / "info.json"
    if not info.is_file():
        return
    found = _find(read_json(info, checks), "label2idx")
    if found is None:
        return
    names = {normalize(str(name)): number for name, number in found.items()}
    if names != {label: number for number, label in enumerate(_LABELS)}:
        order = ", ".join(sorted(names, key=lambda name: names[name]))
        raise checks.refuse(
            f"info.json orders the labels {order}; EmoSet's order is {', '.join(_LABELS)}: take "
            "the info.json of the download"
        )


def _find(info: object, key: str) -> dict | None:
    """Returns the map under `key`, at the top or under "emotion"."""
    for holder in (info, info.get("emotion") if isinstance(info, dict) else None):
        if isinstance(holder, dict) and isinstance(holder.get(key), dict):
            values = holder[key]
            if all(re.fullmatch(r"\d{1,9}", str(value)) for value in values.values()):
                return {name: int(value) for name, value in values.items()}
    return None
