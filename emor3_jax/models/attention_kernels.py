"""Attention by the kernels of libraries: splash attention on TPU, cuDNN on GPU.

Neither holds scores in memory. Both take a prompt's keys (or none) and each continuation's own.

Splash attention computes a group as one sequence: the queries of all G continuations against
`[prompt | keys of r1 … rG]`, under a mask known at compile time by which a continuation sees the
prompt and itself. Blocks that the mask leaves empty are skipped, so the prompt's keys are neither
copied nor is anything computed between continuations.

Deviations, numbered:
 1. cuDNN has no such masks: it computes each continuation apart, with a copy of the prompt's keys.
 2. Padding among the keys is masked by segment ids (splash) or, where it may lie anywhere, moved
    behind the real keys (cuDNN knows lengths only); attention does not depend on their order.
"""

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


def splash(q: jax.Array, prefix: Shared | None, own: Own, *, interpret: bool = False) -> jax.Array:
    """Attention by the TPU's kernel.

    Under a mesh (`jax.set_mesh`) each device computes its own prompts and heads.

    Args:
      q: float[B, G, S, heads, head_dim], scaled.
      prefix: keys of the prompts.
      own: keys of the continuations, C = S.
      interpret: emulate the kernel, on any platform.

    Returns:
      float[B, G, S, heads, head_dim].
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

    def compute(
        queries: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array
    ) -> jax.Array:
        kernel = _splash_kernel(
            queries.shape[1], GroupMask(before, g, length, own.causal), interpret
        )

        def one(
            queries: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array
        ) -> jax.Array:
            # All queries belong to segment 1, as do the keys that may be seen.
            ids = splash_attention_kernel.SegmentIds(
                jnp.ones(queries.shape[1], jnp.int32), seen.astype(jnp.int32)
            )
            return kernel(queries, keys, values, segment_ids=ids)

        return jax.vmap(one)(queries, keys, values, seen)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        rows, cut, copies = _parts(mesh.shape, b, heads, kv_heads)
        keys, values = (jnp.repeat(x, copies, axis=1) for x in (keys, values))
        spec = P(rows, cut)
        compute = jax.shard_map(
            compute, in_specs=(spec, spec, spec, P(rows)), out_specs=spec, check_vma=False
        )
    out = compute(queries, keys, values, seen)
    out = jnp.moveaxis(out.reshape(b, heads, g, length, width), 1, 3)
    return out[:, :, :s, :, :head_dim]


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
            _fill(own.k, 4, even), _fill(own.v, 3, even), _fill(own.mask, 2, even), own.causal
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
        seen = jnp.concatenate([before, mine], axis=-1)
        out = attention(k, v, mask=seen.reshape(b * g, 1, length, size + length))
    return out.reshape(b, g, length, heads, head_dim)[:, :, :s]


@functools.cache
def _splash_kernel(
    heads: int, mask: GroupMask, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    """Returns the kernel for one prompt, its tables of blocks as constants."""
    block = math.gcd(math.gcd(mask.length, mask.prefix), _BLOCK)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
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
    return splash_attention_kernel.SplashAttentionKernel(
        *tables,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )


def _parts(
    sizes: dict[str, int], b: int, heads: int, kv_heads: int
) -> tuple[tuple[str, ...] | None, str | None, int]:
    """Returns the mesh axes of prompts and of heads, and how often each key head is repeated.

    An axis that does not divide is left out; key heads are repeated where the axis has more parts
    than they are.
    """
    rows = ("data", "fsdp") if b % (sizes["data"] * sizes["fsdp"]) == 0 else None
    copies = sizes["tensor"] // math.gcd(kv_heads, sizes["tensor"])
    if heads % sizes["tensor"] or heads % (kv_heads * copies):
        return rows, None, 1
    return rows, "tensor", copies


def _padded_length(n: int) -> int:
    """Returns a length in whole blocks: small ones for short sequences, large ones for long."""
    return _up(n, _LANES if n < 2 * _BLOCK else _BLOCK)


def _fill(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pads one axis at its end with zeros."""
    return jnp.pad(x, [(0, (size - x.shape[i]) * (i == axis)) for i in range(x.ndim)])


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
