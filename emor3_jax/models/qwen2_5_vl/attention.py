"""Grouped-query attention over several sources of keys, without copying any of them.

A continuation attends to the keys of its prompt (one copy for all responses of the group), to its
own cached keys, and to the keys just computed. The scores of each source are computed apart and
joined for one softmax.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30
"""Score of a key that may not be attended to: finite, so that a row without any key has no NaN."""


class Shared(NamedTuple):
    """Keys of a prompt, seen by all its continuations.

    Attributes:
      k, v: float[B, P, kv_heads, head_dim].
      mask: bool[B, P].
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array


class Own(NamedTuple):
    """Keys of each continuation itself.

    Attributes:
      k, v: float[B, G, C, kv_heads, head_dim].
      mask: bool[B, G, S or 1, C], which key each query may see.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def attend(q: jax.Array, sources: list[Shared | Own]) -> jax.Array:
    """Returns the values that the queries select from all sources together.

    Args:
      q: float[B, G, S, heads, head_dim].
      sources: at least one.

    Returns:
      float[B, G, S, heads, head_dim].
    """
    b, g, s, heads, head_dim = q.shape
    kv_heads = sources[0].k.shape[-2]
    q = (q * head_dim**-0.5).reshape(b, g, s, kv_heads, heads // kv_heads, head_dim)
    scores = []
    for source in sources:
        if isinstance(source, Shared):
            equation = "bgskrd,bckd->bgkrsc"
            mask = source.mask[:, None, None, None, None]
        else:
            equation = "bgskrd,bgckd->bgkrsc"
            mask = source.mask[:, :, None, None]
        score = jnp.einsum(equation, q, source.k, preferred_element_type=jnp.float32)
        scores.append(jnp.where(mask, score, _MASKED))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    out = 0.0
    start = 0
    for source in sources:
        size = source.k.shape[-3]
        equation = "bgkrsc,bckd->bgskrd" if isinstance(source, Shared) else "bgkrsc,bgckd->bgskrd"
        out = out + jnp.einsum(
            equation,
            weights[..., start : start + size],
            source.v,
            preferred_element_type=jnp.float32,
        )
        start += size
    return out.astype(q.dtype).reshape(b, g, s, heads, head_dim)
