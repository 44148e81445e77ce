"""Comparison of two runs by their files of predictions, row by row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emor3_jax.data.errors import DataError
from emor3_jax.evaluation.paired import Difference, differences, mcnemar
from emor3_jax.files import parse_json, read_lines

MATCHES = {"exact": "answer", "lenient": "lenient"}
"""How an answer is read → its field in a file of predictions."""


class Answered(NamedTuple):
    """A row as one run answered it.

    Attributes:
      label: the true label.
      answer: the label that it said, "" for none.
      response: the text of the response that answers for the row.
    """

    label: str
    answer: str
    response: str

    @property
    def right(self) -> bool:
        """Returns whether the answer is the label."""
        return self.answer == self.label


class ClassComparison(NamedTuple):
    """The rows of one label.

    Attributes:
      label: its name.
      rows: how many have it.
      first, second: share of them that the run gets right, in [0, 1].
      only_first, only_second: rows that one run alone gets right.
      p: of McNemar's exact test, not corrected for the number of labels.
    """

    label: str
    rows: int
    first: float
    second: float
    only_first: int
    only_second: int
    p: float


class Comparison(NamedTuple):
    """Two runs on the rows that both have answered.

    Attributes:
      rows: how many there are.
      scores: name → score of both, with the interval of its change; {} of no rows.
      both, neither: rows that both runs, or none, get right.
      only_first, only_second: ids of the rows that one run alone gets right.
      p: of McNemar's exact test.
      classes: the same by label.
      missing_first, missing_second: ids of rows that this run has not answered.
      other_label: ids of rows whose label is another in each run; left out.
    """

    rows: int
    scores: dict[str, Difference]
    both: int
    neither: int
    only_first: list[str]
    only_second: list[str]
    p: float
    classes: list[ClassComparison]
    missing_first: list[str]
    missing_second: list[str]
    other_label: list[str]


def find_predictions(run: Path) -> dict[str, Path]:
    """Returns data set → its file of predictions.

    Args:
      run: folder of a run or of an evaluation, or one that holds such files itself. Of a run, the
        newest evaluation of each data set is taken.

    Raises:
      DataError: if there is none.
    """
    base = run / "predictions" if (run / "predictions").is_dir() else run
    steps = sorted((x for x in base.glob("*/") if x.name.isdecimal()), key=lambda x: int(x.name))
    found = {
        path.stem: path for folder in (*steps, base) for path in sorted(folder.glob("*.jsonl"))
    }
    # The metrics of a run are no predictions.
    found = {name: path for name, path in found.items() if name != "metrics"}
    if not found:
        raise DataError(
            f"{str(run)!r}: has no predictions; give the folder of a run or of an evaluation, or "
            "one of its predictions/<step>"
        )
    return found


def step_of(path: Path) -> int | None:
    """Returns after how many steps a file of predictions was written, None of an evaluation."""
    return int(path.parent.name) if path.parent.name.isdecimal() else None


def read_predictions(path: Path, match: str = "exact") -> dict[str, Answered]:
    """Returns row id → answer, of a file that an evaluation has written.

    Args:
      path: the file.
      match: one of `MATCHES`.

    Raises:
      DataError: naming the file and the line that cannot be used.
    """
    rows: dict[str, Answered] = {}
    for number, line in enumerate(read_lines(path, DataError), start=1):
        where = f"line {number} of {path}"
        try:
            row = parse_json(line, where, DataError)
            row_id, label, answer = row["id"], row["label"], row[MATCHES[match]]
            said = next((x for x in row["responses"] if x["answer"] == row["answer"]), None)
        except (AttributeError, TypeError) as error:
            raise DataError(f"{where} is no prediction ({error}); evaluate again") from error
        except KeyError as error:
            rule = "evaluate again, or compare the exact answers" if match != "exact" else ""
            raise DataError(
                f"{where} has no field {error}, as an older version writes it; "
                f"{rule or 'evaluate again'}"
            ) from error
        texts = (row_id, label, answer, said["response"] if said else "")
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where} is no prediction (a field is no text); evaluate again")
        if row_id in rows:
            raise DataError(f"{where}: the row {row_id!r} occurs twice; its ids must be unique")
        rows[row_id] = Answered(*texts[1:])
    return rows


def compare(
    first: Mapping[str, Answered], second: Mapping[str, Answered], seed: int = 0
) -> Comparison:
    """Compares two runs on the rows that both have answered.

    Args:
      first, second: row id → answer.
      seed: of the bootstrap.
    """
    shared = [row_id for row_id in first if row_id in second]
    other = [row_id for row_id in shared if first[row_id].label != second[row_id].label]
    shared = [row_id for row_id in shared if row_id not in set(other)]
    names = sorted({first[row_id].label for row_id in shared})
    index = {name: i for i, name in enumerate(names)}

    def numbers(texts: Sequence[str]) -> np.ndarray:
        return np.array([index.get(text, -1) for text in texts], np.int64)

    labels = numbers([first[row_id].label for row_id in shared])
    answers = [numbers([run[row_id].answer for row_id in shared]) for run in (first, second)]
    right = [x == labels for x in answers]
    only = [right[0] & ~right[1], right[1] & ~right[0]]
    return Comparison(
        rows=len(shared),
        scores=differences(labels, *answers, len(names), seed) if shared else {},
        both=int((right[0] & right[1]).sum()),
        neither=int((~right[0] & ~right[1]).sum()),
        only_first=[shared[i] for i in np.flatnonzero(only[0])],
        only_second=[shared[i] for i in np.flatnonzero(only[1])],
        p=mcnemar(int(only[0].sum()), int(only[1].sum())),
        classes=[_of_class(name, labels == i, right, only) for name, i in index.items()],
        missing_first=[row_id for row_id in second if row_id not in first],
        missing_second=[row_id for row_id in first if row_id not in second],
        other_label=other,
    )


def _of_class(
    name: str, rows: np.ndarray, right: Sequence[np.ndarray], only: Sequence[np.ndarray]
) -> ClassComparison:
    shares = (float(x[rows].mean()) for x in right)
    counts = [int(x[rows].sum()) for x in only]
    return ClassComparison(name, int(rows.sum()), *shares, *counts, mcnemar(*counts))


def to_json(found: Comparison) -> dict[str, Any]:
    """Returns a comparison as plain data that fits JSON."""
    return found._asdict() | {
        "scores": {
            name: each._asdict() | {"change": each.change} for name, each in found.scores.items()
        },
        "classes": [each._asdict() for each in found.classes],
    }
