"""GDPO: each reward term is normalised within its group by itself (arXiv 2601.05242).

Where rewards are summed first, two responses with the same sum count as equal, whatever terms it is
made of, and a term that varies widely hides the others.

Deviations, numbered:
 1. ε is that of the other estimators, 1e-6; TRL's is 1e-4.
"""

import jax
import jax.numpy as jnp

from emor3_jax.rl.advantages.group import EPSILON, grpo
from emor3_jax.rl.advantages.terms import RewardTerms


def gdpo(rewards: RewardTerms, *, std: str = "population", epsilon: float = EPSILON) -> jax.Array:
    """Returns `whiten(Σ w_n (R_n - mean) / (std + ε))`, float32[B, G].

    Mean and standard deviation of a term R_n are those of its group; whitening subtracts the mean
    over the batch and divides by the standard deviation over it, plus ε.

    Args:
      rewards: their terms and weights are read; what shaping added to the sum is not.
      std: "population" or "sample", see `grpo`; of the terms and of the batch.
      epsilon: added to standard deviations.

    Returns:
      float32[B, G]; exactly 0 if no term differs within any group.

    Raises:
      ValueError: if no term has a weight.
    """
    if not rewards.weights:
        raise ValueError("gdpo needs at least one reward term with a weight, got none")
    total = jnp.zeros_like(rewards.rewards)
    for name, weight in rewards.weights.items():
        total += weight * grpo(rewards.terms[name], std=std, epsilon=epsilon)
    return grpo(total.reshape(1, -1), std=std, epsilon=epsilon).reshape(total.shape)
