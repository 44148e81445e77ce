"""Batches: rows read, checked, cut into patches, shuffled and padded, by grain.

    batches = train_batches(source, policy.config, policy.processor, templates.set, labels, ...)
    batch, ids = next(batches)

A row that cannot be used is left out, counted by reason and named in the log once. What its texts
show is found before the run starts; a damaged picture when its row is first read, and the next row
of the shuffled order takes its place, so that neither the shape of a batch nor the order of the
others depends on timing.

Deviations, numbered:
 1. The release lets an over-long prompt or a damaged picture stop the run or cuts it short; here
    such rows are left out.
 2. Pictures of a row must be exactly one; the release's schema allows a list.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from emor3_jax.data import prompts
from emor3_jax.data.batch import Batch, Example, collate
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import check_labels, label_grades, normalize
from emor3_jax.data.sources import Row, Source, Texts
from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.layout import count_windows, window_layout
from emor3_jax.models.qwen2_5_vl.processor import ImageError, Processor
from emor3_jax.models.qwen2_5_vl.rope import prompt_positions

logger = logging.getLogger(__name__)

REASONS = {
    "missing_field": "a field is null, or the row has no picture",
    "several_images": "more than one picture",
    "empty_question": "nothing is asked",
    "special_token": "the question spells out a special token of the policy",
    "unknown_answer": "the answer is no label of the label set",
    "bad_distribution": "graded accuracy needs shares of the labels, none negative, not all 0",
    "unreadable_image": "the picture cannot be decoded or is too thin",
    "large_image": "the picture has more windows than the largest of data.image_windows",
    "long_question": "the prompt has more tokens than the largest of data.prompt_lengths",
}
"""Why a row is left out."""

# Rows of one reason that the log names at once.
_NAMED = 20
# Rows that are read ahead, at most: a large picture is 100 MB of patches.
_READ_AHEAD = 64


class RowStats:
    """Counts of the rows that were left out."""

    def __init__(self) -> None:
        self._ids: dict[str, dict[str, None]] = {reason: {} for reason in REASONS}
        self.images_moved = 0

    def add(self, reason: str, row_id: str) -> bool:
        """Counts a row once; returns whether it is new."""
        new = row_id not in self._ids[reason]
        self._ids[reason][row_id] = None
        return new

    def counts(self) -> dict[str, int]:
        """Returns the number of rows left out for each reason, all reasons included."""
        return {reason: len(ids) for reason, ids in self._ids.items()}

    def ids(self, reason: str) -> list[str]:
        """Returns the ids of the rows left out for a reason, in the order of their discovery."""
        return list(self._ids[reason])

    def describe(self) -> str:
        """Returns the reasons that occurred with numbers and examples, for a message."""
        found = [(reason, list(ids)) for reason, ids in self._ids.items() if ids]
        return "; ".join(
            f"{len(ids)} {reason} ({REASONS[reason]}): {', '.join(ids[:3])}"
            + (", …" if len(ids) > 3 else "")
            for reason, ids in found
        )


class _Skip(NamedTuple):
    """Stands in the stream for a row that cannot be used."""

    reason: str
    id: str


@dataclasses.dataclass(frozen=True)
class _Picked:
    """The usable rows of a source, as grain wants them."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.indices[index])]

    def __repr__(self) -> str:
        return f"{self.source.name}[{len(self)} rows]"


class _Encoder:
    """Turns a row into an `Example`, or says why not; runs in worker processes too."""

    def __init__(
        self,
        config: Config,
        processor: Processor,
        template: str,
        labels: tuple[str, ...],
        max_tokens: int,
        max_windows: int,
        graded: bool = False,
    ) -> None:
        self._config, self._processor = config, processor
        self._template, self._labels = template, labels
        self._index = {normalize(label): i for i, label in enumerate(labels)}
        self._max_tokens, self._max_windows, self._graded = max_tokens, max_windows, graded

    def fault_of_texts(self, texts: Texts) -> str | None:
        """Returns why a row cannot be used, as far as its texts show; None if it can."""
        if texts.question is None or texts.answer is None:
            return "missing_field"
        if texts.images_named > 1:
            return "several_images"
        if not texts.question:
            return "empty_question"
        if prompts.special_token_in(self._processor.tokenizer, texts.question):
            return "special_token"
        if normalize(texts.answer) not in self._index:
            return "unknown_answer"
        if self._graded and self._grades(texts) is None:
            return "bad_distribution"
        return None

    def _grades(self, texts: Texts) -> np.ndarray | None:
        """Returns what each label is worth, float32[K]; None where the shares say nothing."""
        if not self._graded:
            return np.eye(len(self._labels), dtype=np.float32)[self._index[normalize(texts.answer)]]
        return label_grades(texts.distribution or (), self._index)

    def __call__(self, row: Any) -> Example | _Skip:
        """Encodes one row whose texts have no fault."""
        texts = row.texts
        if len(row.images) != 1 or row.images[0] is None:
            reason = "several_images" if len(row.images) > 1 else "missing_field"
            return _Skip(reason, texts.id)
        try:
            patches, grid = self._processor.patches(row.images[0])
        except ImageError:
            return _Skip("unreadable_image", texts.id)
        vision, tokenizer = self._config.vision, self._processor.tokenizer
        if count_windows(grid, vision) > self._max_windows:
            return _Skip("large_image", texts.id)
        n_image_tokens = len(patches) // vision.merge_unit
        tokens = np.asarray(
            prompts.render_prompt(
                tokenizer, self._template, texts.question, self._labels, n_image_tokens
            ),
            np.int32,
        )
        in_prompt = int(np.sum(tokens == self._config.image_token_id))
        if in_prompt != n_image_tokens:
            raise DataError(
                f"{texts.id}: the prompt has {in_prompt} image tokens, but the picture of "
                f"{grid[1]} x {grid[2]} patches has {n_image_tokens} features; the chat template "
                f"must show the picture once, as one {prompts.IMAGE_TOKEN}"
            )
        # The last token is not part of the padded prompt.
        if len(tokens) - 1 > self._max_tokens:
            return _Skip("long_question", texts.id)
        positions, _ = prompt_positions(tokens, [grid], self._config)
        return Example(
            tokens=tokens,
            positions=positions,
            image=window_layout(patches, grid, vision),
            image_start=int(np.argmax(tokens == self._config.image_token_id)),
            shared_length=prompts.shared_length(tokenizer, tokens),
            answer=self._index[normalize(texts.answer)],
            grades=self._grades(texts),
            id=texts.id,
        )


def encode_row(
    row: Row, config: Config, processor: Processor, template: str, labels: Sequence[str]
) -> Example:
    """Returns one row as the policy reads it, of any length and size.

    Args:
      row: the row.
      config, processor: of the policy.
      template: the `set` template.
      labels: the label set.

    Raises:
      DataError: if the row cannot be used, with the reason.
    """
    unbounded = 2**30
    encoder = _Encoder(
        config, processor, template, check_labels(tuple(labels)), unbounded, unbounded
    )
    fault = encoder.fault_of_texts(row.texts)
    example = _Skip(fault, row.texts.id) if fault else encoder(row)
    if isinstance(example, _Skip):
        raise DataError(f"{example.id}: {example.reason}: {REASONS[example.reason]}")
    return example


class _Keep:
    """Lets examples pass and counts the rows left out, in the process that trains."""

    def __init__(self, stats: RowStats, name: str, rows: int) -> None:
        self._stats, self._name, self._rows = stats, name, rows
        self._in_a_row = 0

    def __call__(self, element: Example | _Skip) -> bool:
        if not isinstance(element, _Skip):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        if self._stats.add(*element):
            logger.warning("%s: left out %s: %s", self._name, element.id, REASONS[element.reason])
        if self._in_a_row >= self._rows:
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
    ) -> None:
        _check_fit(config, processor)
        shard_index, self.shards = shard
        if not 0 <= shard_index < self.shards:
            raise DataError(f"shard={shard}: must be (index, count) with index below count")
        if self.shards > 1:
            # Hosts do not see each other's rows and must agree on one shape.
            prompt_lengths, image_windows = (max(prompt_lengths),), (max(image_windows),)
        self.source, self.batch_size, self.workers = source, batch_size, workers
        self.stats = RowStats()
        self._encoder = _Encoder(
            config,
            processor,
            template,
            check_labels(tuple(labels)),
            max(prompt_lengths),
            max(image_windows),
            graded,
        )
        self._collate = partial(
            collate,
            batch_size=batch_size,
            prompt_lengths=tuple(prompt_lengths),
            image_windows=tuple(image_windows),
        )
        usable = self._scan(labels)
        self.total = len(usable)
        self.indices = usable[shard_index :: self.shards]
        if not len(self.indices):
            raise DataError(
                f"{source.name}: {self.total} usable rows are too few for {self.shards} hosts"
            )

    def _scan(self, labels: Sequence[str]) -> np.ndarray:
        """Returns the indices of the rows whose texts can be used."""
        usable = []
        name, stats = self.source.name, self.stats
        for index, texts in enumerate(self.source.texts()):
            fault = self._encoder.fault_of_texts(texts)
            if fault is None:
                usable.append(index)
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
        return np.asarray(usable, np.int64)

    def batches(self, *, seed: int | None, limit: int = 0) -> Any:
        """Returns grain's iterator: shuffled and endless with a seed, else once in order."""
        indices = self.indices
        if limit and limit < len(indices):
            # Files are often sorted by label, so their first rows would not stand for the rest.
            picked = np.random.default_rng(0).permutation(len(indices))[:limit]
            indices = indices[np.sort(picked)]
        dataset = grain.MapDataset.source(_Picked(self.source, indices))
        if seed is not None:
            dataset = dataset.seed(seed).shuffle().repeat()
        threads = min(4, os.cpu_count() or 1)
        options = grain.ReadOptions(
            num_threads=threads,
            prefetch_buffer_size=max(threads, min(self.batch_size, _READ_AHEAD)),
        )
        stream = dataset.map(self._encoder).to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():
                # grain reads its own absl flags before it starts processes.
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        stream = stream.filter(_Keep(self.stats, self.source.name, len(indices)))
        return iter(stream.batch(self.batch_size, batch_fn=self._collate))


class TrainBatches:
    """Endless batches in a shuffled order that repeats exactly after `set_state`.

    Attributes:
      stats: the rows left out so far.
      rows: usable rows of the source.
    """

    def __init__(self, rows: _Rows, seed: int) -> None:
        self.stats, self.rows = rows.stats, rows.total
        self._name = rows.source.name
        self._fixed = {"rows": rows.total, "seed": seed, "workers": rows.workers}
        self._iterator = rows.batches(seed=seed)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> tuple[Batch, tuple[str, ...]]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns where the next batch begins, as plain data that fits JSON."""
        return {"position": self._iterator.get_state(), **self._fixed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called, so that the same batches follow.

        Raises:
          DataError: if that was with other rows, another seed or another number of workers.
        """
        for field, now in self._fixed.items():
            if state[field] != now:
                raise DataError(
                    f"{self._name}: the run to go on from had {field}={state[field]}, now it is "
                    f"{now}; use the same data, data.workers and seed, or another workdir"
                )
        self._iterator.set_state(state["position"])

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
        iterator = rows.batches(seed=None, limit=limit)
        count, last = 0, None
        try:
            for last in iterator:
                yield last
                count += 1
        finally:
            iterator.close()
        if rows.shards > 1 and last is not None:
            # Every host takes part in as many batches as the one with most rows.
            most = -(-rows.total // rows.shards)
            most = min(most, limit) if limit else most
            filler = last[0]._replace(weight=np.zeros_like(last[0].weight))
            for _ in range(-(-most // rows.batch_size) - count):
                yield filler, ("",) * rows.batch_size


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
) -> EvalBatches:
    """Returns each row once, in batches of equal size.

    Args:
      source, config, processor, template, labels, batch_size, prompt_lengths, image_windows,
        workers, shard, graded: as in `train_batches`.
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
    )
    return EvalBatches(rows, limit)


def _check_fit(config: Config, processor: Processor) -> None:
    """Raises DataError if the processor's patches or ids are not those of the policy."""
    vision, images = config.vision, processor.images
    tokenizer = processor.tokenizer
    image_token = tokenizer.convert_tokens_to_ids(prompts.IMAGE_TOKEN)
    for field, ours, theirs in (
        ("patch_size", images.patch_size, vision.patch_size),
        ("temporal_patch_size", images.temporal_patch_size, vision.temporal_patch_size),
        ("merge_size", images.merge_size, vision.spatial_merge_size),
        (f"id of {prompts.IMAGE_TOKEN}", image_token, config.image_token_id),
    ):
        if ours != theirs:
            raise DataError(
                f"{field}: the processor has {ours}, the policy's config.json {theirs}; take both "
                "from the same folder"
            )
