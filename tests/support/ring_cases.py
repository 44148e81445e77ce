"""Decoded tokens before a ring of which each lane uses another part; what XLA makes of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models.attention import Own, Shared, attend, slots_last
from emor3_jax.models.cache import KV, Cache
from emor3_jax.models.decode_attention import attend_ring, make_ring
from emor3_jax.parallel.mesh import share_heads


class Case(NamedTuple):
    """Keys of all layers, and a token of each lane.

    Attributes:
      prefix, cache: keys and values.
      lengths: int32[S, L], places of each lane.
      slot: int32[], the place that is written next.
      q: float[S, L, heads, head_dim], scaled.
      k, v: float[S, L, kv_heads, head_dim].
    """

    prefix: KV
    cache: Cache
    lengths: jax.Array
    slot: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array


def make_case(
    *sizes: int,
    seed: int = 0,
    dtype: Any = jnp.float32,
) -> Case:
    """Draws a case: an empty lane, full ones, rings that go on at the beginning, a prompt of none.

    Args:
      *sizes: slots, lanes, key heads, queries of each, width of a head, places of the ring, of the
        prompts, and layers.
      seed: of the generator.
      dtype: of keys, values and queries.
    """
    s, lanes, heads, each, width, places, length, layers = sizes
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    prompts, lengths = rng.integers(0, length + 1, s), rng.integers(0, places + 1, (s, lanes))
    # Short ones, so that blocks are left out, and all extremes.
    lengths = np.where(rng.random((s, lanes)) < 0.5, lengths // 8, lengths)
    extremes = [0, places, places - 1, 1][: lengths.size - 1]
    lengths.flat[: len(extremes)] = rng.permutation(extremes)
    prompts[0] = rng.choice([0, 1, length])
    slot = int(rng.integers(0, places))
    mask = (np.arange(places) - (slot - lengths[..., None])) % places < lengths[..., None]
    return Case(
        KV(
            draw(layers, s, heads, width, length),
            draw(layers, s, heads, length, width),
            jnp.asarray(np.arange(length) < prompts[:, None]),
        ),
        Cache(
            draw(layers, s, lanes, heads, width, places),
            draw(layers, s, lanes, heads, places, width),
            jnp.asarray(mask),
        ),
        jnp.asarray(lengths, jnp.int32),
        jnp.int32(slot),
        draw(s, lanes, heads * each, width) * width**-0.5,
        draw(s, lanes, heads, width),
        draw(s, lanes, heads, width),
    )


def ragged(case: Case, layer: jax.Array) -> jax.Array:
    """What the kernel computes, emulated; each part of `tensor` has a key head."""
    k, v = share_heads(case.k), share_heads(case.v)
    copies = k.shape[2] // case.k.shape[2]
    prefix, cache = (
        x._replace(**{name: jnp.repeat(getattr(x, name), copies, axis=-3) for name in "kv"})
        for x in (case.prefix, case.cache)
    )
    ring = make_ring(prefix, cache, case.lengths, case.slot)
    return attend_ring(case.q, k, v, ring, layer, interpret=True)


def by_xla(case: Case, layer: int) -> jax.Array:
    """What XLA computes of all places, under the masks."""
    prefix, cache = case.prefix, case.cache
    token = slots_last(case.k[:, :, None], case.v[:, :, None])
    own = Own(*token, jnp.ones((*case.lengths.shape, 1), bool), True)
    sources = [
        Shared(prefix.k[layer], prefix.v[layer], prefix.mask),
        Own(cache.k[layer], cache.v[layer], cache.mask),
        own,
    ]
    return attend(case.q[:, :, None], sources)[:, :, 0]
