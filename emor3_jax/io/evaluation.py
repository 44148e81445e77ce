"""The result of an evaluation: means, counts by class, and responses for people to read."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emor3_jax.parallel import hosts

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


class Sample(NamedTuple):
    """One held-out response with everything that was said and scored about it, for people to read.

    Attributes:
      id: of the row.
      label: the true label.
      answer: the boxed label, "" where there is none.
      response: the text.
      coherence_reply, consistency_reply: the texts.
      scores: name → value.
    """

    id: str
    label: str
    answer: str
    response: str
    coherence_reply: str
    consistency_reply: str
    scores: dict[str, float]


class Evaluation(NamedTuple):
    """The result on one data set.

    Attributes:
      metrics: name → value: accuracy and its 95 % interval accuracy_{low,high}, macro_f1,
        weighted_f1, format, coherence, consistency, decoupling, overall, response_length, and rows,
        the number of rows.
      samples: the first few responses.
      labels: the label set, K of them.
      confusion: int[K][K + 1], rows by true label and by answer; the last column is no label.
    """

    metrics: dict[str, float]
    samples: list[Sample]
    labels: Sequence[str] = ()
    confusion: Sequence[Sequence[int]] = ()


class ClassScores(NamedTuple):
    """How one label was answered; a share of nothing is 0.

    Attributes:
      label: its name.
      rows: how many rows have it.
      precision: share of the answers of this label that are right.
      recall: share of its rows that are answered with it.
      f1: their harmonic mean.
    """

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, by Wilson's score.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.

    Args:
      hits: rows that are right.
      rows: all rows; of none, the share may be anything.
    """
    if not rows:
        return 0.0, 1.0
    share, z2 = hits / rows, Z_95**2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    spread = math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2)) * Z_95 / (1 + z2 / rows)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def confusion_matrix(labels: np.ndarray, answers: np.ndarray, k: int) -> np.ndarray:
    """Returns int[k, k + 1]: rows by true label and by answer, the last column for no label.

    Args:
      labels: int[n], the true labels in [0, k).
      answers: int[n], the answers; one outside [0, k) is no label.
      k: number of labels.
    """
    counts = np.zeros((k, k + 1), np.int64)
    np.add.at(counts, (labels, np.where((answers >= 0) & (answers < k), answers, k)), 1)
    return counts


def class_scores(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> list[ClassScores]:
    """Returns the scores of each label.

    Args:
      labels: K names.
      confusion: as `confusion_matrix` returns it.
    """
    counts = np.asarray(confusion).reshape(len(labels), len(labels) + 1)
    scores = []
    for i, label in enumerate(labels):
        hits, true, said = int(counts[i, i]), int(counts[i].sum()), int(counts[:, i].sum())
        scores.append(
            ClassScores(
                label,
                true,
                hits / said if said else 0.0,
                hits / true if true else 0.0,
                2 * hits / (true + said) if true + said else 0.0,
            )
        )
    return scores


@contextmanager
def prediction_file(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """Opens a file of predictions, one JSON object a line; what was in it is replaced.

    Of several processes only the first writes.

    Args:
      path: the file, its folder made if needed.

    Yields:
      A function that writes one row, or None to who does not write.
    """
    if not hosts.is_first():
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)


def to_json(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Returns evaluations as plain data that fits JSON, for a checkpoint."""
    return {
        name: {
            "metrics": e.metrics,
            "samples": [s._asdict() for s in e.samples],
            "labels": list(e.labels),
            "confusion": [list(map(int, row)) for row in e.confusion],
            "classes": [s._asdict() for s in class_scores(e.labels, e.confusion)],
        }
        for name, e in evaluations.items()
    }


def from_json(data: Mapping[str, Any]) -> dict[str, Evaluation]:
    """Returns what `to_json` was given, also of a checkpoint that has no counts by class."""
    return {
        name: Evaluation(
            dict(e["metrics"]),
            [Sample(**s) for s in e["samples"]],
            tuple(e.get("labels", ())),
            tuple(map(tuple, e.get("confusion", ()))),
        )
        for name, e in data.items()
    }
