"""The weight of an entropy bonus, adapted towards a target (Skywork-OR1, arXiv 2505.22312)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class EntropyBonus(NamedTuple):
    """The state of the weight.

    Attributes:
      coef: float32[], the weight as it is adapted.
      applied: float32[], the weight of the next step: `coef`, or 0 while the entropy is over the
        target.
    """

    coef: jax.Array | float
    applied: jax.Array | float


def adapt(
    bonus: EntropyBonus,
    entropy: jax.Array,
    counted: jax.Array | float = 1.0,
    *,
    target: float,
    delta: float,
    most: float,
) -> EntropyBonus:
    """Returns the weight of the next step.

    `coef` rises by `delta` where the entropy is at most the target, else it falls by `delta`; it
    stays within 0 and `most`.

    Args:
      bonus: of this step.
      entropy: float32[], mean over the tokens of this step, in nats; of NaN the bonus stays as it
        is.
      counted: float32[], 0 if no token of this step counted: the bonus stays too.
      target: in nats.
      delta: change of a step.
      most: upper bound.
    """
    low = entropy <= target
    coef = jnp.clip(bonus.coef + jnp.where(low, delta, -delta), 0.0, most)
    found = EntropyBonus(coef, jnp.where(low, coef, 0.0))
    known = (counted > 0) & ~jnp.isnan(entropy)
    return jax.tree.map(lambda new, old: jnp.where(known, new, old), found, bonus)
