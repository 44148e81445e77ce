"""Group-relative advantages: how much better a response is than its group.

Deviations, numbered:
 1. The paper divides by the population standard deviation, the release by the sample standard
    deviation (ddof 1); `std` chooses, and the profile sets it. The release's ε = 1e-6 is used for
    both.
"""

import chex
import jax
import jax.numpy as jnp


def grpo(rewards: jax.Array, *, std: str = "population", epsilon: float = 1e-6) -> jax.Array:
    """Returns `(R_i - mean) / (std + ε)` within each group (GRPO; paper section on optimisation).

    Args:
      rewards: float32[B, G], the rewards of the `G` responses to each of `B` prompts.
      std: "population" (paper) or "sample" (release, ddof 1; needs G of at least 2).
      epsilon: added to the standard deviation.

    Returns:
      float32[B, G]; exactly 0 in a group whose rewards are all equal.

    Raises:
      ValueError: if `std` is unknown, or "sample" is asked for with G = 1.
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
    # The mean of equal float32 rewards can differ from them by a rounding error, which the division
    # by a standard deviation of the same size would blow up: such a group teaches nothing.
    equal = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    centred = jnp.where(equal, 0.0, rewards - rewards.mean(axis=1, keepdims=True))
    deviation = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / (rewards.shape[1] - ddof))
    return centred / (deviation + epsilon)


def zero_std_fraction(rewards: jax.Array) -> jax.Array:
    """Returns the share of groups whose rewards are all equal, float32[]: they carry no gradient.

    Args:
      rewards: float32[B, G].
    """
    chex.assert_rank(rewards, 2)
    return jnp.mean(rewards.max(axis=1) == rewards.min(axis=1))
