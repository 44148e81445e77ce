"""Label sets, and where each emotion lies on the two axes that the third step names."""

import difflib
import math
from collections.abc import Iterable, Mapping

import numpy as np

from emor3_jax.data.errors import DataError

LABEL_SETS: dict[str, tuple[str, ...]] = {
    # EmoSet's order; also FI, ArtPhoto, Abstract and EmoScenes' "drawn" pictures.
    "mikels8": (
        "amusement",
        "awe",
        "contentment",
        "excitement",
        "anger",
        "disgust",
        "fear",
        "sadness",
    ),
    # Emotion6's order; also EmoScenes' "shifted" pictures.
    "emotion6": ("anger", "disgust", "fear", "joy", "sadness", "surprise"),
    # FER-2013, with the words of the release's parquet files.
    "fer7": ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"),
}
"""The label sets by name; the index in a tuple is the label."""

VALENCE_AROUSAL: dict[str, tuple[str, str]] = {
    "amusement": ("positive", "high"),
    "awe": ("positive", "high"),
    "contentment": ("positive", "low"),
    "excitement": ("positive", "high"),
    "happiness": ("positive", "high"),
    "joy": ("positive", "high"),
    "surprise": ("positive", "high"),
    "neutral": ("neutral", "low"),
    "anger": ("negative", "high"),
    "disgust": ("negative", "low"),
    "fear": ("negative", "high"),
    "sadness": ("negative", "low"),
}
"""(polarity, arousal) of every label above: positive, negative or neutral; high or low."""


def label_set(text: str) -> tuple[str, ...]:
    """Returns a label set given by name or spelt out.

    Args:
      text: a name of `LABEL_SETS`, or at least two labels joined by commas.

    Raises:
      DataError: if the name is unknown, a label is empty, or two are equal but for case.
    """
    if text in LABEL_SETS:
        return LABEL_SETS[text]
    labels = tuple(label.strip() for label in text.split(","))
    if len(labels) < 2:
        nearest = difflib.get_close_matches(text, LABEL_SETS, n=1, cutoff=0.0)
        raise DataError(
            f"labels={text!r} is no label set; known are {', '.join(LABEL_SETS)} (nearest: "
            f"{nearest[0]}), or give the labels themselves, joined by commas"
        )
    return check_labels(labels)


def check_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the labels, or raises `DataError` if they cannot be told apart."""
    if not all(label.strip() for label in labels):
        raise DataError(f"labels={', '.join(labels)!r} contains an empty label")
    seen: dict[str, str] = {}
    for label in labels:
        key = normalize(label)
        if key in seen:
            raise DataError(f"labels {seen[key]!r} and {label!r} are equal but for case")
        seen[key] = label
    return labels


def label_grades(
    shares: Iterable[tuple[str | None, float | None]], index: Mapping[str, int]
) -> np.ndarray | None:
    """Returns what each label is worth as an answer, float32[K]: its share over the largest one.

    So the label that most raters chose is worth 1, as it is without shares, and one that half as
    many chose 0.5. Shares of labels outside the set count for nothing.

    Args:
      shares: label and share, of any sum.
      index: the normalised labels of the set, by their number.

    Returns:
      The grades; None if a share is negative, not finite or missing, a label of the set is named
      twice, or none has a share.
    """
    found: dict[int, float] = {}
    for label, share in shares:
        at = index.get(normalize(label or ""))
        if share is None or not math.isfinite(share) or share < 0 or at in found:
            return None
        if at is not None:
            found[at] = share
    most = max(found.values(), default=0.0)
    if not most:
        return None
    return np.asarray([found.get(i, 0.0) / most for i in range(len(index))], np.float32)


def normalize(label: str) -> str:
    """Returns a label or an answer as they are compared: stripped and lower-cased."""
    return label.strip().lower()
