"""Rows into the static shapes that the compiled programs read.

A batch of `B` rows takes `P` prompt tokens and `W` windows, each the smallest of a short list that
holds every row, so a run meets at most len(P list) * len(W list) shapes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from emor3_jax.data.prefix import Prefix, PrefixEncoder, pad_prompts
from emor3_jax.models.layout import Encoded, ImageLayout
from emor3_jax.types import Batch, ImagePrefix, Images, Prompt


class Example(NamedTuple):
    """One row, ready to be padded.

    Attributes:
      tokens: int32[n], the whole prompt.
      positions: int32[n, 3], its rope positions.
      image: the image as the policy reads it.
      image_start: index of the first image token.
      shared_length: leading tokens that every question about the image starts with.
      answer: index of the label.
      grades: float32[K], the accuracy of each label as an answer, in [0, 1].
      id: names the row.
      position: in the order in which rows are visited.
      cut: whether the end of the question was cut to fit.
      prefix: the image as a judge reads it; None where all read the same prompts.
    """

    tokens: np.ndarray
    positions: np.ndarray
    image: Encoded
    image_start: int
    shared_length: int
    answer: int
    grades: np.ndarray
    id: str
    position: int = 0
    cut: bool = False
    prefix: Prefix | None = None


class Prompts(NamedTuple):
    """A batch with the names of its rows.

    Attributes:
      batch: this host's rows.
      ids: of the rows of all hosts, "" for a row that only fills the batch.
    """

    batch: Batch
    ids: tuple[str, ...]


def size_of(examples: Sequence[Example]) -> tuple[int, ...]:
    """Returns the prompt tokens and windows that hold the largest of some rows.

    Where a judge reads images of its own, its windows follow.
    """
    tokens = max(len(x.tokens) for x in examples) - 1
    windows = max(x.image.bucket for x in examples)
    own = [x.prefix.image.bucket for x in examples if x.prefix is not None]
    return (tokens, windows, max(own)) if own else (tokens, windows)


def collate(
    examples: Sequence[Example | None],
    layout: ImageLayout,
    *,
    batch_size: int,
    prompt_lengths: Sequence[int],
    image_windows: Sequence[int],
    filler: Example | None = None,
    prefixes: PrefixEncoder | None = None,
    prefix_windows: int = 0,
) -> Prompts:
    """Pads rows to the smallest buckets that hold them all.

    Args:
      examples: 1 to `batch_size` rows, each of which fits the largest buckets; None is no row.
      layout: of the policy's images.
      batch_size: number of rows to make.
      prompt_lengths: rising choices of `P`.
      image_windows: rising choices of `W`.
      filler: stands, with weight 0 and id "", where there is no row; by default the first one.
      prefixes: pads the image as a judge reads it; None where all read the same prompts.
      prefix_windows: `W` of these images.

    Returns:
      The batch and the ids of its rows.

    Raises:
      ValueError: if there are too many rows or one does not fit.
    """
    if not 0 < len(examples) <= batch_size:
        raise ValueError(f"{len(examples)} rows do not make a batch of {batch_size}")
    given = [*examples, *[None] * (batch_size - len(examples))]
    filler = filler or next(x for x in examples if x is not None)
    rows = [filler if x is None else x for x in given]
    needed = size_of(rows)
    p = smallest("prompt_lengths", prompt_lengths, needed[0])
    w = smallest("image_windows", image_windows, needed[1])

    def int32(values: Sequence[int]) -> np.ndarray:
        return np.asarray(values, np.int32)

    batch = Batch(
        prompt=pad_prompts(
            [(x.tokens[:-1], x.positions[:-1], x.image_start, x.image.slots) for x in rows], p
        ),
        last_token=int32([x.tokens[-1] for x in rows]),
        next_position=int32([x.positions[-1, 0] for x in rows]),
        images=layout.collate([x.image.image for x in rows], w),
        shared_length=int32([x.shared_length for x in rows]),
        shared_position=int32([x.positions[x.shared_length, 0] for x in rows]),
        answers=int32([x.answer for x in rows]),
        grades=np.stack([x.grades for x in rows]).astype(np.float32),
        weight=np.asarray([float(x is not None) for x in given], np.float32),
        judge_prefix=prefixes and prefixes.collate([x.prefix for x in rows], prefix_windows),
    )
    return Prompts(batch, tuple("" if x is None else x.id for x in given))


def pick_prompts(first: Prompts, second: Prompts, rows: np.ndarray) -> Prompts:
    """Returns some prompts of two batches of host arrays, padded to the larger shape of the two.

    Args:
      first, second: B prompts each.
      rows: int[R], which prompts, those of `second` counted from B on.
    """
    ids = [*first.ids, *second.ids]
    both = _widen([first.batch, second.batch])
    if first.batch.judge_prefix is not None:
        prefixes = _widen([x.judge_prefix for x in both])
        both = [x._replace(judge_prefix=y) for x, y in zip(both, prefixes, strict=True)]
    picked = jax.tree.map(lambda a, b: np.concatenate([a, b])[rows], *both)
    return Prompts(picked, tuple(ids[i] for i in rows))


def _widen(both: list[Batch] | list[ImagePrefix]) -> list:
    """Pads the prompts and images of each to the largest of all."""
    tokens = max(x.prompt.tokens.shape[1] for x in both)
    windows = max(x.images.mask.shape[2] for x in both)

    def widen(x: np.ndarray, axis: int, size: int, value: int = 0) -> np.ndarray:
        padding = [(0, (size - x.shape[axis]) * (i == axis)) for i in range(x.ndim)]
        return np.pad(np.asarray(x), padding, constant_values=value)

    def wide(each: Batch | ImagePrefix) -> Batch | ImagePrefix:
        prompt = Prompt(*(widen(x, 1, tokens) for x in each.prompt))
        slots = widen(each.prompt.image_slots, 1, tokens, -1)
        images = Images(*(widen(x, 2, windows) for x in each.images))
        return each._replace(prompt=prompt._replace(image_slots=slots), images=images)

    return [wide(each) for each in both]


def smallest(name: str, sizes: Sequence[int], needed: int) -> int:
    """Returns the smallest of `sizes` that holds `needed`, or raises ValueError."""
    fitting = [size for size in sizes if size >= needed]
    if not fitting:
        raise ValueError(f"a row needs {needed}, more than the largest of {name}={tuple(sizes)}")
    return min(fitting)
