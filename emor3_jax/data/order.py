"""The order in which training visits rows: a function of the position alone.

Position `i` of the endless stream names a row, whatever was read before: grain's shuffle and
mixture are arithmetic on the index. So a run goes on from one number, with any number of worker
processes.

Every group of rows (the labels of a balanced data set, the data sets of a mixture) is shuffled anew
in each of its epochs, by (seed, group, epoch); groups take turns by their weights.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

BATCHES_OF_WINDOW = 16
"""Batches whose rows are sorted by size together."""

_KEPT_WINDOWS = 4


class ShuffleGroup(NamedTuple):
    """Rows that are shuffled together.

    Attributes:
      indices: int64[n], rows of the source.
      weight: how often the group has its turn, relative to the others.
    """

    indices: np.ndarray
    weight: float


def make_groups(
    indices: np.ndarray,
    answers: Sequence[int],
    starts: Sequence[int],
    weights: Sequence[float],
    balanced: Sequence[bool],
) -> list[ShuffleGroup]:
    """Parts rows into the groups that take turns.

    Args:
      indices: int64[n], usable rows of a source that joins parts.
      answers: int[n], number of the label of each of them.
      starts: where each part begins, and the end of the last one.
      weights: of the parts.
      balanced: of each part, whether its labels have equal turns.

    Returns:
      The groups, none of them empty; the weight of a part is shared by its groups.
    """
    groups = []
    answers = np.asarray(answers)
    for part, (weight, balance) in enumerate(zip(weights, balanced, strict=True)):
        inside = (indices >= starts[part]) & (indices < starts[part + 1])
        if not balance:
            if inside.any():
                groups.append(ShuffleGroup(indices[inside], weight))
            continue
        labels = np.unique(answers[inside])
        for label in labels:
            rows = indices[inside & (answers == label)]
            groups.append(ShuffleGroup(rows, weight / len(labels)))
    return groups


def shuffled(groups: Sequence[ShuffleGroup], seed: int) -> grain.MapDataset:
    """Returns the endless order of rows, a random access source of int.

    Args:
      groups: at least one.
      seed: 0 to 2**32 - 1.
    """
    endless = []
    for number, group in enumerate(groups):
        own = seed if len(groups) == 1 else _derived(seed, number)
        endless.append(grain.MapDataset.source(group.indices).seed(own).shuffle().repeat())
    if len(endless) == 1:
        return endless[0]
    return grain.MapDataset.mix(endless, [group.weight for group in groups])


class Windows:
    """An order in which rows of like size are neighbours, so that batches need little padding.

    Windows of `BATCHES_OF_WINDOW` batches keep their rows, are sorted by size, and their batches
    shuffled again: no row is lost or repeated, and large images do not come all at once. A window
    may lie across the end of an epoch.
    """

    def __init__(self, order: Any, keys: np.ndarray, batch_size: int, seed: int) -> None:
        """Sorts nothing yet.

        Args:
          order: random access to int.
          keys: int64[rows of the source], the size of each row.
          batch_size: rows that should be alike.
          seed: of the order of batches in a window.
        """
        self._order, self._keys = order, keys
        self._batch_size, self._seed = batch_size, seed
        self._open()

    def _open(self) -> None:
        self._kept: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_SENT}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __getitem__(self, index: int) -> int:
        window, at = divmod(index, BATCHES_OF_WINDOW * self._batch_size)
        with self._lock:
            if window not in self._kept:
                while len(self._kept) >= _KEPT_WINDOWS:
                    del self._kept[next(iter(self._kept))]
                self._kept[window] = self._sorted(window)
            return int(self._kept[window][at])

    def _sorted(self, window: int) -> np.ndarray:
        size = BATCHES_OF_WINDOW * self._batch_size
        rows = np.asarray([self._order[i] for i in range(window * size, (window + 1) * size)])
        rows = rows[np.argsort(self._keys[rows], kind="stable")]
        batches = rows.reshape(BATCHES_OF_WINDOW, self._batch_size)
        rng = np.random.default_rng([self._seed, window])
        return batches[rng.permutation(BATCHES_OF_WINDOW)].reshape(-1)


class WholeBatches:
    """An endless order without the last, incomplete batch of each epoch, as in the release.

    Another epoch leaves out other rows, since each is shuffled anew.
    """

    def __init__(self, order: Any, rows: int, batch_size: int) -> None:
        """Reads nothing.

        Args:
          order: random access to int, `rows` of an epoch after those of another.
          rows: at least `batch_size`.
          batch_size: of a whole batch.
        """
        self._order, self._rows = order, rows
        self._kept = rows // batch_size * batch_size

    def __getitem__(self, index: int) -> int:
        epoch, at = divmod(index, self._kept)
        return int(self._order[epoch * self._rows + at])


_NOT_SENT = ("_kept", "_lock")


def _derived(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
