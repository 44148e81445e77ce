"""The kinds of data sets that a config may name: one row of `SOURCES` opens one kind."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from emor3_jax.config import ConfigError
from emor3_jax.data import generic
from emor3_jax.data.columns import parse_columns
from emor3_jax.data.datasets.catalog import BUILDERS, open_dataset
from emor3_jax.data.errors import DataError
from emor3_jax.data.sources import ParquetSource, Source
from emor3_jax.data.views import SUBSETS
from emor3_jax.embedded.emoscenes import builder, words
from emor3_jax.embedded.emoscenes.source import EmoScenesSource


@dataclass(frozen=True)
class SourceContext:
    """The facts of a run that opening its data may need.

    Attributes:
      field: path of the data set's description in the config, for errors.
      folder: where data sets are built.
      scene_size: side of drawn scenes in pixels.
      responses: whether rows also need responses to learn from.
    """

    field: str
    folder: str
    scene_size: int
    responses: bool


Opened = tuple[Source, str]
"""Rows as they are, and their label set as `label_set` takes it, "" where the data has none."""


def _split(dataset: ConfigDict) -> str:
    return dataset.split or "train"


def _open_emoscenes(dataset: ConfigDict, run: SourceContext) -> Opened:
    question = dataset.question or words.QUESTION
    split = _split(dataset)
    try:
        built = builder.prepare(run.folder, run.scene_size, splits=(split,))
    except ValueError as error:
        raise ConfigError(f"{run.field}.split", split, str(error)) from error
    source = EmoScenesSource(split, built.data_dir, question, responses=run.responses)
    return source, "emotion6" if split.startswith("shifted") else "mikels8"


def _open_parquet(dataset: ConfigDict, run: SourceContext) -> Opened:
    if not dataset.path:
        rule = "name parquet files, a glob, or several joined by commas"
        raise ConfigError(f"{run.field}.path", dataset.path, rule)
    names = parse_columns(dataset.columns)
    options = {"question": dataset.question, "outside_files": dataset.outside_files}
    return ParquetSource(dataset.path, columns=names, split=dataset.split, **options), ""


def _open_named(kind: str, dataset: ConfigDict, run: SourceContext) -> Opened:
    where = dataset.path, _split(dataset), run.folder
    options = {"copy": dataset.copy, "question": dataset.question, "label": dataset.label}
    source = open_dataset(kind, *where, **options)
    return source, source.labels


def _open_folders(dataset: ConfigDict, _: SourceContext) -> Opened:
    source = generic.open_folders(dataset.path, _split(dataset), dataset.question)
    return source, _joined(source)


def _open_json_lines(dataset: ConfigDict, _: SourceContext) -> Opened:
    names = parse_columns(dataset.columns)
    options = {"columns": names, "split": dataset.split, "outside_files": dataset.outside_files}
    return generic.open_json_lines(dataset.path, dataset.question, **options), ""


def _open_hugging_face(dataset: ConfigDict, _: SourceContext) -> Opened:
    names = parse_columns(dataset.columns)
    options = {"columns": names, "outside_files": dataset.outside_files}
    source = generic.HuggingFaceSource(dataset.path, dataset.split, dataset.question, **options)
    return source, _joined(source)


def _joined(source: Any) -> str:
    """Returns the labels that data says itself, as `label_set` takes them."""
    for label in source.labels:
        if "," in label:
            raise DataError(
                f"{source.name}: the label {label!r} holds a comma, which parts labels; rename it"
            )
    return ",".join(source.labels)


SOURCES: dict[str, Callable[[ConfigDict, SourceContext], Opened]] = {
    "emoscenes": _open_emoscenes,
    "parquet": _open_parquet,
    **{kind: partial(_open_named, kind) for kind in BUILDERS},
    "folders": _open_folders,
    "jsonl": _open_json_lines,
    "huggingface": _open_hugging_face,
}
"""Kind → opener of a data set, given its description in the config and the run's facts."""


def check_kind(field: str, dataset: ConfigDict) -> None:
    """Checks that a data set is of a known kind, and that its fields are of use to this kind.

    Args:
      field: path of its description in the config.
      dataset: its description.

    Raises:
      ConfigError: listing the kinds, or naming the field that would do nothing.
    """
    kind = dataset.kind
    if kind not in SOURCES:
        raise ConfigError(f"{field}.kind", kind, f"must be one of {', '.join(SOURCES)}")
    named = ("parquet", "jsonl", "huggingface")
    if dataset.columns and kind not in named:
        rule = f"names columns, which only {', '.join(named)} have, not {kind}; leave it ''"
        raise ConfigError(f"{field}.columns", dataset.columns, rule)
    if dataset.outside_files and kind not in named:
        rule = f"allows paths that a list names, which only {', '.join(named)} have, not {kind}"
        raise ConfigError(f"{field}.outside_files", dataset.outside_files, rule)
    if dataset.label and kind not in BUILDERS:
        rule = f"chooses a label rule of a named data set, not of {kind}; leave it ''"
        raise ConfigError(f"{field}.label", dataset.label, rule)
    if dataset.subset_mix not in SUBSETS:
        rule = f"must be one of {', '.join(SUBSETS)}"
        raise ConfigError(f"{field}.subset_mix", dataset.subset_mix, rule)
