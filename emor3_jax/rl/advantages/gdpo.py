"""GDPO: each reward term is normalised within its group by itself (arXiv 2601.05242).

Where rewards are summed first, two responses with the same sum count as equal, whatever terms it is
made of, and a term that varies widely hides the others.

Deviations, numbered:
 1. ε is that of the other estimators, 1e-6; TRL's is 1e-4.
"""

import jax
import jax.numpy as jnp

from emor3_jax.rl.advantages.group import EPSILON, all_equal, grpo
from emor3_jax.rl.advantages.terms import RewardTerms, finite_groups


def gdpo(rewards: RewardTerms, *, std: str = "population", epsilon: float = EPSILON) -> jax.Array:
    """Returns `whiten(Σ w_n (R_n - mean) / (std + ε))`, float32[B, G].

    Mean and standard deviation of a term R_n are those of its group; whitening subtracts the mean
    over the batch and divides by the standard deviation over it, plus ε.

    Args:
      rewards: their terms and weights are read; what shaping added to the sum is not.
      std: "population" or "sample", see `grpo`; of the terms and of the batch.
      epsilon: added to standard deviations.

    Returns:
      float32[B, G]; exactly 0 if no term differs within any group, and of a group in which a term
      is no finite number.

    Raises:
      ValueError: if no term has a weight.
    """
    if not rewards.weights:
        raise ValueError("gdpo needs at least one reward term with a weight, got none")
    total = jnp.zeros_like(rewards.rewards)
    for name, each in _usable(rewards).items():
        total += rewards.weights[name] * grpo(each, std=std, epsilon=epsilon)
    return grpo(total.reshape(1, -1), std=std, epsilon=epsilon).reshape(total.shape)


def no_term_differs(rewards: RewardTerms) -> jax.Array:
    """Returns the groups within which no weighted term differs, bool[B]; of no use to `gdpo`."""
    weighted = [rewards.weights[name] * each for name, each in _usable(rewards).items()]
    return jnp.stack([all_equal(each) for each in weighted]).all(axis=0)


def _usable(rewards: RewardTerms) -> dict[str, jax.Array]:
    """Returns the terms of the weights, with zeros for groups in which one is no finite number."""
    # One number of one response would spoil the mean over the batch.
    usable = finite_groups(rewards)[:, None]
    return {name: jnp.where(usable, rewards.terms[name], 0.0) for name in rewards.weights}
