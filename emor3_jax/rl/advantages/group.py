"""Advantages from combined rewards: relative to a baseline of the group or of the batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-6
"""Added to standard deviations."""


def grpo(rewards: jax.Array, *, std: str = "population", epsilon: float = EPSILON) -> jax.Array:
    """Returns `(R_i - mean) / (std + ε)` within each group (GRPO, arXiv 2402.03300).

    Args:
      rewards: float32[B, G], the rewards of the `G` responses to each of `B` prompts.
      std: "population" (paper) or "sample" (release, ddof 1; needs G of at least 2).
      epsilon: added to the standard deviation.

    Returns:
      float32[B, G]; exactly 0 in a group whose rewards are all equal.

    Raises:
      ValueError: if `std` is unknown, or "sample" with G = 1.
    """
    chex.assert_rank(rewards, 2)
    if std not in ("population", "sample"):
        raise ValueError(f"std={std!r}: must be 'population' or 'sample'")
    ddof = int(std == "sample")
    if rewards.shape[1] <= ddof:
        raise ValueError(
            f"std='sample' needs at least 2 responses per prompt, got {rewards.shape[1]}; "
            "raise rollout.responses or use std='population'"
        )
    centred = dr_grpo(rewards)
    deviation = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / (rewards.shape[1] - ddof))
    return centred / (deviation + epsilon)


def dr_grpo(rewards: jax.Array) -> jax.Array:
    """Returns `R_i - mean` within each group (Dr. GRPO, arXiv 2503.20783).

    Args:
      rewards: float32[B, G].

    Returns:
      float32[B, G]; exactly 0 in a group whose rewards are all equal.
    """
    chex.assert_rank(rewards, 2)
    # The mean of equal float32 rewards can differ from them by a rounding error, which division by
    # a standard deviation of the same size would amplify: such a group must get no gradient.
    return jnp.where(all_equal(rewards)[:, None], 0.0, rewards - rewards.mean(1, keepdims=True))


def rloo(rewards: jax.Array) -> jax.Array:
    """Returns `R_i - mean of the other rewards` within each group (RLOO, arXiv 2402.14740).

    Args:
      rewards: float32[B, G], G of at least 2.

    Returns:
      float32[B, G]; exactly 0 in a group whose rewards are all equal.

    Raises:
      ValueError: if G = 1.
    """
    responses = rewards.shape[1]
    if responses < 2:
        raise ValueError("rloo needs at least 2 responses per prompt, got 1")
    # R_i - (sum - R_i) / (G - 1) = (R_i - mean) G / (G - 1).
    return dr_grpo(rewards) * (responses / (responses - 1))


def reinforce_pp(rewards: jax.Array, *, epsilon: float = EPSILON) -> jax.Array:
    """Returns `(R_i - mean) / (std + ε)` over the whole batch (REINFORCE++, arXiv 2501.03262).

    Args:
      rewards: float32[B, G], G of at least 1.
      epsilon: added to the population standard deviation.

    Returns:
      float32[B, G]; exactly 0 if all rewards of the batch are equal.
    """
    return grpo(rewards.reshape(1, -1), epsilon=epsilon).reshape(rewards.shape)


def reinforce_pp_baseline(rewards: jax.Array, *, epsilon: float = EPSILON) -> jax.Array:
    """Returns `(R_i - group mean) / (std + ε)` (REINFORCE++ with baseline, arXiv 2501.03262).

    The standard deviation is that of the centred rewards over the whole batch.

    Args:
      rewards: float32[B, G].
      epsilon: added to the population standard deviation.

    Returns:
      float32[B, G]; exactly 0 in a group whose rewards are all equal.
    """
    centred = dr_grpo(rewards)
    # Their mean over the batch is 0, since it is 0 in each group.
    return centred / (jnp.sqrt(jnp.mean(centred**2)) + epsilon)


def remax(rewards: jax.Array, greedy: jax.Array) -> jax.Array:
    """Returns `R_i - R_greedy` (ReMax, arXiv 2310.10505).

    Args:
      rewards: float32[B, G], G of at least 1.
      greedy: float32[B, 1], reward of the greedy response to each prompt.

    Returns:
      float32[B, G].
    """
    chex.assert_shape(greedy, (rewards.shape[0], 1))
    return rewards - greedy


def all_equal(rewards: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Returns a mask of the groups whose rewards are all equal, bool[B].

    Args:
      rewards: float32[B, G]; a NumPy array is reduced on the host.
    """
    chex.assert_rank(rewards, 2)
    return rewards.max(axis=1) == rewards.min(axis=1)


def zero_std_fraction(rewards: jax.Array | np.ndarray) -> jax.Array | np.float32:
    """Returns the share of groups whose rewards are all equal, float32[]: they have no gradient.

    Args:
      rewards: float32[B, G]; a NumPy array is reduced on the host.
    """
    # Times the reciprocal, as XLA compiles a mean on CPU: equal bits for arrays of both kinds.
    return all_equal(rewards).sum(dtype=np.float32) * np.float32(1 / len(rewards))
