"""Advantages: how much better a response is than what its prompt, or the batch, let expect.

`estimate(name, …)` computes one of `ESTIMATORS` by its name in the config:

| name | advantage of response i | paper |
|---|---|---|
| grpo | `(R_i - mean) / (std + ε)`, mean and std of the group | arXiv 2402.03300 |
| dr_grpo | `R_i - mean` | arXiv 2503.20783 |
| rloo | `R_i - mean of the others of the group` | arXiv 2402.14740 |
| reinforce_pp | `(R_i - mean) / (std + ε)`, mean and std of the batch | arXiv 2501.03262 |
| reinforce_pp_baseline | `(R_i - group mean) / (std + ε)`, std of these over the batch | the same |
| remax | `R_i - R of the greedy response` | arXiv 2310.10505 |

Deviations, numbered:
 1. The paper divides by the population standard deviation, the release by the sample standard
    deviation (ddof 1); `std` chooses, and the profile sets it. The release's ε = 1e-6 is used for
    both.
 2. A KL penalty in the reward is one number a response (`kl.penalty`), so REINFORCE++ too gives all
    tokens of a response one advantage; its paper subtracts from a token only the KL that follows.
 3. Statistics of "the batch" are those of all prompts of a step, not of one update's part.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

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
    # The mean of equal float32 rewards can differ from them by a rounding error, which a division
    # by a standard deviation of the same size would blow up: such a group teaches nothing.
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
    # Their mean over the batch is 0, since it is in each group.
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


class Estimator(NamedTuple):
    """An estimator and what it needs.

    Attributes:
      function: float32[B, G] → float32[B, G].
      responses: the smallest G for which it is not always 0.
      std: takes which standard deviation of a group to divide by.
      greedy: takes the rewards of one greedy response to each prompt.
    """

    function: Callable[..., jax.Array]
    responses: int = 1
    std: bool = False
    greedy: bool = False


ESTIMATORS = {
    "grpo": Estimator(grpo, std=True),
    "dr_grpo": Estimator(dr_grpo, responses=2),
    "rloo": Estimator(rloo, responses=2),
    "reinforce_pp": Estimator(reinforce_pp),
    "reinforce_pp_baseline": Estimator(reinforce_pp_baseline, responses=2),
    "remax": Estimator(remax, greedy=True),
}
"""Name in the config → estimator."""


def estimate(
    name: str, rewards: jax.Array, *, std: str = "population", greedy: jax.Array | None = None
) -> jax.Array:
    """Returns the advantages by the estimator of a name, float32[B, G].

    Args:
      name: one of `ESTIMATORS`.
      rewards: float32[B, G].
      std: see `grpo`; other estimators do not read it.
      greedy: see `remax`, which needs it.

    Raises:
      ValueError: if G is too small for the estimator.
    """
    found = ESTIMATORS[name]
    options = {"std": std} if found.std else {}
    return found.function(rewards, *((greedy,) if found.greedy else ()), **options)


def all_equal(rewards: jax.Array) -> jax.Array:
    """Returns which groups have only equal rewards, bool[B].

    Args:
      rewards: float32[B, G].
    """
    chex.assert_rank(rewards, 2)
    return rewards.max(axis=1) == rewards.min(axis=1)


def zero_std_fraction(rewards: jax.Array) -> jax.Array:
    """Returns the share of groups whose rewards are all equal, float32[]: they carry no gradient.

    Args:
      rewards: float32[B, G].
    """
    return jnp.mean(all_equal(rewards))
