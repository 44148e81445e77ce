"""The TPU kernel of `decode_attention`: reads blocks of keys by a list, softmax as they come.

Two streams of blocks, the prompts' and the ring's, are copied to fast memory a batch at a time.
Each block gives its highest score, sum of weights and sum of values; these are brought together in
sums of each query, which begin with the token itself and so are never empty.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emor3_jax.models.decode_attention import Work, prompt_block_of, ring_block

_MASKED = -1e30
"""Score of a place that is not the lane's: finite, as in `attention`."""

_CHAINS = 16
"""Blocks of single key heads that are computed together: one alone leaves the units waiting."""

_PROMPT_CHAINS = 2
"""The same of prompts, whose blocks meet the queries of all lanes."""

_BUFFERS = 3
"""Batches of blocks in fast memory: one is computed, the others are on their way."""


def read_blocks(
    layer: jax.Array,
    work: Work,
    own: tuple[jax.Array, ...],
    *keys: jax.Array,
    dtype: Any,
    interpret: bool,
) -> jax.Array:
    """Returns what the queries of one device's slots and heads select from the listed blocks.

    Args:
      layer: int32[], which of the layers this is.
      work: of these slots.
      own: queries of each key head, float32[H, S * L, rows, head_dim], and keys and values of the
        tokens themselves, float32[H, S * L, 1, head_dim].
      *keys: keys and values of the prompts, and of the ring; of this, layers, slots and lanes are
        one axis.
      dtype: in which products are taken.
      interpret: emulate the kernel.

    Returns:
      float32[H, S * L, rows, head_dim].
    """
    (heads, n, rows, head_dim), parts = own[0].shape, len(work.counts)
    length, places = keys[0].shape[-1], keys[2].shape[-1]
    block, prompt_block = ring_block(places), prompt_block_of(length)
    batch, prompt_batch = max(_CHAINS // heads, 1), max(_PROMPT_CHAINS // heads, 1)

    def part(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((heads, n // parts, *shape), lambda i, *_: (0, i, 0, 0))

    def buffer(like: jax.Array, *shape: int) -> Any:
        return pltpu.VMEM((_BUFFERS, *shape), like.dtype)

    lanes = work.lengths.shape[1]
    flat = work._replace(lengths=work.lengths.reshape(-1), starts=work.starts.reshape(-1))
    sums = pltpu.VMEM((heads, n // parts, rows, head_dim), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, lanes=lanes, places=places, dtype=dtype),
        out_shape=jax.ShapeDtypeStruct(own[0].shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(parts,),
            in_specs=[
                part(rows, head_dim),
                part(1, head_dim),
                part(1, head_dim),
                *[pl.BlockSpec(memory_space=pl.ANY)] * 4,
            ],
            out_specs=part(rows, head_dim),
            scratch_shapes=[
                sums,
                sums,
                buffer(keys[0], prompt_batch, heads, head_dim, prompt_block),
                buffer(keys[1], prompt_batch, heads, prompt_block, head_dim),
                buffer(keys[2], batch, heads, head_dim, block),
                buffer(keys[3], batch, heads, block, head_dim),
                pltpu.SemaphoreType.DMA((2, _BUFFERS)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="ragged_decode_attention",
    )(layer[None], flat, *own, *keys)


def _kernel(layer_ref: Any, work: Work, *refs: Any, lanes: int, places: int, dtype: Any) -> None:
    """Some slots: their sums begin with the token itself, then come prompts and ring by blocks."""
    q_ref, k_ref, v_ref, *keys, out_ref, top_ref, total_ref = refs[:10]
    prompt_k, prompt_v, ring_k, ring_v, arrived = refs[10:]
    part, layer = pl.program_id(0), layer_ref[0]
    heads, n, rows, head_dim = q_ref.shape
    block, prompt_block = ring_k.shape[-1], prompt_k.shape[-1]
    first_lane, first_slot = part * n, part * (n // lanes)
    # The ring may have fewer rows than slots have lanes.
    row_of_layer = layer * (keys[2].shape[0] // keys[0].shape[0])
    products = functools.partial(jnp.dot, preferred_element_type=jnp.float32)

    def span_of(number: Any, size: int, of: int) -> Any:
        """The places of a block; a single one may have any size."""
        return slice(None) if size == of else pl.ds(pl.multiple_of(number * size, size), size)

    def ring_copies(index: Any, to: tuple) -> list[Any]:
        span = span_of(work.block[part, index], block, places)
        row = row_of_layer + work.row[part, index]
        return [
            pltpu.make_async_copy(
                keys[2].at[row, :, :, span], ring_k.at[*to], arrived.at[1, to[0]]
            ),
            pltpu.make_async_copy(keys[3].at[row, :, span], ring_v.at[*to], arrived.at[1, to[0]]),
        ]

    def prompt_copies(index: Any, to: tuple) -> list[Any]:
        span = span_of(work.prompt_block[part, index], prompt_block, keys[0].shape[-1])
        at = layer, first_slot + work.slot[part, index]
        return [
            pltpu.make_async_copy(
                keys[0].at[*at, :, :, span], prompt_k.at[*to], arrived.at[0, to[0]]
            ),
            pltpu.make_async_copy(keys[1].at[*at, :, span], prompt_v.at[*to], arrived.at[0, to[0]]),
        ]

    def select(q: Any, k: Any, v: Any, seen: Any, real: Any) -> tuple[Any, Any, Any]:
        """Highest score, sum of weights, and weighted sum of values, of each query in a block."""
        scores = jnp.where(seen, products(q.astype(dtype), k.astype(dtype)), _MASKED)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # Where there is no block, fast memory may hold anything.
        return top, total, jnp.where(real, products(weights.astype(dtype), v.astype(dtype)), 0.0)

    def add(at: tuple, found: tuple[Any, Any, Any]) -> None:
        """Adds a block to the sums of its lane, or of all lanes of its slot."""
        old = top_ref[at]
        top, total, out = (
            jnp.broadcast_to(x, (old.size // head_dim, head_dim)).reshape(old.shape) for x in found
        )
        new = jnp.maximum(old, top)
        before, now = jnp.exp(old - new), jnp.exp(top - new)
        top_ref[at] = new
        total_ref[at] = before * total_ref[at] + now * total
        out_ref[at] = before * out_ref[at] + now * out

    def ring_batch(first: Any, buffer: Any) -> None:
        found = []
        for i in range(ring_k.shape[1]):
            lane = work.lane[part, first + i]
            # Behind the end of the list nothing is seen.
            real = first + i < work.counts[part, 0]
            length = jnp.where(real, work.lengths[first_lane + lane], 0)
            age = work.block[part, first + i] * block - work.starts[first_lane + lane]
            age += jax.lax.broadcasted_iota(jnp.int32, (rows, block), 1)
            seen = jnp.where(age < 0, age + places, age) < length
            for head in range(heads):
                at, k, v = (head, lane), ring_k[buffer, i, head], ring_v[buffer, i, head]
                found.append((at, select(q_ref[at], k, v, seen, real)))
        for each in found:
            add(*each)

    def prompt_batch(first: Any, buffer: Any) -> None:
        found = []
        for i in range(prompt_k.shape[1]):
            slot, number = work.slot[part, first + i], work.prompt_block[part, first + i]
            real = first + i < work.counts[part, 1]
            length = jnp.where(real, work.prompts[first_slot + slot], 0)
            place = jax.lax.broadcasted_iota(jnp.int32, (lanes * rows, prompt_block), 1)
            seen = number * prompt_block + place < length
            for head in range(heads):
                at = head, pl.ds(slot * lanes, lanes)
                q = q_ref[at].reshape(lanes * rows, head_dim)
                k, v = prompt_k[buffer, i, head], prompt_v[buffer, i, head]
                found.append((at, select(q, k, v, seen, real)))
        for each in found:
            add(*each)

    prompts = _Stream(work.counts[part, 1], prompt_k.shape[1], prompt_copies, prompt_batch)
    ring = _Stream(work.counts[part, 0], ring_k.shape[1], ring_copies, ring_batch)
    prompts.begin()
    ring.begin()

    @pl.loop(0, n // lanes)
    def _(slot: Any) -> None:
        for head in range(heads):
            at = head, pl.ds(slot * lanes, lanes)
            q, k, v = q_ref[at], k_ref[at], v_ref[at]
            score = jnp.sum(q * k, axis=-1, keepdims=True)
            top_ref[at] = jnp.broadcast_to(score, q.shape)
            total_ref[at] = jnp.ones(q.shape, jnp.float32)
            out_ref[at] = jnp.broadcast_to(v, q.shape)

    prompts.run()
    ring.run()

    @pl.loop(0, n // lanes)
    def _(slot: Any) -> None:
        at = slice(None), pl.ds(slot * lanes, lanes)
        out_ref[at] = out_ref[at] / total_ref[at]


class _Stream(NamedTuple):
    """Blocks that are copied to fast memory a batch at a time, a few batches ahead.

    Attributes:
      count: of the blocks.
      size: of a batch.
      copies: (index of a block, where in the buffers) → its copies.
      compute: (index of a batch's first block, buffer) → None.
    """

    count: Any
    size: int
    copies: Any
    compute: Any

    def begin(self) -> None:
        """Starts to copy the first batches."""
        pl.loop(0, _BUFFERS - 1)(self._start)

    def run(self) -> None:
        """Computes all batches."""

        @pl.loop(0, _divide(self.count + self.size - 1, self.size)[0])
        def _(batch: Any) -> None:
            self._start(batch + _BUFFERS - 1)
            self._each(batch, lambda copy: copy.wait())
            self.compute(batch * self.size, _divide(batch, _BUFFERS)[1])

    def _start(self, batch: Any) -> None:
        self._each(batch, lambda copy: copy.start())

    def _each(self, batch: Any, act: Any) -> None:
        """Does something with every copy of a batch, which may lie behind the last block."""
        first, buffer = batch * self.size, _divide(batch, _BUFFERS)[1]
        left = self.count - first

        def one(i: Any) -> None:
            for copy in self.copies(first + i, (buffer, i)):
                act(copy)

        @pl.when(left >= self.size)
        def _() -> None:
            for i in range(self.size):
                one(i)

        @pl.when(left < self.size)
        def _() -> None:
            pl.loop(0, left)(one)


def _divide(x: Any, by: int) -> tuple[Any, Any]:
    """Returns quotient and rest of a number from 0 on; Python's operators ask for its sign."""
    return jax.lax.div(x, jnp.int32(by)), jax.lax.rem(x, jnp.int32(by))
