"""The named data sets: which builder reads which kind, and how one is opened."""

from collections.abc import Callable, Mapping
from pathlib import Path

from emor3_jax.data.datasets import (
    abstract,
    artphoto,
    caers,
    emoset,
    emotic,
    emotion6,
    emotionroi,
    fer2013,
    ferplus,
    fi,
    ldl,
    rafdb,
    twitter1,
    unbiasedemo,
    vecbench,
    webemo,
)
from emor3_jax.data.datasets.base import Builder, BuiltSource, build_dataset, check_root
from emor3_jax.data.errors import DataError

Choice = type[Builder] | Callable[[Path], type[Builder]] | Mapping[str, type[Builder]]


def _fer2013(root: Path) -> type[Builder]:
    """Returns the builder for what lies in the folder: the csv, else folders."""
    return fer2013.Fer2013Csv if fer2013.find_csv(root) else fer2013.Fer2013Folders


def _ferplus(root: Path) -> type[Builder]:
    """Returns the builder for what holds the faces: Kaggle's csv, else folders."""
    return ferplus.FerPlusCsv if fer2013.find_csv(root) else ferplus.FerPlusFolders


BUILDERS: dict[str, Choice] = {
    "emoset": emoset.Emoset,
    "emotion6": {
        "six": emotion6.Emotion6,
        "seven": emotion6.Emotion6Seven,
        "keyword": emotion6.Emotion6Keyword,
    },
    "webemo": webemo.Webemo,
    "fi": fi.Fi,
    "artphoto": artphoto.Artphoto,
    "abstract": {"untied": abstract.Abstract, "first": abstract.AbstractFirst},
    "fer2013": _fer2013,
    "ferplus": _ferplus,
    "rafdb": rafdb.RafDb,
    "caers": caers.CaerS,
    "unbiasedemo": unbiasedemo.UnbiasedEmo,
    "emotionroi": emotionroi.EmotionRoi,
    "twitter1": {
        "three": twitter1.Twitter1,
        "four": twitter1.Twitter1Four,
        "five": twitter1.Twitter1Five,
    },
    "flickr_ldl": ldl.FlickrLdl,
    "twitter_ldl": ldl.TwitterLdl,
    "emotic": emotic.Emotic,
    "vecbench": vecbench.BUILDERS,
}
"""Kind → builder, or what chooses one by the folder, or the builders by label rule, of which the
first is the default."""


def find_builder(kind: str, path: str, label: str = "") -> type[Builder]:
    """Returns the builder of a kind.

    Args:
      kind: one of `BUILDERS`.
      path: the folder that the user has downloaded.
      label: which rule or task gives the label, where a kind has several; "" is the first.

    Raises:
      DataError: if the kind has no such rule, or the folder is not there.
    """
    choice = BUILDERS[kind]
    rules = choice if isinstance(choice, Mapping) else {}
    if label and label not in rules:
        known = (
            f"must be one of {', '.join(rules)}" if rules else f"{kind} has one rule; leave it ''"
        )
        raise DataError(f"label={label!r}: {known}")
    if rules:
        return rules[label] if label else next(iter(rules.values()))
    if isinstance(choice, type):
        return choice
    examples = {"fer2013": fer2013.Fer2013Csv, "ferplus": ferplus.FerPlusCsv}
    return choice(check_root(examples[kind], path))


def open_dataset(
    kind: str,
    path: str,
    split: str,
    data_dir: str | Path,
    *,
    copy: bool = False,
    question: str = "",
    label: str = "",
) -> BuiltSource:
    """Opens a split of a named data set, which is built first if it is not yet.

    Args:
      kind: one of `BUILDERS`.
      path: the folder that the user has downloaded.
      split: of the data set.
      data_dir: folder of tfds data sets.
      copy: whether the records hold the images themselves (`data/datasets/base.py`).
      question: asked instead of the data set's own; "" asks that.
      label: which rule or task gives the label, as `find_builder` takes it.

    Raises:
      DataError: if the folder or the split is not there, or the folder is not what it should be.
    """
    builder = find_builder(kind, path, label)
    return BuiltSource(build_dataset(builder, path, data_dir, copy=copy), split, question)
