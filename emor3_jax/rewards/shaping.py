"""Length-dependent reward shaping."""

import jax
import jax.numpy as jnp


def overlong(lengths: jax.Array, *, limit: int, buffer: int) -> jax.Array:
    """Returns DAPO's soft over-long penalty, float32[...] in [-1, 0] (arXiv 2503.14476, eq. 13).

    0 up to `limit - buffer` tokens, then linear down to -1 at `limit`, the length of truncated
    responses.

    Args:
      lengths: int32[...], tokens of the responses, the end-of-sequence token included.
      limit: T, the maximum response length.
      buffer: tokens over which the penalty grows, 1 to `limit`.
    """
    return jnp.clip((limit - buffer - lengths) / buffer, -1.0, 0.0)
