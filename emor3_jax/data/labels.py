"""Label sets, the two axes on which the third step places each emotion, and maps between sets.

A map leads from the labels of a data set to those of another set, so that its rows can be trained
on or scored in the other's words: WebEmo's 25 labels to its 7, any set to `polarity2` or
`arousal2`, Mikels' eight and FER-2013's seven to Emotion6's six. Spellings of one emotion (happy,
happiness) are one label (`SPELLINGS`).

WebEmo's groups and polarity are those of its `category.txt`: confusion is a group of its own, and
negative. It has no counterpart in `parrott6`, the six groups without it.

Deviations, numbered:
 1. Mikels' labels and Emotion6's come from different theories. The map is this project's: the four
    pleasant labels are joy, but awe is surprise; the unpleasant ones have equal names in both.
 2. Polarity and arousal of EMOTIC's labels, and the arousal of all labels, are this project's.
"""

import difflib
import math
from collections.abc import Iterable, Mapping

import numpy as np

from emor3_jax.data.errors import DataError
from emor3_jax.files import is_utf8
from emor3_jax.spelling import normalize, tidy

LABEL_SETS: dict[str, tuple[str, ...]] = {
    # EmoSet's order; also FI, ArtPhoto, Abstract and EmoScenes' "drawn" images.
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
    # Emotion6's order; also EmoScenes' "shifted" images.
    "emotion6": ("anger", "disgust", "fear", "joy", "sadness", "surprise"),
    # FER-2013, with the words of the release's parquet files.
    "fer7": ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"),
    # WebEmo's folders, two of which are spelt differently there (data/datasets/webemo.py).
    "webemo25": (
        "affection",
        "cheerfulness",
        "confusion",
        "contentment",
        "disappointment",
        "disgust",
        "enthrallment",
        "envy",
        "exasperation",
        "gratitude",
        "horror",
        "irritability",
        "lust",
        "neglect",
        "nervousness",
        "optimism",
        "pride",
        "rage",
        "relief",
        "sadness",
        "shame",
        "suffering",
        "surprise",
        "sympathy",
        "zest",
    ),
    # WebEmo's coarse level.
    "webemo7": ("anger", "confusion", "fear", "joy", "love", "sadness", "surprise"),
    # UnbiasedEmo; also WebEmo's coarse level without confusion.
    "parrott6": ("anger", "fear", "joy", "love", "sadness", "surprise"),
    # Emotion6 with the raters' seventh choice.
    "emotion7": ("anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral"),
    # FER+, in the order of its columns.
    "ferplus8": (
        "neutral",
        "happiness",
        "surprise",
        "sadness",
        "anger",
        "disgust",
        "fear",
        "contempt",
    ),
    "emotic26": (
        "affection",
        "anger",
        "annoyance",
        "anticipation",
        "aversion",
        "confidence",
        "disapproval",
        "disconnection",
        "disquietment",
        "doubt/confusion",
        "embarrassment",
        "engagement",
        "esteem",
        "excitement",
        "fatigue",
        "fear",
        "happiness",
        "pain",
        "peace",
        "pleasure",
        "sadness",
        "sensitivity",
        "suffering",
        "surprise",
        "sympathy",
        "yearning",
    ),
    "polarity2": ("negative", "positive"),
    "arousal2": ("high", "low"),
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
    # WebEmo's: polarity as in its category.txt.
    "affection": ("positive", "low"),
    "cheerfulness": ("positive", "high"),
    "confusion": ("negative", "high"),
    "disappointment": ("negative", "low"),
    "enthrallment": ("positive", "high"),
    "envy": ("negative", "low"),
    "exasperation": ("negative", "high"),
    "gratitude": ("positive", "low"),
    "horror": ("negative", "high"),
    "irritability": ("negative", "high"),
    "love": ("positive", "low"),
    "lust": ("positive", "high"),
    "neglect": ("negative", "low"),
    "nervousness": ("negative", "high"),
    "optimism": ("positive", "low"),
    "pride": ("positive", "high"),
    "rage": ("negative", "high"),
    "relief": ("positive", "low"),
    "shame": ("negative", "low"),
    "suffering": ("negative", "low"),
    "sympathy": ("negative", "low"),
    "zest": ("positive", "high"),
    "contempt": ("negative", "low"),
    # EMOTIC's.
    "annoyance": ("negative", "high"),
    "anticipation": ("positive", "high"),
    "aversion": ("negative", "high"),
    "confidence": ("positive", "low"),
    "disapproval": ("negative", "low"),
    "disconnection": ("negative", "low"),
    "disquietment": ("negative", "high"),
    "doubt/confusion": ("negative", "low"),
    "embarrassment": ("negative", "high"),
    "engagement": ("positive", "low"),
    "esteem": ("positive", "low"),
    "fatigue": ("negative", "low"),
    "pain": ("negative", "high"),
    "peace": ("positive", "low"),
    "pleasure": ("positive", "high"),
    "sensitivity": ("negative", "low"),
    "yearning": ("positive", "low"),
}
"""(polarity, arousal) of every emotion above: positive, negative or neutral; high or low."""

_GROUPS = {
    "anger": "disgust envy exasperation irritability rage",
    "confusion": "confusion",
    "fear": "horror nervousness",
    "joy": "cheerfulness contentment enthrallment optimism pride relief zest",
    "love": "affection gratitude lust",
    "sadness": "disappointment neglect sadness shame suffering sympathy",
    "surprise": "surprise",
}
_MAPS: dict[tuple[str, str], dict[str, str]] = {
    ("webemo25", "webemo7"): {
        fine: group for group, members in _GROUPS.items() for fine in members.split()
    },
    ("webemo25", "parrott6"): {
        fine: group
        for group, members in _GROUPS.items()
        for fine in members.split()
        if group != "confusion"
    },
    ("mikels8", "emotion6"): {
        "amusement": "joy",
        "awe": "surprise",
        "contentment": "joy",
        "excitement": "joy",
        "anger": "anger",
        "disgust": "disgust",
        "fear": "fear",
        "sadness": "sadness",
    },
    ("fer7", "emotion6"): {
        "anger": "anger",
        "disgust": "disgust",
        "fear": "fear",
        "happiness": "joy",
        "sadness": "sadness",
        "surprise": "surprise",
    },
}

SPELLINGS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "amusement amused",
        "anger angry",
        "awe awed",
        "cheerfulness cheerfullness cheerful",
        "confusion confused",
        "contempt contemptuous",
        "contentment content contented",
        "disgust disgusted",
        "excitement excited",
        "fear fearful afraid scared",
        "irritability irritabilty",
        "joy joyful happiness happy",
        "love loving",
        "negative neg",
        "neutral neutrality",
        "positive pos",
        "sadness sad",
        "surprise surprised",
    )
)
"""Names of one emotion, in any of its spellings; data sets and their copies use all of them."""

_SPELLINGS_OF = {name: names for names in SPELLINGS for name in names}


def find_label(name: str, labels: Iterable[str]) -> str | None:
    """Returns the label of a set that a name stands for.

    Args:
      name: a label, in any case and in any spelling of `SPELLINGS`.
      labels: the label set.

    Returns:
      The label as the set spells it; None if none has this name or, of several spellings that the
      set tells apart, none has exactly this one.
    """
    key = normalize(name)
    known = {normalize(label): label for label in labels}
    if key in known:
        return known[key]
    found = [known[each] for each in _SPELLINGS_OF.get(key, ()) if each in known]
    return found[0] if len(found) == 1 else None


def spellings(labels: Iterable[str]) -> dict[str, str]:
    """Returns every name of the labels of a set, themselves included → label."""
    labels = tuple(labels)
    names = {normalize(label) for label in labels} | set(_SPELLINGS_OF)
    found = {name: find_label(name, labels) for name in sorted(names)}
    return {name: label for name, label in found.items() if label is not None}


def label_set(text: str) -> tuple[str, ...]:
    """Returns a label set given by name or spelt out.

    Args:
      text: a name of `LABEL_SETS`, or at least two labels joined by commas.

    Raises:
      DataError: if the name is unknown, a label is empty, or two are equal but for case.
    """
    if text in LABEL_SETS:
        return LABEL_SETS[text]
    labels = tuple(map(tidy, text.split(",")))
    if len(labels) < 2:
        nearest = difflib.get_close_matches(text, LABEL_SETS, n=1, cutoff=0.0)
        raise DataError(
            f"labels={text!r} is no label set; known are {', '.join(LABEL_SETS)} (nearest: "
            f"{nearest[0]}), or give the labels themselves, joined by commas"
        )
    return check_labels(labels)


def label_map(own: str, wanted: str) -> dict[str, str]:
    """Returns what each label of one set is called in another.

    Args:
      own: the set of the data, as `label_set` takes it.
      wanted: the set to put it in, likewise.

    Returns:
      Label → label. A label that has no counterpart is missing, such as `neutral` in `polarity2`.

    Raises:
      DataError: if no label of one set has a counterpart in the other; or if some labels of both
        sets have none, which means that the sets use other words.
    """
    labels, target = label_set(own), label_set(wanted)
    if (own, wanted) in _MAPS:
        return _MAPS[own, wanted]
    if wanted in ("polarity2", "arousal2"):
        axis = ("polarity2", "arousal2").index(wanted)
        found = {
            label: VALENCE_AROUSAL[label][axis] for label in labels if label in VALENCE_AROUSAL
        }
        found = {label: side for label, side in found.items() if side in target}
    else:
        pairs = ((label, find_label(label, target)) for label in labels)
        found = {label: name for label, name in pairs if name is not None}
        lost = [label for label in labels if label not in found]
        missing = [label for label in target if label not in found.values()]
        if found and lost and missing:
            raise DataError(
                f"labels={wanted!r} loses the rows of {', '.join(lost)} of {own}, and no row would "
                f"be {', '.join(missing)}; name the labels as the data does, or a set that {own} "
                f"maps to: {', '.join(_targets(own))}"
            )
    if not found:
        raise DataError(
            f"labels={wanted!r} has no counterpart of any label of {own} ({', '.join(labels)}); "
            f"{own} maps to {', '.join(_targets(own))}"
        )
    return found


def _targets(own: str) -> list[str]:
    """Returns the sets that a set maps to by name, itself first."""
    return [own, *(b for a, b in _MAPS if a == own), "polarity2", "arousal2"]


def check_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the labels, or raises `DataError` if they cannot be told apart."""
    if not all(label.strip() for label in labels):
        raise DataError(f"labels={', '.join(labels)!r} contains an empty label")
    for label in labels:
        if not is_utf8(label):
            raise DataError(f"label {label!r} is no text in UTF-8; spell it in UTF-8")
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
