"""Attention of decoded tokens by a TPU kernel that reads only the places of the cache in use.

XLA's attention of a decoded token (`attention.attend`) reads the whole ring of every lane and the
whole padded prompt, and masks what does not belong to them; with responses of very different
lengths most of that is read in vain. This kernel copies to fast memory only the blocks of `BLOCK`
places that hold a key of the lane, or of the prompt.

* One call serves a layer: prompt, ring and the token itself, in one softmax. The keys of all
  layers are an operand as they are, in slow memory, and the layer is an index; a slice of them for
  each layer would be a copy.
* Which blocks are read is listed once a token, for all layers (`make_work`), by XLA; the kernel
  walks through the list, a batch of blocks computed while the next ones are on their way.
* A block of a prompt is read once for all lanes and all query heads of its slot, a block of the
  ring once for the query heads of its key head.

The kernels that JAX ships do not fit. `paged_attention` knows lengths but no first place, so a
block of the ring that belongs to a lane in part would count whole, and it returns no sums to join
with the prompt's part; `ragged_paged_attention` wants keys and values interleaved in one array of
pages, and has no shared prefix; `flash_attention` reads all keys; the masks of `splash_attention`
are known when it is compiled or else are arrays as large as the scores. All but the first also take
the keys of one layer alone.

Deviations, numbered:
 1. A response that has ended reads nothing (`lengths` 0); what comes out for it is undefined.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from emor3_jax.models.cache import KV, Cache
from emor3_jax.parallel.mesh import BATCH

BLOCK = 128
"""Places of the ring that are read together: the width of a TPU's vector."""

_PROMPT_BLOCK = 256
"""Places of a prompt that are read together, where it is a multiple of it; else `BLOCK`."""

_MASKED = -1e30
"""Score of a place that is not the lane's: finite, as in `attention`."""

_CHAINS = 16
"""Blocks of single key heads that are computed together: one alone leaves the units waiting."""

_PROMPT_CHAINS = 2
"""The same of prompts, whose blocks meet the queries of all lanes."""

_BUFFERS = 3
"""Batches of blocks in fast memory: one is computed, the others are on their way."""

_STATES = 256
"""Lanes times key heads whose sums are in fast memory together, 24 KB each."""


class Work(NamedTuple):
    """Blocks to read for the next tokens, the same for all layers; of one device or of all of them.

    The slots are cut into `parts` equal parts, which the kernel computes one after the other.

    Attributes:
      starts: int32[S, L], the first place of each lane in the ring.
      lengths: int32[S, L], its places.
      prompts: int32[S], places of each prompt.
      lane, block: int32[parts, M], lane (counted within the part) and block of the ring.
      slot, prompt_block: int32[parts, N], the same of prompts.
      counts: int32[parts, 2], how many there are in the lists of the ring and of the prompts.
    """

    starts: jax.Array
    lengths: jax.Array
    prompts: jax.Array
    lane: jax.Array
    block: jax.Array
    slot: jax.Array
    prompt_block: jax.Array
    counts: jax.Array


class Ring(NamedTuple):
    """All keys that the decoded tokens see, of all layers.

    Attributes:
      prefix: keys and values of the prompts.
      cache: the continuations so far, a ring of C places.
      work: what of them is read.
    """

    prefix: KV
    cache: Cache
    work: Work


def fits(prefix: KV | None, cache: Cache, *, interpret: bool = False) -> bool:
    """Returns whether the kernel can read such arrays; else XLA computes the attention.

    Blocks are whole vectors of the TPU: the places of prompt and ring must be multiples of `BLOCK`
    (a ring may also be smaller), and so must the width of a head. Layers that lie apart are not for
    this kernel.

    Args:
      prefix: keys and values of the prompts.
      cache: of the continuations.
      interpret: the kernel is emulated, for which any sizes do.
    """
    if prefix is None or isinstance(cache.k, tuple) or not cache.k.size or not prefix.k.size:
        return False
    head_dim, places = cache.k.shape[-2:]
    whole = places < BLOCK or places % BLOCK == 0
    return interpret or (whole and prefix.k.shape[-1] % BLOCK == 0 and head_dim % BLOCK == 0)


def count_blocks(lengths: Any, starts: Any, places: int, block: int) -> Any:
    """Returns how many blocks of a ring hold the places of each lane: int[...].

    Args:
      lengths: int[...], places of each lane, at most `places`.
      starts: int[...], the first of them; from the ring's end they go on at its beginning.
      places: of the ring, a multiple of `block`.
      block: places of a block.
    """
    # A full ring that begins within a block ends in the same one.
    touched = (starts % block + lengths + block - 1) // block
    return ((lengths > 0) * touched).clip(max=places // block)


class PlacesRead(NamedTuple):
    """Places of the ring that attention reads for one token of each lane.

    Attributes:
      needed: that hold a key of the lane.
      ragged: that this kernel reads.
      xla: that XLA reads, all.
    """

    needed: int
    ragged: int
    xla: int


def places_read(lengths: np.ndarray, slot: int, places: int) -> PlacesRead:
    """Counts what is read.

    Args:
      lengths: int[...], places of each lane, 0 for those that have ended.
      slot: the place of the ring that is written next.
      places: of the ring.
    """
    lengths = np.clip(lengths, 0, places)
    block = ring_block(places)
    blocks = count_blocks(lengths, (slot - lengths) % places, places, block)
    return PlacesRead(int(lengths.sum()), int(blocks.sum()) * block, lengths.size * places)


def make_ring(prefix: KV, cache: Cache, lengths: jax.Array, slot: jax.Array) -> Ring:
    """Returns what the next tokens see.

    Under a mesh (`jax.set_mesh`) each device lists the blocks of its own slots.

    Args:
      prefix: keys and values of the prompts, of which only the ends may be masked.
      cache: of the continuations; of each the last `lengths` places before `slot` are seen.
      lengths: int32[S, L], 0 for those of which nothing need be read.
      slot: int32[], the place of the ring that the next tokens will take.
    """
    heads, places, length = cache.v.shape[3], cache.k.shape[-1], prefix.k.shape[-1]

    def own(lengths: jax.Array, prompts: jax.Array, slot: jax.Array) -> Work:
        return make_work(lengths, prompts, slot, (heads, places, length))

    prompts = jnp.sum(prefix.mask, axis=-1, dtype=jnp.int32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        rows = P(row_axes(mesh, len(prompts)))
        own = jax.shard_map(own, in_specs=(rows, rows, P()), out_specs=rows, check_vma=False)
    return Ring(prefix, cache, own(lengths, prompts, slot))


def make_work(
    lengths: jax.Array, prompts: jax.Array, slot: jax.Array, sizes: tuple[int, int, int]
) -> Work:
    """Lists the blocks to read.

    Args:
      lengths: int32[S, L], see `make_ring`.
      prompts: int32[S], places of each prompt.
      slot: int32[], see `make_ring`.
      sizes: key heads, places of the ring, and of the prompts.
    """
    heads, places, length = sizes
    block, prompt_block = ring_block(places), prompt_block_of(length)
    parts = _parts(*lengths.shape, heads)
    lengths = jnp.clip(lengths, 0, places)
    starts = (slot - lengths) % places
    blocks = count_blocks(lengths, starts, places, block).reshape(parts, -1)
    lane, number = _listed(blocks, places // block)
    first = (starts // block).reshape(parts, -1)
    number = (jnp.take_along_axis(first, lane, axis=1) + number) % (places // block)
    prompt_blocks = ((prompts + prompt_block - 1) // prompt_block).reshape(parts, -1)
    slot_of, prompt_number = _listed(prompt_blocks, length // prompt_block)
    counts = jnp.stack([blocks.sum(axis=1), prompt_blocks.sum(axis=1)], axis=1).astype(jnp.int32)
    return Work(starts, lengths, prompts, lane, number, slot_of, prompt_number, counts)


def _listed(counts: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Lists the owner, and the number within the owner, of `counts` things of each owner.

    Args:
      counts: int32[parts, N].
      most: of one owner.

    Returns:
      Two of int32[parts, M], M being at least N * most and whole batches; 0 behind the last thing.
    """
    n = counts.shape[1]
    ends = jnp.cumsum(counts, axis=1)
    index = jnp.arange(-(-n * most // _CHAINS) * _CHAINS, dtype=jnp.int32)
    # Compared with all: a binary search is a loop, and there are few owners.
    owner = jnp.sum(index[:, None] >= ends[:, None], axis=-1, dtype=jnp.int32)
    real = owner < n
    owner = jnp.where(real, owner, 0)
    number = index - jnp.take_along_axis(ends - counts, owner, axis=1)
    return owner, jnp.where(real, number, 0)


def attend_ring(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ring: Ring,
    layer: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Returns the values that decoded tokens select from prompt, ring and themselves.

    Under a mesh (`jax.set_mesh`) each device computes its own slots and heads.

    Args:
      q: float[S, L, heads, head_dim], scaled.
      k, v: float[S, L, kv_heads, head_dim], of the tokens themselves.
      ring: what else they see.
      layer: int32[], which of the layers this is.
      interpret: emulate the kernel, on any platform.

    Returns:
      float[S, L, heads, head_dim].
    """
    s, lanes, heads, head_dim = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    rows, axis, copies = None, None, 1
    if mesh.size > 1:
        rows, axis, copies = mesh_axes(mesh, s, heads, k.shape[2])
    # Where devices share a key head, each has a part of its queries.
    groups = k.shape[2] * copies
    each = heads // groups
    # The sums of eight queries are one register.
    padded = -(-each // 8) * 8
    queries = q.astype(jnp.float32).reshape(s, lanes, groups, each, head_dim)
    queries = jnp.pad(queries, [(0, 0)] * 3 + [(0, padded - each), (0, 0)])
    k, v = (jnp.repeat(x.astype(jnp.float32), copies, axis=2)[:, :, :, None] for x in (k, v))
    keys = ring.prefix.k, ring.prefix.v, ring.cache.k, ring.cache.v

    def compute(
        layer: jax.Array, work: Work, own: tuple[jax.Array, ...], *keys: jax.Array
    ) -> jax.Array:
        head = jnp.int32(0)
        if copies > 1:
            head = jax.lax.axis_index(axis) * own[0].shape[2] // copies
        # Lanes of all slots in one axis, and layers too: the kernel computes few addresses.
        own = tuple(jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 1, 0) for x in own)
        *prompts, ring_k, ring_v = keys
        flat = [x.reshape(-1, *x.shape[3:]) for x in (ring_k, ring_v)]
        at = jnp.stack([layer, head])
        out = _call(at, work, own, *prompts, *flat, dtype=q.dtype, interpret=interpret)
        return jnp.moveaxis(out, 0, 1).reshape(*work.lengths.shape, -1, padded, head_dim)

    if mesh.size > 1:
        cut = axis if copies == 1 else None
        mine, prompts, cached = P(rows, None, axis), P(None, rows, cut), P(None, rows, None, cut)
        specs = P(), P(rows), mine, prompts, prompts, cached, cached
        compute = jax.shard_map(compute, in_specs=specs, out_specs=mine, check_vma=False)
    out = compute(layer, ring.work, (queries, k, v), *keys)[..., :each, :]
    return out.reshape(s, lanes, heads, head_dim).astype(q.dtype)


def _call(
    at: jax.Array,
    work: Work,
    own: tuple[jax.Array, ...],
    *keys: jax.Array,
    dtype: Any,
    interpret: bool,
) -> jax.Array:
    """The kernel on the slots and heads of one device.

    Args:
      at: int32[2], the layer, and the first of these heads among the keys'.
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
    )(at, flat, *own, *keys)


def _kernel(at_ref: Any, work: Work, *refs: Any, lanes: int, places: int, dtype: Any) -> None:
    """Some slots: their sums begin with the token itself, then come prompts and ring by blocks."""
    q_ref, k_ref, v_ref, *keys, out_ref, top_ref, total_ref = refs[:10]
    prompt_k, prompt_v, ring_k, ring_v, arrived = refs[10:]
    part, layer = pl.program_id(0), at_ref[0]
    heads, n, rows, head_dim = q_ref.shape
    block, prompt_block = ring_k.shape[-1], prompt_k.shape[-1]
    first_lane, first_slot = part * n, part * (n // lanes)
    lane_of_layer = layer * (pl.num_programs(0) * n) + first_lane
    mine = pl.ds(at_ref[1], heads)
    products = functools.partial(jnp.dot, preferred_element_type=jnp.float32)

    def span_of(number: Any, size: int, of: int) -> Any:
        """The places of a block; a single one may have any size."""
        return slice(None) if size == of else pl.ds(pl.multiple_of(number * size, size), size)

    def ring_copies(index: Any, to: tuple) -> list[Any]:
        span = span_of(work.block[part, index], block, places)
        at = lane_of_layer + work.lane[part, index], mine
        return [
            pltpu.make_async_copy(keys[2].at[*at, :, span], ring_k.at[*to], arrived.at[1, to[0]]),
            pltpu.make_async_copy(keys[3].at[*at, span], ring_v.at[*to], arrived.at[1, to[0]]),
        ]

    def prompt_copies(index: Any, to: tuple) -> list[Any]:
        span = span_of(work.prompt_block[part, index], prompt_block, keys[0].shape[-1])
        at = layer, first_slot + work.slot[part, index], mine
        return [
            pltpu.make_async_copy(keys[0].at[*at, :, span], prompt_k.at[*to], arrived.at[0, to[0]]),
            pltpu.make_async_copy(keys[1].at[*at, span], prompt_v.at[*to], arrived.at[0, to[0]]),
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


def row_axes(mesh: Any, rows: int) -> tuple[str, ...] | None:
    """Returns the mesh axes that cut the prompts; None where they do not divide them."""
    return BATCH[0] if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None


def mesh_axes(
    mesh: Any, rows: int, heads: int, kv_heads: int
) -> tuple[tuple[str, ...] | None, str | None, int]:
    """Returns the mesh axes of prompts and of heads, and how many devices share a key head."""
    tensor = mesh.shape["tensor"]
    copies = tensor // math.gcd(kv_heads, tensor)
    if heads % (kv_heads * copies) or kv_heads * copies % tensor:
        return row_axes(mesh, rows), None, 1
    return row_axes(mesh, rows), "tensor", copies


def _parts(slots: int, lanes: int, heads: int) -> int:
    """Returns into how many parts the slots are cut: two for chips of two cores, or more."""
    most = max(_STATES // (lanes * heads), 1)
    return next(n for n in range(min(2, slots), slots + 1) if slots % n == 0 and slots // n <= most)


def _divide(x: Any, by: int) -> tuple[Any, Any]:
    """Returns quotient and rest of a number from 0 on; Python's operators ask for its sign."""
    return jax.lax.div(x, jnp.int32(by)), jax.lax.rem(x, jnp.int32(by))


def ring_block(places: int) -> int:
    """Returns how many places of a ring of so many are read together."""
    return places if places < BLOCK else math.gcd(places, BLOCK)


def prompt_block_of(length: int) -> int:
    """Returns how many places of prompts with room for so many are read together."""
    return math.gcd(length, _PROMPT_BLOCK)
