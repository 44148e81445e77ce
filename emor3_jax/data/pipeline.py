"""Batches: rows read, checked, cut into patches, shuffled and padded, by grain.

    batches = train_batches(source, policy.processor, templates.set, labels, ...)
    batch, ids = next(batches)

A row that cannot be used is left out, counted by reason and named in the log once. What its texts
show is found before the run starts; a damaged image when its row is first read, and another row
of its group, drawn by the seed and the position, stands in for it. So neither the shape of a batch
nor the other rows depend on it, nor on timing.

A thread makes the next training batch while the one before it is used.

A position in the data is one number, the index in the endless order (`data/order.py`) where the
next batch begins: it depends neither on the number of worker processes nor on that of hosts.

With several hosts each reads the rows of a batch that its devices hold; they tell each other
what they have left out, the ids of their rows and the size that these need, so that all hold the
same batch, cut, in the same shape as one host would.

Deviations, numbered:
 1. A damaged image stops the release; here its row is left out. Over-long prompts are left out as
    there, or, with `cut_questions`, the end of their question.
 2. Images of a row must be exactly one; the release's schema allows a list.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from emor3_jax.data.batch import Example, Prompts, collate, size_of, smallest
from emor3_jax.data.encode import REASONS, Encoder, check_fit
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import check_labels, normalize
from emor3_jax.data.order import WholeBatches, Windows, make_groups, shuffled
from emor3_jax.data.prefix import PrefixEncoder
from emor3_jax.data.reading import FoundRow, RowReader, SpareRows, advance, end_with_parent
from emor3_jax.data.sources import Source, Texts, sizes_of
from emor3_jax.data.stats import RowStats
from emor3_jax.models.errors import ImageError
from emor3_jax.models.processor import Processor
from emor3_jax.parallel import hosts

logger = logging.getLogger(__name__)

# Rows of one reason that the log names at once.
_NAMED = 20
Exchange = Callable[[Any], list[Any]]
"""Gives plain data to all hosts and returns what each has given."""

READ_AHEAD = 64
"""Rows that are read ahead, at most, by all processes: a large image is 25 MB in bfloat16."""


class BatchSpec(NamedTuple):
    """Settings of batches.

    Attributes:
      batch_size: `B`, of all hosts together.
      prompt_lengths: rising choices of `P`.
      image_windows: rising choices of `W`.
      workers: processes that read and decode; 0 does it in threads of this one.
      host_rows: rows of each batch that this host reads (`mesh.host_rows`); None is all.
      exchange: tells other hosts of this one's rows; None is `hosts.exchange`, for training batches
        on a channel of their own.
      graded: accuracy by soft labels (`Batch.grades`); rows without usable shares are left out.
      cut_questions: the end of a question that makes a prompt too long is cut; else its row is left
        out.
      read_ahead: rows that are decoded while a batch is used, at most a batch of them.
      drop_last: in training, each epoch of a single shuffled group ends with its last whole batch;
        groups that take turns have no common epoch, and nothing is dropped.
      learnable: whether a row has a response to learn; other rows are left out. None takes all.
      prefixes: encodes images for a judge too; None where all read the same prompts.
    """

    batch_size: int
    prompt_lengths: Sequence[int]
    image_windows: Sequence[int]
    workers: int = 0
    host_rows: Sequence[int] | None = None
    exchange: Exchange | None = None
    graded: bool = False
    cut_questions: bool = False
    read_ahead: int = READ_AHEAD
    drop_last: bool = False
    learnable: Callable[[Texts], bool] | None = None
    prefixes: PrefixEncoder | None = None


class _Assembled(NamedTuple):
    """This host's part of a batch, and what all hosts have to say of theirs.

    Attributes:
      prompts: None if a place has no row, nor anything to stand there.
      notes: of each host: the rows that it left out or cut.
    """

    prompts: Prompts | None
    notes: Sequence[dict[str, Any]]


class _Rows:
    """The usable rows of a source and how to make batches of them."""

    def __init__(
        self,
        source: Source,
        processor: Processor,
        template: str,
        labels: Sequence[str],
        spec: BatchSpec,
        parts: "Parts | None" = None,
        sort_by_size: bool = False,
    ) -> None:
        check_fit(processor)
        self.source, self.batch_size, self.workers = source, spec.batch_size, spec.workers
        rows = range(spec.batch_size) if spec.host_rows is None else spec.host_rows
        self.host_rows = list(map(int, rows))
        self._exchange, self._read_ahead = spec.exchange or hosts.exchange, spec.read_ahead
        self.stats = RowStats()
        self._encoder = Encoder(
            processor,
            template,
            check_labels(tuple(labels)),
            max(spec.prompt_lengths),
            max(spec.image_windows),
            spec.graded,
            spec.cut_questions,
            spec.prefixes,
        )
        self._parts = parts or Parts((0, len(source)), (1.0,), (False,))
        self._sort_by_size = sort_by_size
        self._sizes_of_batch = {
            "prompt_lengths": tuple(spec.prompt_lengths),
            "image_windows": tuple(spec.image_windows),
        }
        if spec.prefixes is not None:
            self._sizes_of_batch["judge_windows"] = spec.prefixes.windows
        self._learnable = spec.learnable
        usable, answers, questions = self._scan(labels)
        self.total, self.indices = len(usable), usable
        self.groups = make_groups(usable, answers, *self._parts)
        self._keys = self._sizes(usable, questions) if self._sort_by_size else None
        self.stats.begin_reading()
        self._drop_last = spec.drop_last and len(self.groups) == 1 and self.total >= self.batch_size
        if spec.drop_last and not self._drop_last:
            logger.warning(
                "%s: no batch is dropped at the end of an epoch: %d rows in %d groups, %d a batch",
                *(source.name, self.total, len(self.groups), self.batch_size),
            )
        self.digest = self._digest()

    def _scan(self, labels: Sequence[str]) -> tuple[np.ndarray, list[int], list[int]]:
        """Returns index, label's number and question's length of the rows with usable texts."""
        usable, answers, questions = [], [], []
        name, stats = self.source.name, self.stats
        number = {normalize(label): i for i, label in enumerate(labels)}
        self._ids = hashlib.sha256()
        for index, texts in enumerate(self.source.texts()):
            fault = self._encoder.fault_of_texts(texts)
            if fault is None and self._learnable is not None and not self._learnable(texts):
                fault = "no_response"
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
            logger.info("%s: the image was put first in %d rows", name, stats.images_moved)
        if not usable:
            found = stats.describe() or "it has no rows"
            way_out = "give other labels or another path"
            if stats.counts().get("bad_distribution"):
                way_out += ", or graded=False, which needs no shares"
            raise DataError(
                f"{name}: no usable row for the labels {', '.join(labels)}: {found}; {way_out}"
            )
        return np.asarray(usable, np.int64), answers, questions

    def _sizes(self, usable: np.ndarray, questions: Sequence[int]) -> np.ndarray:
        """Returns int64[rows of the source]: by windows, then by about the prompt's tokens."""
        processor = self._encoder.processor
        keys = np.zeros(len(self.source), np.int64)
        sizes = sizes_of(self.source, usable)
        for index, (height, width), length in zip(usable, sizes, questions, strict=True):
            try:
                _, tokens, bucket = processor.read_sizes(int(height), int(width))
            except (ImageError, ZeroDivisionError):
                continue
            keys[index] = bucket * 2**32 + tokens + length // 4
        return keys

    def _digest(self) -> str:
        """Returns what a position in the order is bound to, besides the seed."""
        digest = self._ids.copy()
        for group in self.groups:
            digest.update(f"{len(group.indices)} {group.weight}\n".encode())
        if self._sort_by_size:
            digest.update(f"by size, {self.batch_size}\n".encode())
        if self._drop_last:
            digest.update(f"whole batches, {self.batch_size}\n".encode())
        return digest.hexdigest()[:16]

    def endless(self, seed: int, start: int) -> Any:
        """Returns an iterator of what is read for endless shuffled batches from a position on."""
        spare = SpareRows(self.groups, seed)
        return self._batches(self._reader(self.order(seed), start=start, spare=spare))

    def order(self, seed: int) -> Any:
        """Returns the endless order of rows, random access to int."""
        order: Any = shuffled(self.groups, seed)
        if self._drop_last:
            order = WholeBatches(order, self.total, self.batch_size)
        if self._keys is not None:
            order = Windows(order, self._keys, self.batch_size, seed)
        return order

    def once(self, limit: int = 0) -> tuple[Any, Iterator[Example]]:
        """Returns an iterator of what is read for batches of each row once, at most `limit` rows.

        And the usable ones among these rows, in their order, read when they are asked for.
        """
        indices = self.indices
        if limit and limit < len(indices):
            # Files are often sorted by label, so their first rows would not stand for the rest.
            picked = np.random.default_rng(0).permutation(len(indices))[:limit]
            indices = indices[np.sort(picked)]
        reader = self._reader(indices, end=len(indices))
        found = (reader.read(position).example for position in range(len(indices)))
        return self._batches(reader), (example for example in found if example is not None)

    def _reader(self, order: Any, **options: Any) -> RowReader:
        size, own = self.batch_size, self.host_rows
        return RowReader(
            self.source, self._encoder, order, batch_size=size, host_rows=own, **options
        )

    def of_rows(self, ids: Sequence[str]) -> Prompts:
        """Returns a batch of rows by their ids, see `TrainBatches`."""
        try:
            indices = [self.source.find(row_id) for row_id in ids]
        except KeyError as error:
            raise DataError(
                f"{self.source.name}: has no row {error}; is it the same data?"
            ) from error
        reader = self._reader(indices, end=len(indices))
        made = self.assemble([reader.read(int(index)) for index in self.host_rows])
        if made.prompts is None or len(ids) != self.batch_size:
            raise DataError(f"{self.source.name}: rows {', '.join(ids)} are no batch of it")
        return made.prompts

    def _batches(self, rows: RowReader) -> Any:
        """Returns grain's iterator of the reads of one batch after the other."""
        threads = min(4, os.cpu_count() or 1)
        ahead = min(len(self.host_rows), self._read_ahead) // max(self.workers, 1)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead))
        stream = grain.MapDataset.source(rows).to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():
                # grain reads its own absl flags before it starts processes.
                flags.FLAGS.mark_as_parsed()
            # Its start unblocks the signals that `advance` keeps from workers: beside the first
            # worker, Ctrl-C would reach that one.
            resource_tracker.ensure_running()
            options = grain.MultiprocessingOptions(num_workers=self.workers)
            stream = stream.mp_prefetch(options, worker_init_fn=end_with_parent)
        return iter(stream.batch(len(self.host_rows), batch_fn=list))

    def assemble(
        self, reads: Sequence[FoundRow], filler: Callable[[], Example | None] = lambda: None
    ) -> _Assembled:
        """Makes this host's part of a batch, in the shape that all hosts agree upon.

        Args:
          reads: for this host's rows of a batch.
          filler: returns what stands where there is no row, None if there is nothing.

        Returns:
          This host's rows, the ids of all hosts' rows, and how many rows there are.

        Raises:
          DataError: if a position has no row, nor anything to stand there.
        """
        found = [read.example for read in reads]
        spare = filler() if None in found else None
        present = [x for x in (*found, spare) if x is not None]
        note = {
            "skips": [skip for read in reads for skip in read.skips],
            "cut": [x.id for x in found if x is not None and x.cut],
            "rows": [[index, x.id] for index, x in zip(self.host_rows, found, strict=True) if x],
            "size": size_of(present) if present else [0] * len(self._sizes_of_batch),
            "empty": None in found and spare is None,
        }
        notes = self._exchange(note)
        if any(each["empty"] for each in notes):
            return _Assembled(None, notes)
        ids = dict(row for each in notes for row in each["rows"])
        agreed = [
            smallest(name, sizes, max(each["size"][i] for each in notes))
            for i, (name, sizes) in enumerate(self._sizes_of_batch.items())
        ]
        batch, _ = collate(
            found,
            self._encoder.processor.layout,
            batch_size=len(self.host_rows),
            prompt_lengths=agreed[:1],
            image_windows=agreed[1:2],
            filler=spare,
            prefixes=self._encoder.prefixes,
            prefix_windows=agreed[-1],
        )
        named = tuple(ids.get(i, "") for i in range(self.batch_size))
        return _Assembled(Prompts(batch, named), notes)

    def take(self, made: _Assembled) -> Prompts:
        """Returns the prompts of a batch that is used now; counts what any host left out or cut.

        Raises:
          DataError: if a place has no row, nor anything to stand there.
        """
        name, stats = self.source.name, self.stats
        for note in made.notes:
            for reason, row_id in note["skips"]:
                if stats.add(reason, row_id):
                    logger.warning("%s: left out %s: %s", name, row_id, REASONS[reason])
            for row_id in note["cut"]:
                if stats.add_cut(row_id):
                    logger.warning("%s: cut the question of %s", name, row_id)
        if made.prompts is None:
            raise DataError(f"{name}: no usable row is left: {stats.describe()}")
        return made.prompts


class TrainBatches:
    """Endless batches in a shuffled order that repeats exactly after `set_state`.

    From the first one on, a thread makes the batch that follows. What it comes across counts, for
    `stats` and for `get_state`, when the batch is asked for.

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
        self._ahead: Future[_Assembled] | None = None

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Prompts:
        prompts = self._rows.take((self._ahead or self._start()).result())
        self._position += self._rows.batch_size
        self._ahead = self._start()
        return prompts

    def _start(self) -> "Future[_Assembled]":
        """Begins to make the batch that is next in the order."""
        iterator, made = self._iterator, Future()

        def read() -> None:
            try:
                with jax.profiler.TraceAnnotation("make batch"):
                    made.set_result(self._rows.assemble(advance(iterator)))
            except BaseException as error:
                made.set_exception(error)

        # It may wait for other hosts, so nothing waits for it where a program ends early.
        threading.Thread(target=read, name="make batch", daemon=True).start()
        return made

    def preview(self, count: int) -> list[list[int]]:
        """Returns the rows of the first `count` batches, as if no image were damaged."""
        order, size = self._rows.order(self._seed), self._rows.batch_size
        return [[int(order[i * size + j]) for j in range(size)] for i in range(count)]

    def of_rows(self, ids: Sequence[str]) -> Prompts:
        """Returns the batch of these rows, as many as a batch has; it counts for nothing.

        Raises:
          DataError: if one of them is not there, or cannot be used.
        """
        return self._rows.of_rows(ids)

    def get_state(self) -> dict[str, Any]:
        """Returns where the next batch begins, as plain data that fits JSON."""
        found = self.stats.found_in_reading()
        return {"position": self._position, **self._fixed, **({"left_out": found} if found else {})}

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
        self.stats.restore(state.get("left_out", {}))
        self._iterator = self._rows.endless(self._seed, self._position)

    def close(self) -> None:
        """Ends the threads and processes that read ahead; waits for the batch that is being made.

        Other hosts may be making their part of it.
        """
        if self._ahead is not None:
            self._ahead.exception()
            self._ahead = None
        self._iterator.close()


class EvalBatches:
    """Every usable row once, in the order of the source; can be gone through again.

    The last batch is filled up with rows of weight 0.

    Attributes:
      stats: the rows left out so far.
      rows: usable rows of the source.
      size: rows of one pass.
    """

    def __init__(self, rows: _Rows, limit: int = 0) -> None:
        self.stats, self.rows = rows.stats, rows.total
        self.size = min(limit, rows.total) if limit else rows.total
        self._rows, self._limit = rows, limit

    def take(self, limit: int) -> "EvalBatches":
        """Returns at most `limit` of these rows (0: no fewer), the same ones at every call."""
        limits = [x for x in (limit, self._limit) if x]
        return EvalBatches(self._rows, min(limits, default=0))

    def __iter__(self) -> Iterator[Prompts]:
        rows = self._rows
        iterator, usable = rows.once(self._limit)
        kept: list[Example | None] = []

        def filler() -> Example | None:
            if not kept:
                kept.append(next(usable, None))
            return kept[0]

        try:
            while (reads := advance(iterator)) is not None:
                yield rows.take(rows.assemble(reads, filler))
        finally:
            iterator.close()


class Parts(NamedTuple):
    """The order in which parts of a joined source take turns in training.

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
    processor: Processor,
    template: str,
    labels: Sequence[str],
    spec: BatchSpec,
    *,
    seed: int,
    parts: Parts | None = None,
    sort_by_size: bool = False,
) -> TrainBatches:
    """Returns endless batches, reshuffled by (seed, epoch).

    Args:
      source: the rows.
      processor: of the policy.
      template: the `set` template.
      labels: the label set.
      spec: of the batches.
      seed: of the order, 0 to 2**32 - 1.
      parts: how the parts of the source take turns; None is one part in its own proportions.
      sort_by_size: rows of like size are put into a batch.

    Raises:
      DataError: if no row can be used, or the processor does not fit the policy.
    """
    exchange = spec.exchange or partial(hosts.exchange, channel="training batches")
    spec = spec._replace(exchange=exchange)
    rows = _Rows(source, processor, template, labels, spec, parts, sort_by_size)
    return TrainBatches(rows, seed)


def eval_batches(
    source: Source,
    processor: Processor,
    template: str,
    labels: Sequence[str],
    spec: BatchSpec,
    *,
    limit: int = 0,
) -> EvalBatches:
    """Returns each row once, in batches of equal size.

    Args:
      source, processor, template, labels, spec: as in `train_batches`.
      limit: at most so many rows of all hosts together, drawn once and for all; 0 is all.

    Raises:
      DataError: as `train_batches`.
    """
    return EvalBatches(_Rows(source, processor, template, labels, spec), limit)
