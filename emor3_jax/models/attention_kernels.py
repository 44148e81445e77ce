"""Attention by the kernels of libraries: splash attention on TPU, cuDNN on GPU.

Neither holds scores in memory. Both take a prompt's keys (or none) and each continuation's own.

Splash attention computes a group as one sequence: the queries of all G continuations against
`[prompt | keys of r1 … rG]`, under a mask known at compile time by which a continuation sees the
prompt and itself. Blocks that the mask leaves empty are skipped, so the prompt's keys are neither
copied nor is anything computed between continuations. Where continuations share rows, the mask is
data: each query brings its place, where its segment begins and which prompt it sees, packed into
the one integer that splash attention hands to a mask function (`PackedMask`); blocks between
segments are skipped by tables made on the device.

Deviations, numbered:
 1. cuDNN has no such masks: it computes each row apart, with a copy of the prompt's keys. Its own
    segments (offsets of packed sequences, not part of JAX's public interface) would need that copy
    for each continuation, and Hopper; here segments are part of the mask that it gets anyway.
 2. Padding among the keys is masked by segment ids (splash) or, where it may lie anywhere, moved
    behind the real keys (cuDNN knows lengths only); attention does not depend on their order.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
    splash_attention_mask_info,
)
from jax.sharding import PartitionSpec as P

from emor3_jax.models.attention import Own, Shared
from emor3_jax.parallel.mesh import head_axis, row_axes

_LANES = 128
"""Splash attention wants lengths and widths in multiples of this."""

_BLOCK = 512
"""Largest side of the blocks of scores that splash attention computes."""


class GroupMask(splash_attention_mask.Mask):
    """Continuations of one prompt, laid out one after the other, see the prompt and themselves.

    Attributes:
      prefix: columns of the prompt, seen by all.
      groups, length: continuations and the rows, and columns, of each.
      causal: whether a row sees only its own columns up to itself.
    """

    def __init__(self, prefix: int, groups: int, length: int, causal: bool) -> None:
        self.prefix, self.groups, self.length, self.causal = prefix, groups, length, causal

    @property
    def shape(self) -> tuple[int, int]:
        """Queries, keys."""
        rows = self.groups * self.length
        return rows, self.prefix + rows

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        row, column = (
            np.arange(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)
        )
        row, own = row[:, None], column[None] - self.prefix
        mine = row // self.length == own // self.length
        return (own < 0) | (mine & (own <= row) if self.causal else mine)

    def _key(self) -> tuple:
        return self.prefix, self.groups, self.length, self.causal

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupMask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


_PLACE_BITS = 15
MAX_QUERIES, MAX_PROMPTS = 1 << _PLACE_BITS, 1 << (32 - 2 * _PLACE_BITS)
"""Queries of packed continuations in one sequence, and prompts that they may belong to, at most."""


@dataclasses.dataclass(frozen=True)
class PackedMask:
    """Mask function of continuations that share rows: each query sees its prompt and its segment.

    Attributes:
      prefix: columns of the prompts.
      prompt: columns of each of them.
    """

    prefix: int
    prompt: int

    def codes(self, segments: jax.Array, owners: jax.Array | None) -> jax.Array:
        """Returns place, begin of the segment and prompt of each query in one integer, int32[Q].

        Args:
          segments: int32[Q]; those of one segment lie side by side.
          owners: int32[Q], index of the prompt that each query sees; None if there is one.
        """
        place, begin = _spans(segments)
        code = place | begin << _PLACE_BITS
        return code if owners is None else code | owners << 2 * _PLACE_BITS

    def blocks(self, codes: jax.Array, block: int) -> jax.Array:
        """Masks blocks of scores: True where any query of a block sees any of its columns.

        Args:
          codes: of the queries.
          block: side of a block.

        Returns:
          bool[Q / block, (prefix + Q) / block].
        """
        place, begin, owner = (x.reshape(-1, block) for x in self._decoded(codes))
        first = jnp.arange((self.prefix + codes.size) // block) * block
        last = first + block - 1

        def meet(low: jax.Array, high: jax.Array) -> jax.Array:
            return (low.min(axis=1)[:, None] <= last) & (high.max(axis=1)[:, None] >= first)

        found = meet(begin + self.prefix, place + self.prefix)
        if self.prefix:
            found |= meet(owner * self.prompt, (owner + 1) * self.prompt - 1)
        return found

    def __call__(self, codes: jax.Array, columns: jax.Array) -> jax.Array:
        """Masks columns: True where queries of these codes see them; the two are of one shape."""
        place, begin, owner = self._decoded(codes)
        own = columns - self.prefix
        seen = (own >= begin) & (own <= place)
        if self.prefix:
            before = owner * self.prompt
            seen |= (columns >= before) & (columns < before + self.prompt)
        return seen

    def _decoded(self, codes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        low = MAX_QUERIES - 1
        owner = jax.lax.shift_right_logical(codes, jnp.int32(2 * _PLACE_BITS))
        return codes & low, (codes >> _PLACE_BITS) & low, owner


def _spans(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the place of each query and the one where its segment begins, both int32[Q]."""
    place = jnp.arange(segments.size, dtype=jnp.int32)
    new = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])
    return place, jax.lax.cummax(jnp.where(new, place, 0))


def splash(q: jax.Array, prefix: Shared | None, own: Own, *, interpret: bool = False) -> jax.Array:
    """Attention by the TPU's kernel.

    Under a mesh (`jax.set_mesh`) each device computes its own prompts and, where `tensor` divides
    the key heads (`share_heads` makes it so), heads.

    Args:
      q: float[B, G, S, heads, head_dim], scaled.
      prefix: keys of the prompts.
      own: keys of the continuations, C = S.
      interpret: emulate the kernel, on any platform.

    Returns:
      float[B, G, S, heads, head_dim].

    Raises:
      ValueError: if continuations that share rows are too many for `PackedMask`.
    """
    b, g, s, heads, head_dim = q.shape
    kv_heads = own.v.shape[2]
    width = _up(head_dim, _LANES)
    length = _padded_length(s)
    before = _padded_length(prefix.mask.shape[-1]) if prefix is not None else 0

    def join(x: jax.Array) -> jax.Array:
        """Joins [B, G, heads, S, head_dim] to [B, heads, G * length, width]."""
        x = jnp.swapaxes(_fill(_fill(x, 3, length), 4, width), 1, 2)
        return x.reshape(b, x.shape[1], g * length, width)

    queries = join(jnp.swapaxes(q, 2, 3))
    keys, values = join(jnp.swapaxes(own.k, 3, 4)), join(own.v)
    seen = _fill(own.mask, 2, length).reshape(b, g * length)
    if prefix is not None:
        parts = ((jnp.swapaxes(prefix.k, 2, 3), keys), (prefix.v, values))
        keys, values = (
            jnp.concatenate([_fill(_fill(x, 2, before), 3, width).astype(y.dtype), y], axis=2)
            for x, y in parts
        )
        seen = jnp.concatenate([_fill(prefix.mask, 1, before), seen], axis=1)
    codes = packed = None
    if own.segments is not None:
        packed = PackedMask(before, prefix.mask.shape[-1] // prefix.prompts if before else 0)
        codes = _codes(packed, own, length)
        # Padding sees its own padding, so that it sees anything; nothing else does.
        seen = seen.at[:, before:].set(True)

    def compute(
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        seen: jax.Array,
        codes: jax.Array | None,
    ) -> jax.Array:
        # All queries belong to segment 1, as do the keys that may be seen.
        ids = splash_attention_kernel.SegmentIds(
            jnp.ones(queries.shape[:1] + queries.shape[2:3], jnp.int32), seen.astype(jnp.int32)
        )
        if packed is not None:
            # The tables of blocks are data, which each row has its own of.
            return jax.lax.map(
                lambda x: _packed_kernel(packed, x[4], block, interpret)(*x[:3], segment_ids=x[3]),
                (queries, keys, values, ids, codes),
            )
        mask = GroupMask(before, g, length, own.causal)
        kernel = _splash_kernel(queries.shape[1], mask, interpret)
        return jax.vmap(lambda *x: kernel(*x[:3], segment_ids=x[3]))(queries, keys, values, ids)

    block = math.gcd(math.gcd(length, before), _BLOCK)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        rows = row_axes(mesh, b)
        spec = P(rows, head_axis(mesh, kv_heads))
        compute = jax.shard_map(
            compute,
            in_specs=(spec, spec, spec, P(rows), P(rows)),
            out_specs=spec,
            check_vma=False,
        )
    out = compute(queries, keys, values, seen, codes)
    out = jnp.moveaxis(out.reshape(b, heads, g, length, width), 1, 3)
    return out[:, :, :s, :, :head_dim]


def _codes(packed: PackedMask, own: Own, length: int) -> jax.Array:
    """Returns `PackedMask.codes` of the queries of each row of a batch, int32[B, G * length]."""
    b, g, _ = own.segments.shape
    owners = own.owners
    if own.segments.size // b > MAX_QUERIES or not own.causal:
        raise ValueError(
            f"segments of shape {own.segments.shape}, causal={own.causal}: packed continuations "
            f"must be causal, and at most {MAX_QUERIES} tokens in one sequence"
        )

    def flat(x: jax.Array, value: int) -> jax.Array:
        padding = [(0, 0), (0, 0), (0, length - x.shape[2])]
        return jnp.pad(x, padding, constant_values=value).reshape(b, g * length)

    segments = flat(own.segments, -1)
    if owners is None:
        return jax.vmap(lambda x: packed.codes(x, None))(segments)
    return jax.vmap(packed.codes)(segments, jnp.clip(flat(owners, 0), 0, MAX_PROMPTS - 1))


def cudnn(
    q: jax.Array, prefix: Shared | None, own: Own, *, implementation: str = "cudnn"
) -> jax.Array:
    """Attention by cuDNN's kernel.

    Args:
      q: float[B, G, S, heads, head_dim], scaled, of 16 bits.
      prefix: keys of the prompts.
      own: keys of the continuations, C = S.
      implementation: of `jax.nn.dot_product_attention`; "xla" computes the same on any platform.

    Returns:
      float[B, G, S, heads, head_dim].
    """
    b, g, s, heads, head_dim = q.shape
    if prefix is not None:
        # With a mask, the kernel's backward pass wants even lengths.
        even = s + s % 2
        q = _fill(q, 2, even)
        own = Own(
            _fill(own.k, 4, even),
            _fill(own.v, 3, even),
            _fill(own.mask, 2, even),
            own.causal,
            None if own.segments is None else _fill(own.segments, 2, even),
        )
        size = prefix.mask.shape[-1] + prefix.mask.shape[-1] % 2
        prefix = Shared(
            _fill(prefix.k, 3, size), _fill(prefix.v, 2, size), _fill(prefix.mask, 1, size)
        )
    length = q.shape[2]

    def rows(x: jax.Array) -> jax.Array:
        """Joins B and G; [B, G, kv_heads, C, head_dim] becomes [B * G, C, kv_heads, head_dim]."""
        return jnp.swapaxes(x, 2, 3).reshape(b * g, x.shape[3], x.shape[2], head_dim)

    attention = functools.partial(
        jax.nn.dot_product_attention,
        q.reshape(b * g, length, heads, head_dim),
        scale=1.0,
        implementation=implementation,
    )
    k, v = rows(jnp.swapaxes(own.k, 3, 4)), rows(own.v)
    mask = own.mask.reshape(b * g, length)
    if prefix is None and own.causal:
        # Padding is on the right, where no real query looks.
        out = attention(k, v, is_causal=True)
    elif prefix is None:
        order = jnp.argsort(~mask, axis=1, stable=True)[..., None, None]
        k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
        # A row without any key, which is padding, may look at one: its result is meaningless.
        lengths = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
        out = attention(k, v, key_value_seq_lengths=lengths)
    else:

        def copies(x: jax.Array) -> jax.Array:
            return rows(jnp.broadcast_to(x[:, None], (b, g, *x.shape[1:])))

        k = jnp.concatenate([copies(jnp.swapaxes(prefix.k, 2, 3)).astype(k.dtype), k], axis=1)
        v = jnp.concatenate([copies(prefix.v).astype(v.dtype), v], axis=1)
        before = jnp.broadcast_to(prefix.mask[:, None, None], (b, g, length, size))
        mine = jnp.broadcast_to(own.mask[:, :, None], (b, g, length, length))
        if own.causal:
            mine &= jnp.tri(length, dtype=bool)
        if own.segments is not None:
            mine &= own.segments[:, :, :, None] == own.segments[:, :, None]
        seen = jnp.concatenate([before, mine], axis=-1)
        out = attention(k, v, mask=seen.reshape(b * g, 1, length, size + length))
    return out.reshape(b, g, length, heads, head_dim)[:, :, :s]


@functools.cache
def _splash_kernel(
    heads: int, mask: GroupMask, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    """Returns the kernel for one prompt, its tables of blocks as constants."""
    block = math.gcd(math.gcd(mask.length, mask.prefix), _BLOCK)
    # As `make_splash_mha` does, but with tables that stay NumPy: making arrays of a device fails
    # where the program is compiled for devices that are not there.
    heads_mask = splash_attention_mask.MultiHeadMask([mask] * heads)
    tables = [
        process(heads_mask, (block, block), head_shards=1, q_seq_shards=1)[0]
        for process in (
            splash_attention_mask_info.process_mask,
            splash_attention_mask_info.process_mask,
            splash_attention_mask_info.process_mask_dkv,
        )
    ]
    return _kernel(tables, block, interpret)


def _packed_kernel(
    mask: PackedMask, codes: jax.Array, block: int, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    """Returns the kernel for one row of packed continuations, its tables of blocks as data."""
    blocks = mask.blocks(codes, block)[None]
    tables = [
        # Of a mask with one entry for each block: which blocks are not empty, and which is next.
        process(blocks, (1, 1))[0]._replace(
            mask_next=None, partial_mask_blocks=None, q_sequence=codes, is_dynamic_mask=None
        )
        for process in (
            splash_attention_mask_info.process_dynamic_mask,
            splash_attention_mask_info.process_dynamic_mask,
            splash_attention_mask_info.process_dynamic_mask_dkv,
        )
    ]
    return _kernel(tables, block, interpret, mask)


def _kernel(
    tables: list[splash_attention_mask_info.MaskInfo],
    block: int,
    interpret: bool,
    mask_function: PackedMask | None = None,
) -> splash_attention_kernel.SplashAttentionKernel:
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash_attention_kernel.SplashAttentionKernel(
        *tables,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        interpret=interpret,
    )


def _padded_length(n: int) -> int:
    """Returns a length in whole blocks: small ones for short sequences, large ones for long."""
    return _up(n, _LANES if n < 2 * _BLOCK else _BLOCK)


def _fill(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pads one axis at its end with zeros."""
    return jnp.pad(x, [(0, (size - x.shape[i]) * (i == axis)) for i in range(x.ndim)])


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
