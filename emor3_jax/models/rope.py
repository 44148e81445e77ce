"""Rotary positions: of prompts with images (host), and the rotation tables (device).

Text advances all three axes together. An image of h x w tokens occupies one temporal position, its
rows the height axis and its columns the width axis; the text after it goes on from the largest
position used plus one. As `get_rope_index` of transformers does for still images.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def prompt_positions(
    tokens: np.ndarray, grids: Sequence[Sequence[int]], image_token: int, merge: int
) -> tuple[np.ndarray, int]:
    """Returns the rope positions of one unpadded prompt.

    Args:
      tokens: int32[n], image placeholders expanded to one per merged token.
      grids: (1, rows, columns) in patches of each image, in order.
      image_token: id that stands for a feature of an image.
      merge: m; m * m neighbouring patches become one token.

    Returns:
      int32[n, 3] (temporal, height, width), and the position of the token that comes next.

    Raises:
      ValueError: if the runs of image tokens and the grids do not fit each other.
    """
    tokens = np.asarray(tokens)
    is_image = tokens == image_token
    positions = np.zeros((len(tokens), 3), np.int32)
    start = 0
    at = 0
    remaining = [tuple(int(x) for x in grid) for grid in grids]
    while at < len(tokens):
        if not is_image[at]:
            end = at
            while end < len(tokens) and not is_image[end]:
                end += 1
            positions[at:end] = (start + np.arange(end - at))[:, None]
            start += end - at
            at = end
            continue
        if not remaining:
            raise ValueError(
                f"image tokens start at {at} but all {len(grids)} images are already placed"
            )
        frames, rows, columns = remaining.pop(0)
        if frames != 1:
            raise ValueError(f"grid {(frames, rows, columns)}: only still images are supported")
        rows, columns = rows // merge, columns // merge
        end = at + rows * columns
        if end > len(tokens) or not is_image[at:end].all():
            raise ValueError(
                f"an image of {rows} x {columns} tokens needs {rows * columns} image tokens from "
                f"{at} on; the prompt has fewer"
            )
        positions[at:end, 0] = start
        positions[at:end, 1] = start + np.repeat(np.arange(rows), columns)
        positions[at:end, 2] = start + np.tile(np.arange(columns), rows)
        start += max(rows, columns)
        at = end
    if remaining:
        raise ValueError(f"{len(remaining)} images have no image tokens in the prompt")
    return positions, start


def text_table(
    positions: jax.Array, axes: Sequence[int], theta: float
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of the decoder's angles.

    Args:
      positions: int32[..., 3] (temporal, height, width); equal for text.
      axes: which of the three each of the head_dim // 2 frequencies follows.
      theta: base of the frequencies.

    Returns:
      Two float32[..., head_dim // 2].
    """
    frequencies = _frequencies(len(axes), theta)
    angles = positions.astype(jnp.float32)[..., np.asarray(axes)] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def vision_table(coords: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of the vision tower's angles: rows turn one half, columns the other.

    Args:
      coords: int32[..., 2], row and column of each patch.
      head_dim: width of a head.

    Returns:
      Two float32[..., head_dim // 2].
    """
    angles = coords.astype(jnp.float32)[..., None] * _frequencies(head_dim // 4, 10_000.0)
    angles = angles.reshape(*coords.shape[:-1], head_dim // 2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, scale: float = 1.0) -> jax.Array:
    """Turns each pair (i, i + d/2) of a head's components, in float32.

    Args:
      x: float[..., heads, d].
      cos, sin: float32[..., d // 2], without the axis of heads.
      scale: factor on the result before it is rounded; that of the scores, for queries.

    Returns:
      As `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (turned * scale).astype(x.dtype)


def _frequencies(n: int, theta: float) -> np.ndarray:
    exponents = np.arange(0, 2 * n, 2, dtype=np.float32) / np.float32(2 * n)
    return np.float32(1) / np.float32(theta) ** exponents
