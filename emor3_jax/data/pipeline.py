"""Batches: rows read, checked, cut into patches, shuffled and padded, by grain.

    batches = train_batches(source, policy.config, policy.processor, templates.set, labels, ...)
    batch, ids = next(batches)

A row that cannot be used is left out, counted by reason and named in the log once. What its texts
show is found before the run starts; a damaged picture when its row is first read, and the next row
of the shuffled order takes its place, so that neither the shape of a batch nor the order of the
others depends on timing.

A position in the data is one number, the index in the endless order (`data/order.py`) of the row
after the last one used: it does not depend on worker processes, which deliver rows in order.

Deviations, numbered:
 1. The release lets an over-long prompt or a damaged picture stop the run or cuts it short; here
    such rows are left out, or, with `cut_questions`, the end of the question.
 2. Pictures of a row must be exactly one; the release's schema allows a list.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from emor3_jax.data.batch import Batch, Example, collate
from emor3_jax.data.encode import REASONS, Encoder, Skip, check_fit
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import check_labels, normalize
from emor3_jax.data.order import Group, Windows, make_groups, shuffled
from emor3_jax.data.sources import Row, Source, sizes_of
from emor3_jax.data.stats import RowStats
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.layout import count_windows
from emor3_jax.models.qwen2_5_vl.processor import ImageError, Processor

logger = logging.getLogger(__name__)

# Rows of one reason that the log names at once.
_NAMED = 20
READ_AHEAD = 64
"""Rows that are read ahead, at most, by all processes: a large picture is 100 MB of patches."""


class _Stream:
    """Rows by their position in an order, from one position on, as grain wants them."""

    def __init__(self, source: Source, order: Any, start: int, end: int) -> None:
        self._source, self._order = source, order
        self._start, self._end = start, end

    def __len__(self) -> int:
        return self._end - self._start

    def __getitem__(self, index: int) -> tuple[int, Row]:
        position = self._start + int(index)
        return position, self._source[int(self._order[position])]

    def __repr__(self) -> str:
        return f"{self._source.name} from {self._start}"


class _Keep:
    """Lets examples pass and counts the rows left out, in the process that trains."""

    def __init__(self, stats: RowStats, name: str, rows: int) -> None:
        self._stats, self._name, self._rows = stats, name, rows
        self._in_a_row: set[str] = set()

    def __call__(self, element: Example | Skip) -> bool:
        if not isinstance(element, Skip):
            self._in_a_row.clear()
            if element.cut and self._stats.add_cut(element.id):
                logger.warning("%s: cut the question of %s", self._name, element.id)
            return True
        self._in_a_row.add(element.id)
        if self._stats.add(*element):
            logger.warning("%s: left out %s: %s", self._name, element.id, REASONS[element.reason])
        if len(self._in_a_row) >= self._rows:
            raise DataError(f"{self._name}: no usable row is left: {self._stats.describe()}")
        return False


class _Rows:
    """The usable rows of a source and how to make batches of them."""

    def __init__(
        self,
        source: Source,
        config: Config,
        processor: Processor,
        template: str,
        labels: Sequence[str],
        *,
        batch_size: int,
        prompt_lengths: Sequence[int],
        image_windows: Sequence[int],
        workers: int,
        shard: tuple[int, int],
        graded: bool,
        cut_questions: bool,
        parts: "Parts | None" = None,
        sort_by_size: bool = False,
        read_ahead: int,
    ) -> None:
        check_fit(config, processor)
        shard_index, self.shards = shard
        if not 0 <= shard_index < self.shards:
            raise DataError(f"shard={shard}: must be (index, count) with index below count")
        if self.shards > 1:
            # Hosts do not see each other's rows and must agree on one shape.
            prompt_lengths, image_windows = (max(prompt_lengths),), (max(image_windows),)
        self.source, self.batch_size, self.workers = source, batch_size, workers
        self._read_ahead = read_ahead
        self.stats = RowStats()
        self._encoder = Encoder(
            config,
            processor,
            template,
            check_labels(tuple(labels)),
            max(prompt_lengths),
            max(image_windows),
            graded,
            cut_questions,
        )
        self._parts = parts or Parts((0, len(source)), (1.0,), (False,))
        # Hosts pad to one shape in any case.
        self._sort_by_size = sort_by_size and self.shards == 1
        self._collate = partial(
            collate,
            batch_size=batch_size,
            prompt_lengths=tuple(prompt_lengths),
            image_windows=tuple(image_windows),
        )
        usable, answers, questions = self._scan(labels)
        self.total = len(usable)
        self.indices = usable[shard_index :: self.shards]
        groups = make_groups(usable, answers, *self._parts)
        self.groups = [Group(g.indices[shard_index :: self.shards], g.weight) for g in groups]
        fewest = min(len(group.indices) for group in groups)
        if fewest < self.shards:
            raise DataError(
                f"{source.name}: {fewest} usable rows are too few for {self.shards} hosts"
            )
        self._keys = self._sizes(usable, questions) if self._sort_by_size else None
        self.digest = self._digest()

    def _scan(self, labels: Sequence[str]) -> tuple[np.ndarray, list[int], list[int]]:
        """Returns index, label's number and question's length of the rows with usable texts."""
        usable, answers, questions = [], [], []
        name, stats = self.source.name, self.stats
        number = {normalize(label): i for i, label in enumerate(labels)}
        self._ids = hashlib.sha256()
        for index, texts in enumerate(self.source.texts()):
            fault = self._encoder.fault_of_texts(texts)
            if fault is None:
                usable.append(index)
                answers.append(number[normalize(texts.answer)])
                questions.append(len(texts.question))
                self._ids.update(f"{texts.id}\n".encode())
                stats.images_moved += texts.image_moved
            else:
                stats.add(fault, texts.id)
        for reason, count in stats.counts().items():
            if count:
                ids = stats.ids(reason)
                named = ", ".join(ids[:_NAMED]) + (", …" if count > _NAMED else "")
                logger.warning("%s: left out %d rows, %s: %s", name, count, REASONS[reason], named)
        if stats.images_moved:
            logger.info("%s: the picture was put first in %d rows", name, stats.images_moved)
        if not usable:
            found = stats.describe() or "it has no rows"
            raise DataError(
                f"{name}: no usable row for the labels {', '.join(labels)}: {found}; give other "
                "labels or another path"
            )
        return np.asarray(usable, np.int64), answers, questions

    def _sizes(self, usable: np.ndarray, questions: Sequence[int]) -> np.ndarray:
        """Returns int64[rows of the source]: by windows, then by about the prompt's tokens."""
        config, images = self._encoder.config.vision, self._encoder.images
        keys = np.zeros(len(self.source), np.int64)
        sizes = sizes_of(self.source, usable)
        for index, (height, width), length in zip(usable, sizes, questions, strict=True):
            try:
                down, across = images.smart_resize(int(height), int(width))
            except (ImageError, ZeroDivisionError):
                continue
            grid = (1, down // images.patch_size, across // images.patch_size)
            tokens = grid[1] * grid[2] // config.merge_unit + length // 4
            keys[index] = count_windows(grid, config) * 2**32 + tokens
        return keys

    def _digest(self) -> str:
        """Returns what a position in the order is bound to, besides the seed."""
        digest = self._ids.copy()
        for group in self.groups:
            digest.update(f"{len(group.indices)} {group.weight}\n".encode())
        if self._sort_by_size:
            digest.update(f"by size, {self.batch_size}\n".encode())
        return digest.hexdigest()[:16]

    def endless(self, seed: int, start: int) -> Any:
        """Returns an iterator of endless shuffled batches from a position on."""
        return self._batches(_Stream(self.source, self.order(seed), start, sys.maxsize))

    def order(self, seed: int) -> Any:
        """Returns the endless order of rows, random access to int."""
        order: Any = shuffled(self.groups, seed)
        if self._keys is not None:
            order = Windows(order, self._keys, self.batch_size, seed)
        return order

    def once(self, limit: int = 0) -> Any:
        """Returns an iterator of the rows of this host in their order, at most `limit` of them."""
        indices = self.indices
        if limit and limit < len(indices):
            # Files are often sorted by label, so their first rows would not stand for the rest.
            picked = np.random.default_rng(0).permutation(len(indices))[:limit]
            indices = indices[np.sort(picked)]
        return self._batches(_Stream(self.source, indices, 0, len(indices)))

    def _batches(self, rows: _Stream) -> Any:
        """Returns grain's iterator of (batch, ids, position after the last row)."""
        threads = min(4, os.cpu_count() or 1)
        ahead = min(self.batch_size, self._read_ahead) // max(self.workers, 1)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead))
        stream = grain.MapDataset.source(rows).map(self._encoder).to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():
                # grain reads its own absl flags before it starts processes.
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        kept = stream.filter(_Keep(self.stats, self.source.name, len(self.indices)))
        return iter(kept.batch(self.batch_size, batch_fn=self._with_position))

    def _with_position(self, examples: Sequence[Example]) -> tuple[Batch, tuple[str, ...], int]:
        return *self._collate(examples), examples[-1].position + 1


class TrainBatches:
    """Endless batches in a shuffled order that repeats exactly after `set_state`.

    Attributes:
      stats: the rows left out so far.
      rows: usable rows of the source.
    """

    def __init__(self, rows: _Rows, seed: int) -> None:
        self.stats, self.rows = rows.stats, rows.total
        self._rows, self._seed = rows, seed
        self._fixed = {"rows": rows.total, "seed": seed, "order": rows.digest}
        self._position = 0
        self._iterator = rows.endless(seed, 0)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> tuple[Batch, tuple[str, ...]]:
        batch, ids, self._position = next(self._iterator)
        return batch, ids

    def preview(self, count: int) -> list[list[int]]:
        """Returns the rows of the first `count` batches, as if no picture were damaged."""
        order, size = self._rows.order(self._seed), self._rows.batch_size
        return [[int(order[i * size + j]) for j in range(size)] for i in range(count)]

    def get_state(self) -> dict[str, Any]:
        """Returns where the next batch begins, as plain data that fits JSON."""
        return {"position": self._position, **self._fixed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called, so that the same batches follow.

        Raises:
          DataError: if that was with other rows, another seed, or rows in another order.
        """
        for field, now in self._fixed.items():
            if state.get(field) != now:
                raise DataError(
                    f"{self._rows.source.name}: the run to go on from had "
                    f"{field}={state.get(field)}, now it is {now}; use the same data, weights and "
                    "seed, or another workdir"
                )
        self.close()
        self._position = state["position"]
        self._iterator = self._rows.endless(self._seed, self._position)

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        self._iterator.close()


class EvalBatches:
    """Every usable row once, in the order of the source; can be gone through again.

    The last batch is filled up with rows of weight 0.

    Attributes:
      stats: the rows left out so far.
      rows: usable rows of the source.
    """

    def __init__(self, rows: _Rows, limit: int = 0) -> None:
        self.stats, self.rows = rows.stats, rows.total
        self._rows, self._limit = rows, limit

    def take(self, limit: int) -> "EvalBatches":
        """Returns at most `limit` of these rows (0: no fewer), the same ones at every call."""
        limits = [x for x in (limit, self._limit) if x]
        return EvalBatches(self._rows, min(limits, default=0))

    def __iter__(self) -> Iterator[tuple[Batch, tuple[str, ...]]]:
        rows = self._rows
        limit = -(-self._limit // rows.shards)
        iterator = rows.once(limit)
        count, last = 0, None
        try:
            for batch, ids, _ in iterator:
                last = batch
                yield batch, ids
                count += 1
        finally:
            iterator.close()
        if rows.shards > 1 and last is not None:
            # Every host takes part in as many batches as the one with most rows.
            most = -(-rows.total // rows.shards)
            most = min(most, limit) if limit else most
            filler = last._replace(weight=np.zeros_like(last.weight))
            for _ in range(-(-most // rows.batch_size) - count):
                yield filler, ("",) * rows.batch_size


class Parts(NamedTuple):
    """How the parts of a joined source take turns in training.

    Attributes:
      starts: where each part begins, and the end of the last one.
      weights: of the parts, relative to each other.
      balanced: of each part, whether its labels have equal turns.
    """

    starts: Sequence[int]
    weights: Sequence[float]
    balanced: Sequence[bool]


def train_batches(
    source: Source,
    config: Config,
    processor: Processor,
    template: str,
    labels: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    prompt_lengths: Sequence[int],
    image_windows: Sequence[int],
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    graded: bool = False,
    cut_questions: bool = False,
    parts: Parts | None = None,
    sort_by_size: bool = False,
    read_ahead: int = READ_AHEAD,
) -> TrainBatches:
    """Returns endless batches, reshuffled by (seed, epoch).

    Args:
      source: the rows.
      config: of the policy.
      processor: of the policy.
      template: the `set` template.
      labels: the label set.
      batch_size: `B`, on this host.
      seed: of the order, 0 to 2**32 - 1.
      prompt_lengths: rising choices of `P`.
      image_windows: rising choices of `W`.
      workers: processes that read and decode; 0 does it in threads of this one.
      shard: (index, count) of this host among those that share the rows; with several, batches
        always have the largest `P` and `W`.
      graded: whether an answer is worth its label's share among raters (`Batch.grades`); rows
        without usable shares are left out.
      cut_questions: whether the end of a question that makes a prompt too long is cut, rather than
        its row left out.
      parts: how the parts of the source take turns; None is one part in its own proportions.
      sort_by_size: whether rows of like size are put into a batch; of no effect with several hosts.
      read_ahead: rows that are decoded while a batch is used, at most a batch of them.

    Raises:
      DataError: if no row can be used, or the processor does not fit the policy.
    """
    rows = _Rows(
        source,
        config,
        processor,
        template,
        labels,
        batch_size=batch_size,
        prompt_lengths=prompt_lengths,
        image_windows=image_windows,
        workers=workers,
        shard=shard,
        graded=graded,
        cut_questions=cut_questions,
        parts=parts,
        sort_by_size=sort_by_size,
        read_ahead=read_ahead,
    )
    return TrainBatches(rows, seed)


def eval_batches(
    source: Source,
    config: Config,
    processor: Processor,
    template: str,
    labels: Sequence[str],
    *,
    batch_size: int,
    prompt_lengths: Sequence[int],
    image_windows: Sequence[int],
    limit: int = 0,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    graded: bool = False,
    cut_questions: bool = False,
    read_ahead: int = READ_AHEAD,
) -> EvalBatches:
    """Returns each row once, in batches of equal size.

    Args:
      source, config, processor, template, labels, batch_size, prompt_lengths, image_windows,
        workers, shard, graded, cut_questions, read_ahead: as in `train_batches`.
      limit: at most so many rows of all hosts together, drawn once and for all; 0 is all.

    Raises:
      DataError: as `train_batches`.
    """
    rows = _Rows(
        source,
        config,
        processor,
        template,
        labels,
        batch_size=batch_size,
        prompt_lengths=prompt_lengths,
        image_windows=image_windows,
        workers=workers,
        shard=shard,
        graded=graded,
        cut_questions=cut_questions,
        read_ahead=read_ahead,
    )
    return EvalBatches(rows, limit)
