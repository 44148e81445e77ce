"""Plan of the micro-batches of a step: prompts of like length together, each cut to its own size.

One long response would otherwise set T for every response of the step. Here each micro-batch takes
the smallest P, W and T of short lists that hold its own rows, so a step meets few shapes, and what
is padded is little more than what the lists and the spread within a micro-batch ask for.

Prompts stay on their devices. A batch is cut into as many parts as `data * fsdp`; each part sorts
its own prompts, and a micro-batch takes the next few of every part, so its sizes are the largest
over the parts. Which prompts belong to which update is fixed before, as `types.split` does it.

The plan is made on the host from lengths alone, the same on every host, and is data: the losses
weigh each token by the whole update (`losses.token_weights`), so no plan changes a gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emor3_jax.learner import packing
from emor3_jax.types import Packing, bucket


class RowSizes(NamedTuple):
    """Sizes of the prompts of a step, [B, …] each.

    Attributes:
      lengths: int32[B, G], tokens of the responses; 0 where there is none.
      prompt: int32[B], prompt tokens but the last.
      windows: int32[B], windows up to the last one that has a patch.
      patches: int32[B], patches of the images.
    """

    lengths: np.ndarray
    prompt: np.ndarray
    windows: np.ndarray
    patches: np.ndarray


class Shape(NamedTuple):
    """Padded sizes of a prompt and its responses; hashable, a static argument.

    Attributes:
      prompt: P, prompt tokens but the last.
      windows: W, of an image.
      length: T, of a response.
    """

    prompt: int
    windows: int
    length: int


class Buckets(NamedTuple):
    """Rising sizes to choose from; a batch's own size stands for what is larger than all.

    Attributes:
      prompt: of `Shape.prompt`.
      windows: of `Shape.windows`; () where images cannot be cut, since a prompt has several.
      length: of `Shape.length`, and of packed rows.
    """

    prompt: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    length: tuple[int, ...] = ()


class MicroBatch(NamedTuple):
    """Prompts that go through a policy together.

    Attributes:
      rows: int32[b], the prompts: b / parts of each part, counted within the part.
      shape: padded sizes.
      packing: positions of the responses in fewer rows, [b, …]; None gives each a row.
    """

    rows: np.ndarray
    shape: Shape
    packing: Packing | None

    def response_tokens(self, responses: int) -> int:
        """Returns the padded response tokens of a prompt that has so many responses."""
        if self.packing is None:
            return responses * self.shape.length
        return int(np.prod(self.packing.source.shape[1:]))


class StepPlan(NamedTuple):
    """Micro-batches of a step.

    Attributes:
      length: T of the whole step.
      updates: the micro-batches of each update.
    """

    length: int
    updates: tuple[tuple[MicroBatch, ...], ...]

    def padding(self, sizes: RowSizes, patches: int) -> dict[str, float]:
        """Returns real over padded tokens, in (0, 1], and the number of shapes; on the host alone.

        Args:
          sizes: of the prompts, as the plan was made for.
          patches: of a window.

        Returns:
          `padding/{prompt,response,vision}`, `padding/efficiency` of all three together, and
          `padding/shapes`, how many shapes the micro-batches have.
        """
        g = sizes.lengths.shape[1]
        padded = {"prompt": 0, "response": 0, "vision": 0}
        shapes = set()
        for micro in (each for update in self.updates for each in update):
            b, shape = len(micro.rows), micro.shape
            padded["prompt"] += b * shape.prompt
            padded["response"] += b * micro.response_tokens(g)
            padded["vision"] += b * shape.windows * patches
            packed = () if micro.packing is None else micro.packing.source.shape
            shapes.add((shape, packed))
        real = {"prompt": sizes.prompt, "response": sizes.lengths, "vision": sizes.patches}
        real = {name: int(np.sum(value, dtype=np.int64)) for name, value in real.items()}
        found = {f"padding/{name}": real[name] / max(padded[name], 1) for name in padded}
        whole = sum(real.values()) / max(sum(padded.values()), 1)
        return found | {"padding/efficiency": whole, "padding/shapes": float(len(shapes))}


def plan_step(
    sizes: RowSizes,
    largest: Shape,
    buckets: Buckets,
    *,
    num_updates: int,
    micro_prompts: int,
    parts: int = 1,
    pack: bool = False,
) -> StepPlan:
    """Plans the micro-batches of a step.

    Args:
      sizes: of its B prompts.
      largest: sizes of the batch as it is.
      buckets: sizes to choose from.
      num_updates: U, of the step; update u has the prompts u, U + u, …
      micro_prompts: prompts of a micro-batch, a multiple of `parts`.
      parts: that the mesh cuts a batch into; each sorts its own prompts.
      pack: responses of a group may share rows.

    Raises:
      ValueError: if B is no multiple of U * micro_prompts, or that no multiple of `parts`.
    """
    b = len(sizes.lengths)
    if b % (num_updates * micro_prompts) or micro_prompts % parts:
        raise ValueError(
            f"{b} prompts, num_updates={num_updates}, micro_prompts={micro_prompts}, parts={parts}:"
            " parts must divide micro_prompts, and the updates and micro_prompts the prompts"
        )
    own = np.arange(b).reshape(parts, -1)
    updates = tuple(
        _plan_update(own[:, u::num_updates], sizes, largest, buckets, micro_prompts, pack)
        for u in range(num_updates)
    )
    # Rows are counted within their part.
    size = b // parts
    updates = tuple(
        tuple(micro._replace(rows=(micro.rows % size).astype(np.int32)) for micro in update)
        for update in updates
    )
    return StepPlan(_fit(sizes.lengths.max(), buckets.length, largest.length), updates)


def _plan_update(
    own: np.ndarray,
    sizes: RowSizes,
    largest: Shape,
    buckets: Buckets,
    micro_prompts: int,
    pack: bool,
) -> tuple[MicroBatch, ...]:
    """Returns the micro-batches of an update; rows are counted over the whole batch.

    Args:
      own: int[parts, n], the update's prompts of each part.
      sizes, largest, buckets, micro_prompts, pack: see `plan_step`.
    """
    g = sizes.lengths.shape[1]
    # Packed groups take as many places as they have tokens, others as their longest response.
    keys = [sizes.lengths.max(axis=1)] + ([sizes.lengths.sum(axis=1)] if pack else [])
    best, fewest = (), np.inf
    for key in keys:
        order = np.argsort(key[own], axis=1, kind="stable")
        ranked = np.take_along_axis(own, order, axis=1)
        each = micro_prompts // len(own)
        found = tuple(
            _micro_batch(ranked[:, i : i + each].ravel(), sizes, largest, buckets, pack)
            for i in range(0, own.shape[1], each)
        )
        places = sum(micro.response_tokens(g) for micro in found)
        if places < fewest:
            best, fewest = found, places
    return best


def _micro_batch(
    rows: np.ndarray, sizes: RowSizes, largest: Shape, buckets: Buckets, pack: bool
) -> MicroBatch:
    shape = Shape(
        _fit(sizes.prompt[rows].max(), buckets.prompt, largest.prompt),
        _fit(sizes.windows[rows].max(), buckets.windows, largest.windows),
        _fit(sizes.lengths[rows].max(), buckets.length, largest.length),
    )
    lengths = sizes.lengths[rows]
    plan = packing.plan(lengths, shape.length, buckets.length) if pack else None
    return MicroBatch(rows, shape, plan)


def _fit(needed: int, sizes: Sequence[int], most: int) -> int:
    """Returns the smallest size that holds what is needed, at most the batch's own."""
    return min(bucket(int(needed), (*sizes, most)), most)
