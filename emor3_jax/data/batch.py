"""Rows into the static shapes that the compiled programs read.

A batch of `B` rows takes `P` prompt tokens and `W` windows, each the smallest of a short list that
holds every row, so a run meets at most len(P list) * len(W list) shapes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models.qwen2_5_vl.inputs import Array, Images, Prompt
from emor3_jax.models.qwen2_5_vl.layout import WindowLayout, pad_images
from emor3_jax.parallel.mesh import shard_rows


class Example(NamedTuple):
    """One row, ready to be padded.

    Attributes:
      tokens: int32[n], the whole prompt.
      positions: int32[n, 3], its rope positions.
      image: the picture in window layout.
      image_start: index of the first image token.
      shared_length: leading tokens that every question about the picture starts with.
      answer: index of the label.
      grades: float32[K], what each label is worth as an answer, in [0, 1].
      id: names the row.
      position: in the order in which rows are visited.
      cut: whether the end of the question was cut to fit.
    """

    tokens: np.ndarray
    positions: np.ndarray
    image: WindowLayout
    image_start: int
    shared_length: int
    answer: int
    grades: np.ndarray
    id: str
    position: int = 0
    cut: bool = False


class Batch(NamedTuple):
    """What one step reads; every field an array, so that a batch is sharded along `B`.

    Attributes:
      prompt: all tokens of each prompt but the last, [B, P].
      last_token: int32[B], the last token of each prompt, from which a response is sampled.
      next_position: int32[B], its rope position.
      images: one picture a row, [B, W, L].
      shared_length: int32[B], leading tokens, system turn and picture, that the consistency
        question has in common with the prompt.
      shared_position: int32[B], the rope position that follows them.
      answers: int32[B], index of the label.
      grades: float32[B, K], the accuracy of each label as an answer: 1 for the row's label and 0
        for the others, or its share among raters beside the most frequent one (`graded` data).
      weight: float32[B], 1; 0 for a row that only fills the last batch of an evaluation.
    """

    prompt: Prompt
    last_token: Array
    next_position: Array
    images: Images
    shared_length: Array
    shared_position: Array
    answers: Array
    grades: Array
    weight: Array


def size_of(examples: Sequence[Example]) -> tuple[int, int]:
    """Returns the prompt tokens and windows that hold the largest of some rows."""
    tokens = max(len(x.tokens) for x in examples) - 1
    return tokens, max(len(x.image.mask) for x in examples)


def collate(
    examples: Sequence[Example | None],
    *,
    batch_size: int,
    prompt_lengths: Sequence[int],
    image_windows: Sequence[int],
    places: Sequence[int] | None = None,
    filler: Example | None = None,
) -> tuple[Batch, tuple[str, ...]]:
    """Pads rows to the smallest buckets that hold them all.

    Args:
      examples: 1 to `batch_size` rows, each of which fits the largest buckets; None is no row.
      batch_size: how many rows to make.
      prompt_lengths: rising choices of `P`.
      image_windows: rising choices of `W`.
      places: where in the batch of all processes these rows stand; by default they are all of it.
      filler: what stands, with weight 0 and id "", where there is no row; by default the first one.

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

    b = batch_size
    tokens = np.zeros((b, p), np.int32)
    positions = np.zeros((b, p, 3), np.int32)
    mask = np.zeros((b, p), bool)
    image_slots = np.full((b, p), -1, np.int32)
    images = pad_images([x.image for x in rows], w)
    slots_per_image = w * images.mask.shape[2] // _merge_unit(rows[0])
    for i, (row, place) in enumerate(zip(rows, places or range(b), strict=True)):
        n = len(row.tokens) - 1
        tokens[i, :n], positions[i, :n], mask[i, :n] = row.tokens[:n], row.positions[:n], True
        at = slice(row.image_start, row.image_start + len(row.image.slot_of_token))
        image_slots[i, at] = place * slots_per_image + row.image.slot_of_token

    def int32(values: Sequence[int]) -> np.ndarray:
        return np.asarray(values, np.int32)

    batch = Batch(
        prompt=Prompt(tokens, positions, mask, image_slots),
        last_token=int32([x.tokens[-1] for x in rows]),
        next_position=int32([x.positions[-1, 0] for x in rows]),
        images=images,
        shared_length=int32([x.shared_length for x in rows]),
        shared_position=int32([x.positions[x.shared_length, 0] for x in rows]),
        answers=int32([x.answer for x in rows]),
        grades=np.stack([x.grades for x in rows]).astype(np.float32),
        weight=np.asarray([float(x is not None) for x in given], np.float32),
    )
    return batch, tuple("" if x is None else x.id for x in given)


def take_part(batch: Batch, part: int, parts: int, merge: int) -> Batch:
    """Returns one of `parts` equal parts of a batch: the rows `part`, `parts + part`, …

    So each device takes from its own rows, and a batch that is cut over devices stays in place.

    Args:
      batch: each prompt has the same number of images, in the prompts' order.
      part: which, counted from 0.
      parts: must divide B.
      merge: patches that the merger joins (spatial_merge_size squared).
    """
    return batch if parts == 1 else _take_part(batch, np.int32(part), parts=parts, merge=merge)


def take_rows(batch: Batch, rows: np.ndarray, merge: int) -> Batch:
    """Returns any prompts of a batch, wherever they lie.

    Args:
      batch: as in `take_part`.
      rows: int[R], which.
      merge: patches that the merger joins (spatial_merge_size squared).
    """
    return _take_rows(batch, np.asarray(rows, np.int32), merge)


def part_of(tree: Any, part: int, parts: int) -> Any:
    """Returns the rows of `take_part` of other arrays, [B, …] each."""
    return tree if parts == 1 else _part_of(tree, np.int32(part), parts=parts)


def pick_rows(first: Batch, second: Batch, order: np.ndarray, merge: int) -> Batch:
    """Returns some prompts of two batches of host arrays, padded to the larger shape of the two.

    Args:
      first, second: B prompts each, every one with as many images.
      order: int[R], which prompts, those of `second` counted from B on.
      merge: patches that the merger joins (spatial_merge_size squared).
    """
    tokens = max(x.prompt.tokens.shape[1] for x in (first, second))
    windows = max(x.images.mask.shape[1] for x in (first, second))

    def widen(x: np.ndarray, size: int, value: int = 0) -> np.ndarray:
        padding = [(0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
        return np.pad(np.asarray(x), padding, constant_values=value)

    def by_prompt(batch: Batch) -> tuple[Batch, int]:
        """Returns a batch whose slots are counted within each image, images by prompt."""
        rows, (images, wide, length) = len(batch.last_token), batch.images.mask.shape
        each, slots = images // rows, wide * length // merge
        old = widen(batch.prompt.image_slots, tokens, -1)
        image, slot = np.divmod(old - np.arange(rows)[:, None] * each * slots, slots)
        moved = image * (windows * length // merge) + slot
        prompt = Prompt(*(widen(x, tokens) for x in batch.prompt))
        prompt = prompt._replace(image_slots=np.where(old >= 0, moved, -1))
        wider = [widen(x, windows) for x in batch.images]
        images = Images(*(x.reshape(rows, each, *x.shape[1:]) for x in wider))
        return batch._replace(prompt=prompt, images=images), each * windows * length // merge

    (one, slots), (two, _) = by_prompt(first), by_prompt(second)
    picked = jax.tree.map(lambda a, b: np.concatenate([a, b])[order], one, two)
    own = picked.prompt.image_slots
    image_slots = np.where(own >= 0, own + np.arange(len(order))[:, None] * slots, -1)
    return picked._replace(
        prompt=picked.prompt._replace(image_slots=image_slots.astype(np.int32)),
        images=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), picked.images),
    )


@partial(jax.jit, static_argnames="parts")
def _part_of(tree: Any, part: jax.Array, *, parts: int) -> Any:
    return jax.tree.map(lambda x: shard_rows(0, _every(x, part, parts)), tree)


@partial(jax.jit, static_argnames=("parts", "merge"))
def _take_part(batch: Batch, part: jax.Array, *, parts: int, merge: int) -> Batch:
    row = jnp.arange(len(batch.last_token) // parts)
    pick = partial(_part_of, part=part, parts=parts)
    return _pick(batch, row * parts + part, merge, pick)


@partial(jax.jit, static_argnames="merge")
def _take_rows(batch: Batch, rows: jax.Array, merge: int) -> Batch:
    def take(tree: Any) -> Any:
        return jax.tree.map(lambda x: shard_rows(0, jnp.take(x, rows, axis=0)), tree)

    return _pick(batch, rows, merge, take)


def _pick(batch: Batch, rows: jax.Array, merge: int, pick: Callable[[Any], Any]) -> Batch:
    """Returns the prompts `rows` of a batch, whose arrays `pick` takes them from."""
    images, windows, length = batch.images.mask.shape
    each = images // len(batch.last_token)
    slots = each * windows * length // merge
    picked = pick(batch._replace(images=None))
    moved = picked.prompt.image_slots + ((jnp.arange(len(rows)) - rows) * slots)[:, None]
    image_slots = jnp.where(picked.prompt.image_slots >= 0, moved, -1)
    by_prompt = jax.tree.map(lambda x: x.reshape(-1, each, *x.shape[1:]), batch.images)
    return picked._replace(
        prompt=picked.prompt._replace(image_slots=image_slots),
        images=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pick(by_prompt)),
    )


def _every(x: jax.Array, part: jax.Array, parts: int) -> jax.Array:
    """Returns rows `part`, `parts + part`, … of an array."""
    return jnp.take(jnp.asarray(x).reshape(len(x) // parts, parts, *x.shape[1:]), part, axis=1)


def _merge_unit(row: Example) -> int:
    return int(row.image.mask.sum()) // len(row.image.slot_of_token)


def smallest(name: str, sizes: Sequence[int], needed: int) -> int:
    """Returns the smallest of `sizes` that holds `needed`, or raises ValueError."""
    fitting = [size for size in sizes if size >= needed]
    if not fitting:
        raise ValueError(f"a row needs {needed}, more than the largest of {name}={tuple(sizes)}")
    return min(fitting)
