"""Rows of an evaluation for people to read: some of every kind, and the same ones over time."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from emor3_jax.data.errors import DataError
from emor3_jax.evaluation.records import Sample, read_prediction
from emor3_jax.files import parse_json, read_lines

FAULTS = {"coherence": "incoherent", "consistency": "inconsistent"}
"""Question → what a response is called that fails it; of others, "not <question>"."""

_MOST = 96
_MOST_STEPS = 12


def faults(sample: Sample) -> list[str]:
    """Returns the faults of a response: "wrong", "malformed", and those of `FAULTS`.

    Args:
      sample: the response. A question that has no reply was not asked.
    """
    found = ["wrong"] if sample.answer != sample.label else []
    found += ["malformed"] if sample.scores.get("format", 1) < 1 else []
    asked = (name for name, reply in sample.replies.items() if reply and name in sample.scores)
    return found + [FAULTS.get(name, f"not {name}") for name in asked if not sample.scores[name]]


class Gallery:
    """Keeps the first responses, and further ones until each label and fault is there.

    Attributes:
      samples: those that were kept, at most 96.
    """

    def __init__(self, first: int) -> None:
        """Begins an empty one.

        Args:
          first: so many are kept in any case, half as many of each label and each fault; 0 keeps
            none.
        """
        self.samples: list[Sample] = []
        self._first, self._kinds = first, Counter[tuple[str, str]]()

    def add(self, sample: Sample) -> None:
        """Keeps a response, where it is one of the first or of a kind that is rare so far."""
        kinds = [("label", sample.label), *(("fault", fault) for fault in faults(sample))]
        rare = any(self._kinds[kind] < self._first // 2 for kind in kinds)
        if len(self.samples) < self._first or (rare and len(self.samples) < _MOST):
            self.samples.append(sample)
            self._kinds.update(kinds)


class Watched(NamedTuple):
    """A held-out row over time.

    Attributes:
      id: of the row.
      label: the true label.
      answers: steps of training → the response that answered for the row then.
    """

    id: str
    label: str
    answers: dict[int, Sample]


def watch(folder: Path, data_set: str, count: int) -> list[Watched]:
    """Returns rows that every evaluation of a run has answered, as its predictions have them.

    The rows are of as many labels as there are; of many evaluations, some are left out between the
    first and the last one.

    Args:
      folder: with the predictions: `<step>/<data set>.jsonl`.
      data_set: its name.
      count: number of rows.

    Returns:
      At most `count` rows; none where fewer than two evaluations were made.

    Raises:
      DataError: naming the file and the line that cannot be used.
    """
    files = {
        int(path.parent.name): path
        for path in folder.glob(f"*/{data_set}.jsonl")
        if path.parent.name.isdecimal()
    }
    if len(files) < 2:
        return []
    steps = _spread(sorted(files))
    # Fewer rows are answered during training than before and after it.
    fewest = min(steps, key=lambda step: files[step].stat().st_size)
    picked = _of_all_labels(_read(files[fewest]), count)
    rows = {sample.id: Watched(sample.id, sample.label, {}) for sample in picked}
    for step in steps:
        for sample in _read(files[step]):
            if sample.id in rows:
                rows[sample.id].answers[step] = sample
    return list(rows.values())


def _spread(steps: Sequence[int]) -> list[int]:
    """Returns at most `_MOST_STEPS` of them, the first and the last one included."""
    if len(steps) <= _MOST_STEPS:
        return list(steps)
    last = _MOST_STEPS - 1
    return [steps[round(i * (len(steps) - 1) / last)] for i in range(_MOST_STEPS)]


def _of_all_labels(samples: Iterable[Sample], count: int) -> list[Sample]:
    """Returns the first row of each label, then the first of the others, `count` in all."""
    seen: set[str] = set()
    first, others = [], []
    for sample in samples:
        (others if sample.label in seen else first).append(sample)
        seen.add(sample.label)
    return [*first, *others][:count]


def _read(path: Path) -> Iterator[Sample]:
    for number, line in enumerate(read_lines(path, DataError), start=1):
        where = f"line {number} of {path}"
        try:
            yield read_prediction(parse_json(line, where, DataError, finite=False))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise DataError(f"{where} is no prediction ({error!r}); evaluate again") from error
