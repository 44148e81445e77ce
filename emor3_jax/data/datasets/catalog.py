"""The named data sets: which builder reads which kind, and how one is opened."""

from collections.abc import Callable
from pathlib import Path

from emor3_jax.data.datasets import abstract, artphoto, emoset, emotion6, fer2013, fi, webemo
from emor3_jax.data.datasets.base import Builder, BuiltSource, build_dataset, check_root


def _fer2013(root: Path) -> type[Builder]:
    """Returns the builder for what lies in the folder: the csv, else folders."""
    has_csv = (root / "fer2013.csv").is_file()
    return fer2013.Fer2013Csv if has_csv else fer2013.Fer2013Folders


BUILDERS: dict[str, type[Builder] | Callable[[Path], type[Builder]]] = {
    "emoset": emoset.Emoset,
    "emotion6": emotion6.Emotion6,
    "webemo": webemo.Webemo,
    "fi": fi.Fi,
    "artphoto": artphoto.Artphoto,
    "abstract": abstract.Abstract,
    "fer2013": _fer2013,
}
"""Kind → builder, or what chooses one by the folder."""


def open_dataset(
    kind: str,
    path: str,
    split: str,
    data_dir: str | Path,
    *,
    copy: bool = False,
    question: str = "",
) -> BuiltSource:
    """Opens a split of a named data set, which is built first if it is not yet.

    Args:
      kind: one of `BUILDERS`.
      path: the folder that the user has downloaded.
      split: of the data set.
      data_dir: folder of tfds data sets.
      copy: whether the records hold the images themselves (`data/datasets/base.py`).
      question: asked instead of the data set's own; "" asks that.

    Raises:
      DataError: if the folder or the split is not there, or the folder is not what it should be.
    """
    chosen = BUILDERS[kind]
    if not isinstance(chosen, type):
        chosen = chosen(check_root(fer2013.Fer2013Csv, path))
    return BuiltSource(build_dataset(chosen, path, data_dir, copy=copy), split, question)
