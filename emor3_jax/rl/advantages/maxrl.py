"""MaxRL: rewards relative to the group's mean, in units of that mean (arXiv 2602.02710).

With rewards of 0 and 1 a prompt that is answered rarely weighs more than in GRPO: the gradient is
that of the log-likelihood of a right answer, to an order that grows with the group.
"""

import jax
import jax.numpy as jnp

from emor3_jax.rl.advantages.group import EPSILON, dr_grpo


def maxrl(rewards: jax.Array, *, epsilon: float = EPSILON) -> jax.Array:
    """Returns `(R_i - mean) / (mean + ε)` within each group.

    Args:
      rewards: float32[B, G], meant to be 0 or more.
      epsilon: added to the mean.

    Returns:
      float32[B, G]; exactly 0 in a group whose rewards are all equal, or whose mean is not over 0.
    """
    mean = rewards.mean(axis=1, keepdims=True)
    return jnp.where(mean > 0, dr_grpo(rewards) / (jnp.maximum(mean, 0) + epsilon), 0.0)
