"""Rotary positions: of prompts with images (host), and the rotation tables (device).

Text advances all three axes together. An image of h x w tokens occupies one temporal position, its
rows the height axis and its columns the width axis; the text after it goes on from the largest
position used plus one. As `get_rope_index` of transformers does for still images.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes, Qwen25VLVisionShapes


def prompt_positions(
    tokens: np.ndarray, grids: Sequence[Sequence[int]], shapes: Qwen25VLShapes
) -> tuple[np.ndarray, int]:
    """Returns the rope positions of one unpadded prompt.

    Args:
      tokens: int32[n], image placeholders expanded to one per merged token.
      grids: (1, rows, columns) in patches of each image, in order.
      shapes: for the image token and the merge size.

    Returns:
      int32[n, 3] (temporal, height, width), and the position of the token that comes next.

    Raises:
      ValueError: if the runs of image tokens and the grids do not fit each other.
    """
    tokens = np.asarray(tokens)
    is_image = tokens == shapes.image_token_id
    merge = shapes.vision.spatial_merge_size
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


def text_table(positions: jax.Array, shapes: Qwen25VLShapes) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of the decoder's angles.

    Args:
      positions: int32[..., 3] (temporal, height, width); equal for text.
      shapes: for the frequencies and `mrope_section`, which says how many follow each axis.

    Returns:
      Two float32[..., head_dim // 2].
    """
    axis = np.repeat(np.arange(3), shapes.mrope_section)
    frequencies = _frequencies(shapes.head_dim // 2, shapes.rope_theta)
    angles = positions.astype(jnp.float32)[..., axis] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def vision_table(coords: jax.Array, shapes: Qwen25VLVisionShapes) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of the vision tower's angles: rows turn one half, columns the other.

    Args:
      coords: int32[..., 2], row and column of each patch.
      shapes: for the head's width.

    Returns:
      Two float32[..., head_dim // 2].
    """
    frequencies = _frequencies(shapes.head_dim // 4, 10_000.0)
    angles = coords.astype(jnp.float32)[..., None] * frequencies
    angles = angles.reshape(*coords.shape[:-1], shapes.head_dim // 2)
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
