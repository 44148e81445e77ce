"""Keys and values that later tokens attend to."""

from typing import NamedTuple

import jax

from emor3_jax.types import Array


class KV(NamedTuple):
    """Keys (after rope) and values of a prefix, held once per prompt and shared by its responses.

    Attributes:
      k: float[layers, B, kv_heads, head_dim, P]; with the positions last, a decoded token reads its
        keys without a transpose.
      v: float[layers, B, kv_heads, P, head_dim].
      mask: bool[B, P], True where a key may be attended to.
    """

    k: Array
    v: Array
    mask: Array


class Cache(NamedTuple):
    """Keys and values of the continuations themselves, `C` slots for each.

    Attributes:
      k: float[layers, B, G, kv_heads, head_dim, C]; for unrolled layers (`params.unroll`) a tuple
        with one array for each.
      v: float[layers, B, G, kv_heads, C, head_dim], or such a tuple.
      mask: bool[B, G, C].
    """

    k: Array | tuple[jax.Array, ...]
    v: Array | tuple[jax.Array, ...]
    mask: Array
