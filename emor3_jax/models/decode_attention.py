"""Attention of decoded tokens by a TPU kernel that reads only the places of the cache in use.

XLA's attention of a decoded token (`attention.attend`) reads the whole ring of every lane and the
whole padded prompt, and masks what does not belong to them; with responses of very different
lengths most of that is read in vain. This kernel copies to fast memory only the blocks of `BLOCK`
places that hold a key of the lane, or of the prompt.

* One call serves a layer: prompt, ring and the token itself, in one softmax. The keys of all
  layers are an operand as they are, in slow memory, and the layer is an index; a slice of them for
  each layer would be a copy.
* Which blocks are read is listed once a token, for all layers (`make_work`), by XLA; the kernel
  (`decode_kernel`) walks through the list, copying some blocks while it computes others.
* A block of a prompt is read once for all lanes and all query heads of its slot, a block of the
  ring once for the query heads of its key head.

The kernels that JAX ships do not fit. `paged_attention` knows lengths but no first place, so a
block of the ring that belongs to a lane in part would count whole, and it returns no sums to join
with the prompt's part; `ragged_paged_attention` wants keys and values interleaved in one array of
pages, and has no shared prefix; `flash_attention` reads all keys; the masks of `splash_attention`
are known when it is compiled or else are arrays as large as the scores. The last two also take the
keys of one layer alone.

Deviations, numbered:
 1. A response that has ended reads nothing (`lengths` 0); what comes out for it is undefined.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from emor3_jax.models.cache import KV, Cache
from emor3_jax.parallel.mesh import head_axis, row_axes

BLOCK = 128
"""Places of the ring that are read together: the width of a TPU's vector."""

_PROMPT_BLOCK = 256
"""Places of a prompt that are read together, where it is a multiple of it; else `BLOCK`."""

_SPARE = 32
"""Entries behind a list of blocks: the kernel reads it in batches, of at most so many."""

_STATES = 256
"""Lanes times key heads whose sums are in fast memory together, 24 KB each."""


class Work(NamedTuple):
    """Blocks to read for the next tokens, the same for all layers; of one device or of all of them.

    The slots are cut into `parts` equal parts, which the kernel computes one after the other.

    Attributes:
      starts: int32[S, L], the first place of each lane in the ring.
      lengths: int32[S, L], its places.
      prompts: int32[S], places of each prompt.
      lane, row, block: int32[parts, M], lane (counted within the part), its row of the ring (of all
        of the device) and the block.
      slot, prompt_block: int32[parts, N], the same of prompts.
      counts: int32[parts, 2], how many there are in the lists of the ring and of the prompts.
    """

    starts: jax.Array
    lengths: jax.Array
    prompts: jax.Array
    lane: jax.Array
    row: jax.Array
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

    Lanes that are rows of their own (`Cache.routing`) are brought to the cells of their slots; a
    cell without a lane reads nothing.

    Under a mesh (`jax.set_mesh`) each device lists the blocks of its own slots.

    Args:
      prefix: keys and values of the prompts, of which only the ends may be masked.
      cache: of the continuations; of each the last `lengths` places before `slot` are seen.
      lengths: int32[S, L], or int32[N, 1] with a routing; 0 for those of which nothing need be
        read.
      slot: int32[], the place of the ring that the next tokens will take.
    """
    heads, places, length = cache.v.shape[3], cache.k.shape[-1], prefix.k.shape[-1]
    routing, count = cache.routing, len(prefix.mask)

    def own(lengths: jax.Array, prompts: jax.Array, slot: jax.Array, *rows: jax.Array) -> Work:
        return make_work(lengths, prompts, slot, (heads, places, length), *rows)

    prompts = jnp.sum(prefix.mask, axis=-1, dtype=jnp.int32)
    args = lengths, prompts, slot
    if routing is not None:
        rows = routing.rows.reshape(count, -1)
        args = routing.to_prompts(lengths, count), prompts, slot, rows
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        cut = P(row_axes(mesh, count))
        ins = cut, cut, P(), cut
        own = jax.shard_map(own, in_specs=ins[: len(args)], out_specs=cut, check_vma=False)
    return Ring(prefix, cache, own(*args))


def make_work(
    lengths: jax.Array,
    prompts: jax.Array,
    slot: jax.Array,
    sizes: tuple[int, int, int],
    rows: jax.Array | None = None,
) -> Work:
    """Lists the blocks to read.

    Args:
      lengths: int32[S, L], see `make_ring`.
      prompts: int32[S], places of each prompt.
      slot: int32[], see `make_ring`.
      sizes: key heads, places of the ring, and of the prompts.
      rows: int32[S, L], row of the ring of each lane; None if they lie in order.
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
    if rows is None:
        rows = jnp.arange(lengths.size, dtype=jnp.int32)
    row = jnp.take_along_axis(rows.reshape(parts, -1), lane, axis=1)
    return Work(starts, lengths, prompts, lane, row, number, slot_of, prompt_number, counts)


def _listed(counts: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Lists the owner, and the number within the owner, of `counts` things of each owner.

    Args:
      counts: int32[parts, N].
      most: of one owner.

    Returns:
      Two of int32[parts, N * most + _SPARE]; 0 behind the last thing.
    """
    n = counts.shape[1]
    ends = jnp.cumsum(counts, axis=1)
    index = jnp.arange(n * most + _SPARE, dtype=jnp.int32)
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

    With a routing, S and L of the arguments and the result are N and 1.

    Under a mesh (`jax.set_mesh`) each device computes its own slots and, where `tensor` divides the
    key heads (`share_heads` makes it so), heads.

    Args:
      q: float[S, L, heads, head_dim], scaled.
      k, v: float[S, L, kv_heads, head_dim], of the tokens themselves.
      ring: what else they see.
      layer: int32[], which of the layers this is.
      interpret: emulate the kernel, on any platform.

    Returns:
      float[S, L, heads, head_dim].
    """
    routing = ring.cache.routing
    if routing is not None:
        q, k, v = (routing.to_prompts(x, len(ring.prefix.mask)) for x in (q, k, v))
    s, lanes, heads, head_dim = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    groups = k.shape[2]
    each = heads // groups
    # The sums of eight queries are one register.
    padded = -(-each // 8) * 8
    queries = q.astype(jnp.float32).reshape(s, lanes, groups, each, head_dim)
    queries = jnp.pad(queries, [(0, 0)] * 3 + [(0, padded - each), (0, 0)])
    k, v = (x.astype(jnp.float32)[:, :, :, None] for x in (k, v))
    keys = ring.prefix.k, ring.prefix.v, ring.cache.k, ring.cache.v

    from emor3_jax.models.decode_kernel import read_blocks

    def compute(
        layer: jax.Array, work: Work, own: tuple[jax.Array, ...], *keys: jax.Array
    ) -> jax.Array:
        # Lanes of all slots in one axis, and layers too: the kernel computes few addresses.
        own = tuple(jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 1, 0) for x in own)
        *prompts, ring_k, ring_v = keys
        flat = [x.reshape(-1, *x.shape[3:]) for x in (ring_k, ring_v)]
        out = read_blocks(layer, work, own, *prompts, *flat, dtype=q.dtype, interpret=interpret)
        return jnp.moveaxis(out, 0, 1).reshape(*work.lengths.shape, -1, padded, head_dim)

    if mesh.size > 1:
        rows, axis = row_axes(mesh, s), head_axis(mesh, groups)
        mine, prompts, cached = P(rows, None, axis), P(None, rows, axis), P(None, rows, None, axis)
        specs = P(), P(rows), mine, prompts, prompts, cached, cached
        compute = jax.shard_map(compute, in_specs=specs, out_specs=mine, check_vma=False)
    out = compute(layer, ring.work, (queries, k, v), *keys)[..., :each, :]
    out = out.reshape(s, lanes, heads, head_dim).astype(q.dtype)
    return out if routing is None else routing.to_rows(out)


def _parts(slots: int, lanes: int, heads: int) -> int:
    """Returns into how many parts the slots are cut: two for chips of two cores, or more."""
    most = max(_STATES // (lanes * heads), 1)
    return next(n for n in range(min(2, slots), slots + 1) if slots % n == 0 and slots // n <= most)


def ring_block(places: int) -> int:
    """Returns how many places of a ring of so many are read together."""
    return places if places < BLOCK else math.gcd(places, BLOCK)


def prompt_block_of(length: int) -> int:
    """Returns how many places of prompts with room for so many are read together."""
    return math.gcd(length, _PROMPT_BLOCK)
