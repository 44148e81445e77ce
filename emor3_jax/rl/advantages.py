"""Advantage estimators: rewards relative to a baseline of the group or of the batch.

`estimate(name, …)` looks up one of `ESTIMATORS` by its name in the config:

| name | advantage of response i | paper |
|---|---|---|
| grpo | `(R_i - mean) / (std + ε)`, mean and std of the group | arXiv 2402.03300 |
| dr_grpo | `R_i - mean` | arXiv 2503.20783 |
| rloo | `R_i - mean of the others of the group` | arXiv 2402.14740 |
| reinforce_pp | `(R_i - mean) / (std + ε)`, mean and std of the batch | arXiv 2501.03262 |
| reinforce_pp_baseline | `(R_i - group mean) / (std + ε)`, batch std of the numerator | the same |
| remax | `R_i - R of the greedy response` | arXiv 2310.10505 |

Deviations, numbered:
 1. The paper divides by the population standard deviation, the release by the sample standard
    deviation (ddof 1); `std` selects one, set by the profile. Both use the release's ε = 1e-6.
 2. A KL penalty in the reward is one number per response (`kl.penalty`), so REINFORCE++ also gives
    all tokens of a response the same advantage; its paper subtracts from each token's only the
    KL from that token on.
 3. Batch statistics are over all prompts of a step, not over those of one update.
"""

from collections.abc import Callable
from typing import NamedTuple

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


class RewardTerms(NamedTuple):
    """Rewards of a step, combined and by term.

    Attributes:
      rewards: float32[B, G], the combined rewards after shaping.
      terms: float32[B, G] each, by name, before they are weighted; `overall` is among them, which
        has no weight.
      weights: weight of each term in the combined reward before shaping.
      greedy: float32[B, 1], combined reward of a greedy response to each prompt; None unless the
        estimator needs it.
    """

    rewards: jax.Array
    terms: dict[str, jax.Array]
    weights: dict[str, float]
    greedy: jax.Array | None = None


class Estimator(NamedTuple):
    """An advantage estimator and its requirements.

    Attributes:
      function: `RewardTerms` → advantages, float32[B, G].
      responses: the smallest G for which it is not always 0.
      std: `function` takes the keyword `std`, see `grpo`.
      greedy: needs the reward of one greedy response to each prompt.
    """

    function: Callable[..., jax.Array]
    responses: int = 1
    std: bool = False
    greedy: bool = False


def _combined(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Adapts an estimator of the combined rewards alone to `RewardTerms`."""
    return lambda rewards, **options: function(rewards.rewards, **options)


ESTIMATORS = {
    "grpo": Estimator(_combined(grpo), responses=2, std=True),
    "dr_grpo": Estimator(_combined(dr_grpo), responses=2),
    "rloo": Estimator(_combined(rloo), responses=2),
    "reinforce_pp": Estimator(_combined(reinforce_pp)),
    "reinforce_pp_baseline": Estimator(_combined(reinforce_pp_baseline), responses=2),
    "remax": Estimator(lambda rewards: remax(rewards.rewards, rewards.greedy), greedy=True),
}
"""Name in the config → estimator."""


def estimate(name: str, rewards: RewardTerms, *, std: str = "population") -> jax.Array:
    """Returns the advantages by a named estimator, float32[B, G].

    Args:
      name: one of `ESTIMATORS`.
      rewards: of all responses of a step.
      std: see `grpo`; other estimators ignore it.

    Raises:
      ValueError: if G is too small for the estimator, or it needs greedy rewards and has none.
    """
    estimator = ESTIMATORS[name]
    if estimator.greedy and rewards.greedy is None:
        raise ValueError(f"{name} needs the rewards of greedy responses, got None")
    return estimator.function(rewards, **({"std": std} if estimator.std else {}))


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
