"""Plan of the micro-batches of a step: prompts of like length together, each cut to its own size.

One long response would otherwise set T for every response of the step. Here each micro-batch takes
the smallest P, W and T of short lists that hold its own rows, so a step meets few shapes, and what
is padded is little more than what the lists and the spread within a micro-batch ask for.

Prompts stay on their devices. A batch is cut into as many parts as `data * fsdp`; each part sorts
its own prompts, and a micro-batch takes the next few of every part, so its sizes are the largest
over the parts. Which prompts belong to which update is fixed before (update u of U has u, U + u,
…), unless the plan is to balance them.

Where responses to several prompts may share rows (`Packed.TOGETHER`), a micro-batch takes as many
prompts as the memory of the largest shape allows, each part those that bring its rows close to the
same number of tokens: then nearly all that is padded is what parts differ by.

The plan is made on the host from lengths alone, the same on every host, and is data: the losses
weigh each token by the whole update (`losses.token_weights`), so no plan changes a gradient.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emor3_jax.learner import packing
from emor3_jax.types import Packing, bucket


class Packed(enum.Enum):
    """Responses that may share rows: none, those of a group, or those of several groups."""

    APART = "apart"
    GROUPS = "groups"
    TOGETHER = "together"


MAX_TOGETHER, MAX_COLUMNS = 4, 2**15
"""Prompts that share a row, and columns of it, at most (`attention_kernels.PackedMask`)."""

_COLUMNS = 512
"""Rows of several prompts have a multiple of so many columns; of fewer than twice that, of 128."""


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
      packing: positions of the responses in fewer rows; None gives each a row.
    """

    rows: np.ndarray
    shape: Shape
    packing: Packing | None

    def response_tokens(self, responses: int) -> int:
        """Returns the padded response tokens, with so many responses to each prompt."""
        if self.packing is None:
            return len(self.rows) * responses * self.shape.length
        return int(np.prod(self.packing.source.shape))


class StepPlan(NamedTuple):
    """Micro-batches of a step.

    Attributes:
      length: T of the whole step.
      updates: the micro-batches of each update.
    """

    length: int
    updates: tuple[tuple[MicroBatch, ...], ...]

    def rows(self, parts: int) -> np.ndarray:
        """Returns the prompts of each update, int32[U, B / U], laid out as `MicroBatch.rows`."""
        found = [
            np.concatenate([micro.rows.reshape(parts, -1) for micro in update], axis=1).ravel()
            for update in self.updates
        ]
        return np.stack(found)

    def shapes(self) -> set[tuple]:
        """Returns the shapes of the micro-batches, for each of which a program is compiled."""
        return {
            (
                len(micro.rows),
                micro.shape,
                None if micro.packing is None else micro.packing.source.shape,
            )
            for update in self.updates
            for micro in update
        }

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
        for micro in (each for update in self.updates for each in update):
            b, shape = len(micro.rows), micro.shape
            padded["prompt"] += b * shape.prompt
            padded["response"] += micro.response_tokens(g)
            padded["vision"] += b * shape.windows * patches
        real = {"prompt": sizes.prompt, "response": sizes.lengths, "vision": sizes.patches}
        real = {name: int(np.sum(value, dtype=np.int64)) for name, value in real.items()}
        found = {f"padding/{name}": real[name] / max(padded[name], 1) for name in padded}
        whole = sum(real.values()) / max(sum(padded.values()), 1)
        return found | {"padding/efficiency": whole, "padding/shapes": float(len(self.shapes()))}


class PlanSpec(NamedTuple):
    """Settings by which a step is cut into micro-batches.

    Attributes:
      num_updates: U, of the step.
      micro_prompts: prompts of a micro-batch of the largest shape, a multiple of `parts`.
      parts: that the mesh cuts a batch into; each sorts its own prompts.
      packed: responses that may share rows.
      balance: choose the prompts of each update so that all have like many tokens.
      window_tokens: tokens of the decoder whose activations take as much memory as a window's.
    """

    num_updates: int
    micro_prompts: int
    parts: int = 1
    packed: Packed = Packed.APART
    balance: bool = False
    window_tokens: float = 0.0


def plan_step(sizes: RowSizes, largest: Shape, buckets: Buckets, spec: PlanSpec) -> StepPlan:
    """Plans the micro-batches of a step.

    Args:
      sizes: of its B prompts.
      largest: sizes of the batch as it is.
      buckets: sizes to choose from.
      spec: settings.

    Raises:
      ValueError: if B is no multiple of U * micro_prompts, or that no multiple of `parts`.
    """
    b = len(sizes.lengths)
    if b % (spec.num_updates * spec.micro_prompts) or spec.micro_prompts % spec.parts:
        raise ValueError(
            f"{b} prompts, num_updates={spec.num_updates}, micro_prompts={spec.micro_prompts}, "
            f"parts={spec.parts}: parts must divide micro_prompts, and the updates and "
            "micro_prompts the prompts"
        )
    length = _fit(sizes.lengths.max(), buckets.length, largest.length)
    planner = _Planner(sizes, largest, buckets, spec, largest._replace(length=length))
    own = np.arange(b).reshape(spec.parts, -1)
    make = planner.together if spec.packed is Packed.TOGETHER else planner.by_length
    if spec.balance:
        found = make(own, spec.num_updates)
        turns = [found[i : i + spec.num_updates] for i in range(0, len(found), spec.num_updates)]
        # There and back, so that no update always has the longer of its turn.
        turns = [turn[:: -1 if i % 2 else 1] for i, turn in enumerate(turns)]
        updates = list(zip(*turns, strict=True))
    else:
        updates = [make(own[:, u :: spec.num_updates], 1) for u in range(spec.num_updates)]

    def within(micro: MicroBatch) -> MicroBatch:
        """Counts rows within their part."""
        return micro._replace(rows=(micro.rows % (b // spec.parts)).astype(np.int32))

    return StepPlan(length, tuple(tuple(map(within, update)) for update in updates))


class _Planner(NamedTuple):
    """Cuts prompts into micro-batches; rows are counted over the whole batch.

    Attributes:
      sizes, largest, buckets, spec: see `plan_step`.
      step: `largest`, with the T of the step.
    """

    sizes: RowSizes
    largest: Shape
    buckets: Buckets
    spec: PlanSpec
    step: Shape

    def by_length(self, own: np.ndarray, times: int) -> list[MicroBatch]:
        """Returns micro-batches of prompts of like length.

        Args:
          own: int[parts, n], prompts of each part.
          times: of which the number of micro-batches is a multiple.
        """
        del times  # Their number is a multiple of all updates anyway.
        lengths, pack = self.sizes.lengths, self.spec.packed is Packed.GROUPS
        # Packed groups take as many places as they have tokens, others as their longest response.
        keys = [lengths.max(axis=1)] + ([lengths.sum(axis=1)] if pack else [])
        each = self.spec.micro_prompts // self.spec.parts
        best: list[MicroBatch] = []
        fewest = np.inf
        for key in keys:
            order = np.argsort(key[own], axis=1, kind="stable")
            ranked = np.take_along_axis(own, order, axis=1)
            found = [
                self._sorted(ranked[:, i : i + each].ravel(), pack)
                for i in range(0, own.shape[1], each)
            ]
            places = sum(micro.response_tokens(lengths.shape[1]) for micro in found)
            if places < fewest:
                best, fewest = found, places
        return best

    def together(self, own: np.ndarray, times: int) -> list[MicroBatch]:
        """Returns micro-batches whose rows have the responses to several prompts.

        Args:
          own: int[parts, n], prompts of each part.
          times: of which the number of micro-batches is a multiple.
        """
        size, best = 1, self.by_length(own, times)
        g = self.sizes.lengths.shape[1]
        fewest = sum(micro.response_tokens(g) for micro in best)
        while size <= MAX_TOGETHER and own.shape[1] % (size * times) == 0:
            found = self._in_rows_of(own, size)
            if found is not None and len(found) % times == 0:
                places = sum(micro.response_tokens(g) for micro in found)
                if places < fewest:
                    best, fewest = found, places
            size *= 2
        return best

    def _in_rows_of(self, own: np.ndarray, size: int) -> list[MicroBatch] | None:
        """Returns micro-batches with rows of so many prompts; None if they need too much memory."""
        tokens, g = self.sizes.lengths.sum(axis=1), self.sizes.lengths.shape[1]
        rows = np.stack([_balanced(part, tokens[part], size) for part in own])
        each = _rows_of(size, self.spec)
        found = []
        for i in range(0, rows.shape[1], each):
            micro = rows[:, i : i + each]
            width = _columns(tokens[micro].sum(axis=2).max())
            shape = self._shape(micro.ravel())._replace(length=self.step.length)
            if width > _columns_left(self.largest, shape, self.spec, g, size):
                return None
            lengths = self.sizes.lengths[micro.ravel()]
            count = micro.shape[0] * micro.shape[1]
            packing_ = packing.join(lengths, count, shape.length, width)
            found.append(MicroBatch(micro.ravel(), shape, packing_))
        return found

    def _sorted(self, rows: np.ndarray, pack: bool) -> MicroBatch:
        shape, lengths = self._shape(rows), self.sizes.lengths[rows]
        plan = packing.plan(lengths, shape.length, self.buckets.length) if pack else None
        return MicroBatch(rows, shape, plan)

    def _shape(self, rows: np.ndarray) -> Shape:
        """Returns the smallest shape that holds some prompts."""
        sizes, buckets, largest = self.sizes, self.buckets, self.largest
        return Shape(
            _fit(sizes.prompt[rows].max(), buckets.prompt, largest.prompt),
            _fit(sizes.windows[rows].max(), buckets.windows, largest.windows),
            _fit(sizes.lengths[rows].max(), buckets.length, largest.length),
        )


def _rows_of(prompts: int, spec: PlanSpec) -> int:
    """Returns the rows of a micro-batch in each part, with `prompts` prompts to a row."""
    return max(1, spec.micro_prompts // spec.parts // prompts)


def _columns_left(
    largest: Shape, shape: Shape, spec: PlanSpec, responses: int, prompts: int
) -> int:
    """Returns the columns of a row of several prompts that memory allows, in whole units.

    A micro-batch of the largest shape, each prompt apart, is what memory is known to hold.
    """

    def beside(shape: Shape) -> float:
        return shape.prompt + spec.window_tokens * shape.windows

    each, rows = spec.micro_prompts // spec.parts, _rows_of(prompts, spec)
    whole = each * (beside(largest) + responses * largest.length)
    left = min(whole / rows - prompts * beside(shape), MAX_COLUMNS)
    unit = 128 if left < 2 * _COLUMNS else _COLUMNS
    return int(left) // unit * unit


def largest_together(
    largest: Shape, spec: PlanSpec, b: int, responses: int
) -> tuple[int, Packing] | None:
    """Returns prompts and packing of the micro-batch with the most prompts to a row that may occur.

    Of all that share rows, it has the most images and the longest prompts in memory.

    Args:
      largest: sizes of a batch.
      spec: settings.
      b: prompts of an update.
      responses: to each.

    Returns:
      The number of prompts, and a packing whose values mean nothing; None if no two prompts ever
      share a row.
    """
    if spec.packed is not Packed.TOGETHER:
        return None
    for prompts in (4, 2):
        width = _columns_left(largest, largest, spec, responses, prompts)
        if (b // spec.parts) % prompts == 0 and width > 0:
            rows = _rows_of(prompts, spec) * spec.parts
            source = np.full(
                (rows, 1, min(width, _columns(prompts * responses * largest.length))), -1, np.int32
            )
            count = rows * prompts
            return count, Packing(source, np.zeros((count, responses), np.int32))
    return None


def _balanced(rows: np.ndarray, tokens: np.ndarray, size: int) -> np.ndarray:
    """Returns bins of so many prompts with like many tokens, by rising tokens: int[n / size, size].

    The prompts with the most tokens go first, each into the bin with the fewest that has room.
    """
    count = len(rows) // size
    load, bins = np.zeros(count, np.int64), [[] for _ in range(count)]
    for i in np.argsort(-tokens, kind="stable"):
        free = [k for k in range(count) if len(bins[k]) < size]
        k = min(free, key=load.__getitem__)
        load[k] += tokens[i]
        bins[k].append(rows[i])
    return np.asarray(bins)[np.argsort(load, kind="stable")]


def _columns(needed: int) -> int:
    unit = 128 if needed < 2 * _COLUMNS else _COLUMNS
    return max(-(-int(needed) // unit), 1) * unit


def _fit(needed: int, sizes: Sequence[int], most: int) -> int:
    """Returns the smallest size that holds what is needed, at most the batch's own."""
    return min(bucket(int(needed), (*sizes, most)), most)
