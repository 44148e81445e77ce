"""What advantage estimators read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RewardTerms(NamedTuple):
    """Rewards of a step, combined and by term.

    Attributes:
      rewards: float32[B, G], the combined rewards after shaping.
      terms: float32[B, G] each, by name, before they are weighted; `overall` is among them, which
        has no weight.
      weights: weight of each term in the combined reward before shaping.
      greedy: float32[B, 1], combined reward of a greedy response to each prompt; None unless the
        estimator needs it.
      lengths: int32[B, G], tokens of the responses; None unless the estimator needs them.
    """

    rewards: jax.Array
    terms: dict[str, jax.Array]
    weights: dict[str, float]
    greedy: jax.Array | None = None
    lengths: jax.Array | None = None


def finite_groups(rewards: RewardTerms) -> jax.Array:
    """Returns the groups in which every term is a finite number, bool[B]; others teach nothing."""
    found = jnp.ones(len(rewards.rewards), bool)
    for term in rewards.terms.values():
        found &= jnp.isfinite(term).all(axis=1)
    return found
