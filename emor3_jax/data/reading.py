"""Rows of a source by number, encoded, in threads or in worker processes."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from emor3_jax.data.batch import Example
from emor3_jax.data.encode import Encoder, Skip
from emor3_jax.data.order import ShuffleGroup
from emor3_jax.data.sources import Source


class FoundRow(NamedTuple):
    """The row found for one index of a batch, or none, and the rows left out on the way."""

    example: Example | None
    skips: tuple[Skip, ...] = ()


class RowReader:
    """Rows of an order by number, as grain wants them: this host's rows of each batch, encoded.

    Number n is row `n % len(host_rows)` of batch `n // len(host_rows)`, counted from `start` on.
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        order: Any,
        *,
        batch_size: int,
        host_rows: Sequence[int],
        start: int = 0,
        end: int = sys.maxsize,
        spare: "SpareRows | None" = None,
    ) -> None:
        """Reads nothing yet.

        Args:
          source, encoder: rows, and what encodes them.
          order: position → index of a row.
          batch_size: of all hosts together.
          host_rows: rows of each batch that this host reads.
          start, end: positions of the order to read.
          spare: rows that stand in for damaged ones; None leaves their places empty.
        """
        self._source, self._encoder, self._order, self._spare = source, encoder, order, spare
        self._batch_size, self._host_rows = batch_size, host_rows
        self._start, self._end = start, end

    def __len__(self) -> int:
        """Returns the number of rows of this host."""
        return min(-(-(self._end - self._start) // self._batch_size), 2**40) * len(self._host_rows)

    def __getitem__(self, number: int) -> FoundRow:
        """Returns a row by its number."""
        batch, index = divmod(int(number), len(self._host_rows))
        position = self._start + batch * self._batch_size + int(self._host_rows[index])
        return self.read(position) if position < self._end else FoundRow(None)

    def read(self, position: int) -> FoundRow:
        """Returns the row at a position of the order, or the first usable one that may stand in."""
        skips, first = [], int(self._order[position])
        others = self._spare.rows(position, first) if self._spare else ()
        for index in itertools.chain((first,), others):
            found = self._encoder((position, self._source[index]))
            if not isinstance(found, Skip):
                return FoundRow(found, tuple(skips))
            skips.append(found)
        return FoundRow(None, tuple(skips))

    def __repr__(self) -> str:
        """Names the source, by which grain tells data sets apart."""
        return f"{self._source.name} from {self._start}"


class SpareRows:
    """Rows that may replace a damaged one: its group's, then all, from a drawn one on."""

    def __init__(self, groups: Sequence[ShuffleGroup], seed: int) -> None:
        """Takes the groups of usable rows, and the seed of the draw."""
        self._groups, self._seed = [group.indices for group in groups], seed

    def rows(self, position: int, damaged: int) -> Iterator[int]:
        """Returns all usable rows but the damaged one, those of its group first."""
        rng = np.random.default_rng([self._seed, position])
        own = [rows for rows in self._groups if damaged in rows]
        for rows in (*own, np.concatenate(self._groups)):
            yield from (
                int(i) for i in np.roll(rows, -int(rng.integers(len(rows)))) if i != damaged
            )


def advance(iterator: Any) -> Any:
    """Advances one of grain's iterators; returns None at its end.

    Processes that are started here leave the signals to this one: it ends them, after a stop signal
    to the whole group too.
    """
    stops = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        return next(iterator, None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)


def end_with_parent(*_: int) -> None:
    """Ends this worker process when the one that started it has ended, in whatever way."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
