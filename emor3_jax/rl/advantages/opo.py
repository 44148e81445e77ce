"""OPO: the reward baseline of least variance, weighted by lengths (arXiv 2505.23585)."""

import chex
import jax
import jax.numpy as jnp

from emor3_jax.rl.advantages.group import all_equal


def opo(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns `R_i - Σ length_j R_j / Σ length_j` within each group.

    Args:
      rewards: float32[B, G].
      lengths: int32[B, G], tokens of the responses.

    Returns:
      float32[B, G]; exactly 0 in a group whose rewards are all equal.
    """
    chex.assert_equal_shape([rewards, lengths])
    weights = lengths.astype(jnp.float32)
    total = jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    baseline = (weights * rewards).sum(axis=1, keepdims=True) / total
    return jnp.where(all_equal(rewards)[:, None], 0.0, rewards - baseline)
