"""The arrays that a policy reads: images in window layout, prompts, shared prefixes, caches.

Shapes use the project's letters: `B` prompts, `G` responses per prompt, `P` prompt tokens, `S`
continuation tokens, `I` images, `W` attention windows of an image, `L` patches of a window.
"""

from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


class Images(NamedTuple):
    """Images cut into patches, the patches grouped by attention window and padded to `L` slots.

    The four patches that the merger joins are neighbours (`slot // 4` is one merged slot), and a
    window holds `L = (window_size / patch_size) ** 2` patches. Padding slots have `mask` False.

    Attributes:
      patches: float32[I, W, L, 3 * temporal_patch_size * patch_size**2], as the image processor of
        transformers flattens a patch (channel, time, row, column).
      coords: int32[I, W, L, 2], row and column of the patch in its image.
      mask: bool[I, W, L], True where a patch is real.
    """

    patches: Array
    coords: Array
    mask: Array


class Prompt(NamedTuple):
    """Prompt tokens, right padded, with everything that a mesh of static shapes needs precomputed.

    Attributes:
      tokens: int32[B, P].
      positions: int32[B, P, 3], rope positions (temporal, height, width).
      mask: bool[B, P].
      image_slots: int32[B, P], for an image token the index of its feature in the merged slots
        of the batch, flattened over [I, W * L / merge**2]; -1 for a text token.
    """

    tokens: Array
    positions: Array
    mask: Array
    image_slots: Array


class KV(NamedTuple):
    """Keys (after rope) and values of a prefix, held once per prompt and shared by its responses.

    Attributes:
      k: float[layers, B, kv_heads, head_dim, P]; with the slots last, a decoded token reads its
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
      k: float[layers, B, G, kv_heads, head_dim, C]; for unrolled layers (`model.unroll`) a tuple
        with one array for each.
      v: float[layers, B, G, kv_heads, C, head_dim], or such a tuple.
      mask: bool[B, G, C].
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    mask: Array
