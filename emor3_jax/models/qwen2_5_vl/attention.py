"""Grouped-query attention over several sources of keys, without copying any of them.

A continuation attends to the keys of its prompt (one copy for all responses of the group), to its
own cached keys, and to the keys just computed. The scores of each source are computed apart and
joined for one softmax; products are plain batched matrix products, which every backend has fast
kernels for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30
"""Score of a key that may not be attended to: finite, so that a row without any key has no NaN."""


class Shared(NamedTuple):
    """Keys of a prompt, seen by all its continuations.

    Attributes:
      k: float[B, kv_heads, head_dim, P].
      v: float[B, kv_heads, P, head_dim].
      mask: bool[B, P].
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array


class Own(NamedTuple):
    """Keys of each continuation itself.

    Attributes:
      k: float[B, G, kv_heads, head_dim, C].
      v: float[B, G, kv_heads, C, head_dim].
      mask: bool[B, G, S or 1, C], which key each query may see.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def slots_last(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values, both float[..., C, kv_heads, head_dim], as the sources hold them."""
    return jnp.moveaxis(k, -3, -1), jnp.swapaxes(v, -3, -2)


def attend(q: jax.Array, sources: list[Shared | Own]) -> jax.Array:
    """Returns the values that the queries select from all sources together.

    Args:
      q: float[B, G, S, heads, head_dim].
      sources: at least one.

    Returns:
      float[B, G, S, heads, head_dim].
    """
    b, g, s, heads, head_dim = q.shape
    kv_heads = sources[0].v.shape[-3]
    q = (q * head_dim**-0.5).reshape(b, g, s, kv_heads, heads // kv_heads, head_dim)
    q = jnp.swapaxes(q, 2, 3)  # [B, G, kv_heads, S, heads of the group, head_dim]

    def align(x: jax.Array, source: Shared | Own) -> jax.Array:
        """Swaps B, G, kv_heads and B, kv_heads, G: a prompt's keys meet all its G continuations."""
        return jnp.swapaxes(x, 1, 2) if isinstance(source, Shared) else x

    def matmul(x: jax.Array, source: Shared | Own, y: jax.Array) -> jax.Array:
        """Multiplies [..., rows, i] by a source's [..., i, j]; the rows of y's batch joined."""
        rows = x.reshape(*y.shape[:-2], -1, x.shape[-1])
        out = jnp.matmul(rows, y, preferred_element_type=jnp.float32)
        return out.reshape(*x.shape[:-1], y.shape[-1])

    scores = []
    for source in sources:
        score = matmul(align(q, source), source, source.k)
        if isinstance(source, Shared):
            mask = source.mask[:, None, None, None, None]
        else:
            mask = source.mask[:, :, None, :, None]
        scores.append(jnp.where(mask, score, _MASKED))

    # One softmax over all sources, of which only the maxima and the sums are brought together.
    top = jnp.stack(
        [align(jnp.max(x, axis=-1), source) for x, source in zip(scores, sources, strict=True)]
    )
    top = jax.lax.stop_gradient(jnp.max(top, axis=0))
    total, out = 0.0, 0.0
    for score, source in zip(scores, sources, strict=True):
        weights = jnp.exp(score - align(top, source)[..., None])
        total += align(jnp.sum(weights, axis=-1), source)
        out += align(matmul(weights.astype(q.dtype), source, source.v), source)
    out = (out / total[..., None]).astype(q.dtype)
    return jnp.swapaxes(out, 2, 3).reshape(b, g, s, heads, head_dim)
